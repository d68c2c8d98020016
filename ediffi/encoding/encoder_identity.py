"""What an embedding cache was made with, field by field, so that no two are confused.

A cache is worth nothing to a network that was trained on another encoder's, and nothing in its
tensors would say so. Every embedding cache therefore carries `encoder.json`, and whoever reads it
compares each field with what was asked. Free of torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ediffi.encoding.encoder_weights import EncoderConfig, local_weights, path_digest

IDENTITY_FILE = "encoder.json"
_FORMAT = 1

_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
_OLDER_WEIGHT_PATTERNS = ("*.bin", "*.bin.index.json", "*.pth")  # read only without the above
_TOKENIZER_PATTERNS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model"),
)
_NOTES = ("_name_or_path", "transformers_version")  # in config.json; they change no number
_CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


class CacheMismatch(ValueError):
    """A cache was made with another encoder than the one that is asked for."""


def encoder_identity(config: EncoderConfig) -> dict[str, str | int]:
    """Every property of an encoder that can change a cache's bytes, by field.

    Returns:
        A flat mapping; fields that do not apply are left out. `weights`, `tokenizer` and
        `preprocessing` are "sha256:..." over the files that decide them where these lie on this
        machine. A hub name (with its `@REVISION`, if it pins one) or an open_clip tag stands for
        itself, and for the tokenizer and preprocessing that are published with it.

    Raises:
        ValueError: `weights` names a directory or package that is missing or incomplete.
    """
    identity: dict[str, str | int] = {"family": config.family, "weights": _weights(config)}
    if config.model:
        identity["model"] = config.model
    if config.family == "open_clip_image":
        identity["preprocessing"] = _preprocessing(config)
    else:
        identity["tokenizer"] = _tokenizer(config)
        for field in ("max_tokens", "layer", "pad", "too_long"):
            identity[field] = getattr(config, field)
    identity["compute_dtype"] = config.compute_dtype
    identity["storage_dtype"] = config.storage_dtype
    return identity


def identity_digest(identity: Mapping[str, str | int]) -> str:
    """Short form of an identity, for receipts: 16 hex digits."""
    return hashlib.sha256(_canonical(identity)).hexdigest()[:16]


def check_identity(
    found: Mapping[str, str | int], asked: Mapping[str, str | int], where: str
) -> None:
    """Compare what a cache was made with to what a recipe asks.

    Args:
        where: the cache, for the message.

    Raises:
        CacheMismatch: names every field that differs, both its values, and what to do.
    """
    fields = [name for name in (*asked, *sorted(found)) if found.get(name) != asked.get(name)]
    if not fields:
        return
    lines = [
        f"  {name}: the cache has {_show(found, name)}, asked is {_show(asked, name)}"
        for name in dict.fromkeys(fields)
    ]
    raise CacheMismatch(
        f"{where}: made with another encoder than the one asked for\n"
        + "\n".join(lines)
        + "\n  ask for what the cache has, or embed anew with what is asked"
    )


def identity_json(identity: Mapping[str, str | int]) -> str:
    """Content of `encoder.json`. Equal identities, equal text."""
    return json.dumps({"format": _FORMAT, "encoder": dict(identity)}, indent=1) + "\n"


def read_identity(location: str | Path) -> dict[str, str | int]:
    """Read what a cache was made with from its `encoder.json`.

    Args:
        location: folder or URL of a finished cache.

    Raises:
        ValueError: no such file, or it is not one of ours.
    """
    place = f"{str(location).rstrip('/')}/{IDENTITY_FILE}"
    try:
        document = json.loads(_read(place))
    except FileNotFoundError as error:
        raise ValueError(
            f"{place}: must be there in a finished embedding cache, found nothing: name the "
            "folder that holds the cache's tars, and see that its stage is finished"
        ) from error
    except ValueError as error:
        raise ValueError(f"{place}: must be JSON, {error}: copy the cache again") from error
    is_ours = isinstance(document, dict) and isinstance(document.get("encoder"), dict)
    if not is_ours or document.get("format") != _FORMAT:
        raise ValueError(
            f"{place}: must be of format {_FORMAT} with a field `encoder`, found "
            f"{str(document)[:80]}: it is no embedding cache, or one of another version"
        )
    return dict(document["encoder"])


def _read(place: str) -> str:
    if "://" not in place or place.startswith("file://"):
        return Path(place.removeprefix("file://")).read_text(encoding="utf-8")
    import fsspec

    with fsspec.open(place, "r", encoding="utf-8") as stream:
        return stream.read()


def _show(identity: Mapping[str, str | int], name: str) -> str:
    return repr(identity[name]) if name in identity else "nothing"


# -- digests of files -----------------------------------------------------------------------------


def _weights(config: EncoderConfig) -> str:
    path = local_weights(config)
    if path is None:
        return config.weights
    if path.is_file():
        return f"sha256:{path_digest(path)}"
    files = _matching(path, _WEIGHT_PATTERNS) or _matching(path, _OLDER_WEIGHT_PATTERNS)
    if config.family == "transformers":
        settings = _settings(path / "config.json")
        architecture: object = {n: value for n, value in settings.items() if n not in _NOTES}
    else:
        architecture = _settings(path / "open_clip_config.json").get("model_cfg", {})
    return _digest(files, architecture)


def _tokenizer(config: EncoderConfig) -> str:
    if config.family == "open_clip_text":
        return _digest([_clip_vocabulary()])
    path = local_weights(config)
    if path is None:
        return config.weights
    return _digest(_matching(path, _TOKENIZER_PATTERNS))


def _preprocessing(config: EncoderConfig) -> str:
    path = local_weights(config)
    if path is None:
        return f"as published with {config.weights}"
    if path.is_file():
        return f"open_clip's default for {config.model}"
    settings = _settings(path / "open_clip_config.json").get("preprocess_cfg", {})
    return _digest([], settings)


def _clip_vocabulary() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ValueError(
            "family 'open_clip_text' needs the package open_clip_torch, found none: install it"
        )
    return Path(spec.origin).parent / _CLIP_VOCABULARY


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _settings(path: Path) -> dict[str, object]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON, {error}: save the model again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: must hold an object, found {str(settings)[:80]}")
    return settings


def _digest(files: Iterable[Path], settings: object = None) -> str:
    """Over names and contents of files and, in canonical form, over settings."""
    digest = hashlib.sha256(_canonical(settings))
    for file in files:
        digest.update(f"\n{file.name}\0{path_digest(file)}".encode())
    return f"sha256:{digest.hexdigest()}"


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
