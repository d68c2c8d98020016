"""Which encoder a recipe asks for, where its weights lie, and the identity of those weights.

Free of torch: a pipeline is planned and fingerprinted where nothing is encoded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_CHOICES = {
    "family": ("transformers", "open_clip_text", "open_clip_image"),
    "pad": ("drop", "keep"),
    # No fp16: the feed-forward activations of T5 exceed its range and the states become inf.
    "compute_dtype": ("fp32", "bf16"),
    "storage_dtype": ("fp32", "bf16", "int8"),
    "layer": ("last", "penultimate"),
    "too_long": ("truncate", "reject"),
}
# What only token states have: its one meaningful value where a stream has none.
_IMAGE_DEFAULTS = {"layer": "last", "pad": "drop", "too_long": "truncate"}
_PACKAGE = "package:"
HUB_PREFIX = "hf-hub:"  # what open_clip writes before a hub repository


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which network encodes, how long captions may be, and what is stored.

    A hub name may pin a commit, branch or tag as `NAME@REVISION`. `int8` stores token states with
    a scale of their own each (see `ediffi.encoding.quantization`) and pooled vectors in bf16.
    """

    family: Literal["transformers", "open_clip_text", "open_clip_image"]
    weights: str  # hub name, open_clip tag, local directory or file, or "package:MODULE"
    model: str = ""  # open_clip architecture where weights is a tag or a file
    max_tokens: int = 77
    pad: Literal["drop", "keep"] = "drop"  # keep: max_tokens states for every caption
    compute_dtype: Literal["fp32", "bf16"] = "fp32"
    storage_dtype: Literal["fp32", "bf16", "int8"] = "bf16"
    layer: Literal["last", "penultimate"] = "last"  # penultimate: the last block is left out
    too_long: Literal["truncate", "reject"] = "truncate"  # what a cache does with long captions

    def __post_init__(self) -> None:
        """Raise ValueError naming the field, what it must be, and what was found."""
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"{field} must be one of {', '.join(choices)}, got {getattr(self, field)!r}"
                )
        if not self.weights:
            raise ValueError("weights must name a hub model, a tag, a directory or a package")
        if self.family == "transformers" and self.model:
            raise ValueError(
                f"model must be empty for family 'transformers', got {self.model!r}: "
                "weights alone names the network"
            )
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, got {self.max_tokens}")
        if self.family == "open_clip_image":
            self._check_image()
        self._check_revision()

    def _check_image(self) -> None:
        for field, only in _IMAGE_DEFAULTS.items():
            if getattr(self, field) != only:
                raise ValueError(
                    f"{field} must be {only!r} for family 'open_clip_image', got "
                    f"{getattr(self, field)!r}: pictures have no tokens"
                )
        if self.storage_dtype == "int8":
            raise ValueError(
                "storage_dtype must be fp32 or bf16 for family 'open_clip_image', got 'int8': "
                "one vector a picture is small already"
            )

    def _check_revision(self) -> None:
        name, at, revision = self.weights.rpartition("@")
        if not at or local_weights(self) is not None:
            return
        is_hub_name = self.family == "transformers" or name.startswith(HUB_PREFIX)
        if not is_hub_name or not name.removeprefix(HUB_PREFIX) or not revision:
            raise ValueError(
                f"weights must be NAME@REVISION for a hub name alone, got {self.weights!r}: an "
                f"open_clip tag has no revisions; write {HUB_PREFIX}OWNER/NAME@REVISION"
            )


def package_file(module: str, pattern: str) -> Path:
    """Return the file matching `pattern` nearest to the top of an installed package.

    Raises:
        ValueError: the package is not installed, or holds no such file.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a dotted name whose parent is missing
        spec = None
    roots = spec.submodule_search_locations if spec is not None else None
    if not roots:
        raise ValueError(
            f"weights must name an installed package after {_PACKAGE!r}, found none called "
            f"{module!r}: install it with pip, or give a directory"
        )
    found = [path for root in roots for path in Path(root).rglob(pattern)]
    if not found:
        raise ValueError(
            f"weights must name a package holding {pattern}, found none in {module!r} "
            f"({', '.join(roots)}): name another package, or give a directory"
        )
    return min(found, key=lambda path: (len(path.parts), str(path)))


def hub_revision(config: EncoderConfig) -> tuple[str, str]:
    """Split the hub name in `weights` from the revision it pins.

    Returns:
        (name without "hf-hub:", revision); the revision is "" where none is pinned.
    """
    name = config.weights.removeprefix(HUB_PREFIX)
    if "@" not in name:
        return name, ""
    name, _, revision = name.rpartition("@")
    return name, revision


def weights_identity(config: EncoderConfig) -> dict[str, str]:
    """Say which weights these are, for fingerprints.

    Returns:
        `{"sha256": digest over file names and contents}` for weights on this machine, or
        `{"weights": name}` for a hub name or tag, which is taken at its word.

    Raises:
        ValueError: `weights` names a directory or package that is missing or incomplete.
    """
    path = local_weights(config)
    return {"weights": config.weights} if path is None else {"sha256": path_digest(path)}


def path_digest(path: Path) -> str:
    """sha256 of a file, or over the sorted names and contents of a directory's files.

    Hidden files and byte code are left out: download tools and imports rewrite them.
    """
    if path.is_file():
        return _file_digest(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in parts):
            digest.update(f"{'/'.join(parts)}\0{_file_digest(file)}\n".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    status = path.stat()
    return _cached_file_digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _cached_file_digest(path: Path, num_bytes: int, mtime_ns: int) -> str:
    """Hash a file once per version: the weights of T5-XXL are 45 GB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_weights(config: EncoderConfig) -> Path | None:
    """Find what `weights` names on this machine.

    Returns:
        A directory or a file, or None when `weights` is a hub name or an open_clip tag.

    Raises:
        ValueError: it names a package or a path, and the model is not there.
    """
    marker = "config.json" if config.family == "transformers" else "open_clip_config.json"
    if config.weights.startswith(_PACKAGE):
        return package_file(config.weights.removeprefix(_PACKAGE), marker).parent
    path = Path(config.weights).expanduser()
    if path.is_file() and config.family != "transformers":
        return path
    if (path / marker).is_file():
        return path
    if path.exists() or config.weights.startswith(("/", "./", "../", "~")):
        found = "no such file there" if path.exists() else "nothing"
        raise ValueError(
            f"weights must be a directory holding {marker}, found {found} at {path}: "
            "correct the path, or save the model there first"
        )
    return None


@contextmanager
def explained_loading(config: EncoderConfig) -> Iterator[None]:
    """Turn a library's failure to load a model into a ValueError that says what to do."""
    try:
        yield
    except (OSError, ImportError, KeyError, RuntimeError, ValueError) as error:
        library = config.family.removesuffix("_text").removesuffix("_image")
        remedy = (
            "on a machine without network, download the model once elsewhere and set weights to "
            "its directory, or fill the cache at HF_HOME"
            if local_weights(config) is None
            else "check that its files are complete and of one model"
        )
        cause = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"weights must be a model that {library} can load, got {config.weights!r} "
            f"{config.model!r} ({type(error).__name__}: {cause}): {remedy}"
        ) from error
