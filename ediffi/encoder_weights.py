"""Which encoder a recipe asks for, where its weights lie, and the identity of those weights.

Free of torch: a pipeline is planned and fingerprinted where nothing is encoded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_CHOICES = {
    "family": ("transformers", "open_clip_text", "open_clip_image"),
    "pad": ("drop", "keep"),
    # No fp16: the feed-forward activations of T5 exceed its range and the states become inf.
    "compute_dtype": ("fp32", "bf16"),
    "storage_dtype": ("fp32", "bf16"),
}
_PACKAGE = "package:"


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which network encodes, how long captions may be, and what is stored."""

    family: Literal["transformers", "open_clip_text", "open_clip_image"]
    weights: str  # hub name, open_clip tag, local directory or file, or "package:MODULE"
    model: str = ""  # open_clip architecture where weights is a tag or a file
    max_tokens: int = 77
    pad: Literal["drop", "keep"] = "drop"  # keep: max_tokens states for every caption
    compute_dtype: Literal["fp32", "bf16"] = "fp32"
    storage_dtype: Literal["fp32", "bf16"] = "bf16"

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
