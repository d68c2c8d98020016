"""What an ensemble is told: prompts, reference pictures and paintings as conditioning.

The encoders are the ensemble's own, those that made the embeddings it was trained on. A reference
picture takes the place of the training picture in every image stream, and so sets the style (paper
section 5); without one the stream is zeroed, as training drops it.

Shape legend: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from torch import Tensor

from ediffi.conditioning import Conditioning, collate
from ediffi.encoders import Encoder, TextEncoder, load_encoder
from ediffi.encoding.encoder_weights import EncoderConfig
from ediffi.ensemble_file import EnsembleInfo
from ediffi.painting import Painting, paint
from ediffi.pictures import ImageError, decode_image

if TYPE_CHECKING:
    from PIL import Image

Style: TypeAlias = "Image.Image | str | Path"  # a picture, or where one lies
Each = TypeVar("Each")

_IMAGE_FAMILY = "open_clip_image"
_NOT_IN_PNG = frozenset({"CMYK", "YCbCr", "LAB", "HSV"})  # modes of PIL


class PromptEncoders:
    """The encoders of an ensemble's streams, each loaded when it is first needed.

    Args:
        directory: the ensemble's; weights that begin with `./` lie inside it.
        info: what its record says.
        device: where encoders run.
    """

    def __init__(self, directory: Path, info: EnsembleInfo, device: str) -> None:
        self._directory, self._device = directory, device
        self._streams = info.network.streams
        self._configs = {
            stream.name: _config(info.encoders[stream.name], directory)
            for stream in info.network.streams
            if stream.name in info.encoders
        }
        self._loaded: dict[str, Encoder] = {}

    def conditioning(
        self,
        prompts: Sequence[str],
        styles: Sequence[Style | None],
        paintings: Sequence[Painting | None],
    ) -> Conditioning:
        """Encode prompts, reference pictures and paintings; all have one entry a picture.

        Returns:
            On the CPU, in the encoders' storage dtype.

        Raises:
            ValueError: a reference for an ensemble without an image stream, one that is no
                picture, or a painted phrase that its prompt lacks.
            OSError: a reference cannot be read.
        """
        samples: list[dict[str, dict[str, Tensor]]] = [{} for _ in prompts]
        self._check_styles(styles)
        pictures = _pictures(styles)
        texts: dict[str, TextEncoder] = {}
        for name, config in self._configs.items():
            inputs = pictures if config.family == _IMAGE_FAMILY else prompts
            if all(one is None for one in inputs):
                continue
            encoder = self._encoder(name)
            _encode(encoder, inputs, name, samples)
            if isinstance(encoder, TextEncoder):
                texts[name] = encoder
        conditioning = collate(samples, self._streams)
        if all(one is None for one in paintings):
            return conditioning
        return paint(conditioning, prompts, paintings, texts)

    def _encoder(self, name: str) -> Encoder:
        if name not in self._loaded:
            self._loaded[name] = load_encoder(self._configs[name], device=self._device)
        return self._loaded[name]

    def _check_styles(self, styles: Sequence[Style | None]) -> None:
        families = {config.family for config in self._configs.values()}
        if _IMAGE_FAMILY not in families and any(one is not None for one in styles):
            raise ValueError(
                f"{self._directory} has no image stream, so that no picture can set the style: its "
                f"encoders are {', '.join(self._configs) or 'none'}. Train with an encoder of "
                f"family {_IMAGE_FAMILY}"
            )


def one_each(name: str, given: Each | Sequence[Each | None] | None, num: int) -> list[Each | None]:
    """What was given for each of `num` prompts, or the same for all of them.

    Raises:
        ValueError: a sequence of another length; the message calls it `name`.
    """
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != num:
            raise ValueError(
                f"{name} must be one for all or one a prompt ({num}), got {len(given)}"
            )
        return list(given)
    return [given] * num


def _config(description: Mapping[str, object], directory: Path) -> EncoderConfig:
    weights = str(description["weights"])
    if weights.startswith("./"):
        description = {**description, "weights": str(directory / weights)}
    return EncoderConfig(**description)  # type: ignore[arg-type]


def _pictures(styles: Sequence[Style | None]) -> list[Image.Image | None]:
    """References in RGB; one that stands for several prompts is read once."""
    read = {id(one): _picture(one) for one in styles if one is not None}
    return [read.get(id(one)) for one in styles]


def _picture(style: Style) -> Image.Image:
    """One reference, decoded as strictly and made RGB by the same rules as training's pictures."""
    if isinstance(style, str | Path):
        try:
            return decode_image(Path(style).read_bytes())
        except ImageError as error:
            raise ValueError(f"style must be a picture, but {style} is none: {error}") from error
    stream = BytesIO()
    (style.convert("RGB") if style.mode in _NOT_IN_PNG else style).save(stream, "PNG")
    return decode_image(stream.getvalue())


def _encode(
    encoder: Encoder,
    inputs: Sequence[str | Image.Image | None],
    name: str,
    samples: Sequence[dict[str, dict[str, Tensor]]],
) -> None:
    """Put the encodings of what is there into its samples; what stands twice is encoded once."""
    keys = [one if isinstance(one, str) else id(one) for one in inputs]
    distinct = {key: one for key, one in zip(keys, inputs, strict=True) if one is not None}
    encoded = dict(zip(distinct, encoder.encode(list(distinct.values())), strict=True))
    for key, sample in zip(keys, samples, strict=True):
        if key in encoded:
            sample[name] = encoded[key]
