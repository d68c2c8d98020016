"""What is asked of a generator, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

from ediffi.cascade import PAPER_ENLARGING
from ediffi.painting import Painting
from ediffi.prompts import Style, one_each
from ediffi.sampling import SamplingConfig

Model = Literal["ensemble", "base"]
_DEFAULT = SamplingConfig()


class DrawOptions(TypedDict, total=False):
    """What `Generator.draw` takes beside the prompts; `Generator.generate` says what each does."""

    seeds: Sequence[int] | None
    guidance: float | None
    style: Style | Sequence[Style | None] | None
    painting: Painting | Sequence[Painting | None] | None
    image_px: int | None
    config: SamplingConfig | None
    enlarging: SamplingConfig | Mapping[str, SamplingConfig] | None
    dropped_streams: Sequence[str]
    model: Model
    progress: Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Enlarger:
    """A super-resolution model of a cascade, before it is loaded."""

    name: str  # of its directory, such as sr256
    directory: Path
    image_px: int  # side of what it makes


@dataclass(frozen=True, kw_only=True)
class DrawingRequest:
    """Options with their defaults filled in; prompts to paintings have an entry a picture."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    styles: Sequence[Style | None]
    paintings: Sequence[Painting | None]
    dropped_streams: Sequence[str]
    config: SamplingConfig  # of the base
    enlarging: Sequence[tuple[Enlarger, SamplingConfig]]

    def batches(self) -> Iterator[slice]:
        """Pictures that the base draws at once."""
        for start in range(0, len(self.prompts), self.config.batch_pictures):
            yield slice(start, min(start + self.config.batch_pictures, len(self.prompts)))


def drawing_request(
    prompts: str | Sequence[str],
    options: DrawOptions,
    *,
    enlargers: Sequence[Enlarger],
    base_px: int,
) -> DrawingRequest:
    """Fill in defaults.

    Args:
        prompts: one a picture; a single one is drawn once for each seed.
        options: see `Generator.generate`.
        enlargers: the cascade's, in order of size.
        base_px: side of the base's pictures.

    Raises:
        ValueError: numbers that do not match, or a size or name that the cascade does not have.
    """
    seeds = options.get("seeds")
    if isinstance(prompts, str):
        prompts = [prompts] * (1 if seeds is None else len(seeds))
    seeds = range(len(prompts)) if seeds is None else seeds
    if not prompts:
        raise ValueError("prompts must be at least one, with a seed, got none")
    if len(prompts) != len(seeds):
        raise ValueError(f"seeds must be one a prompt ({len(prompts)}), got {len(seeds)}")
    config, guidance = options.get("config") or _DEFAULT, options.get("guidance")
    largest_px = _largest_px(
        options.get("image_px"), [base_px, *(one.image_px for one in enlargers)]
    )
    configs = _enlarging_configs(options.get("enlarging"), [one.name for one in enlargers])
    return DrawingRequest(
        prompts=prompts,
        seeds=seeds,
        styles=one_each("style", options.get("style"), len(prompts)),
        paintings=one_each("painting", options.get("painting"), len(prompts)),
        dropped_streams=options.get("dropped_streams", ()),
        config=config if guidance is None else replace(config, guidance=guidance),
        enlarging=[(one, configs[one.name]) for one in enlargers if one.image_px <= largest_px],
    )


def _largest_px(image_px: int | None, sizes_px: Sequence[int]) -> int:
    if image_px is None:
        return sizes_px[-1]
    if image_px not in sizes_px:
        sizes = ", ".join(str(one) for one in sizes_px)
        raise ValueError(
            f"image_px must be a size that this ensemble draws, {sizes}; got {image_px}"
        )
    return image_px


def _enlarging_configs(
    given: SamplingConfig | Mapping[str, SamplingConfig] | None, names: Sequence[str]
) -> dict[str, SamplingConfig]:
    """How each model of the cascade draws."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given or PAPER_ENLARGING)
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(
            f"enlarging names {', '.join(unknown)}, but the models of this cascade are "
            f"{', '.join(names) or 'none'}"
        )
    return {name: given.get(name, PAPER_ENLARGING) for name in names}
