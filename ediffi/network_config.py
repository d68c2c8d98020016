"""What the configs of all network families share: checks of attention and streams, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Protocol

from ediffi.conditioning import StreamConfig, check_json_keys


class Config(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class AttentionSizes(Protocol):
    """The fields that decide where a network attends, and to what."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per level."""

    @property
    def level_px(self) -> tuple[int, ...]:
        """Feature-map resolution of each level, finest first."""

    @property
    def self_attention_px(self) -> tuple[int, ...]:
        """Resolutions with self-attention."""

    @property
    def cross_attention_px(self) -> tuple[int, ...]:
        """Resolutions with cross-attention."""

    @property
    def head_width(self) -> int:
        """Channels per attention head."""

    @property
    def streams(self) -> tuple[StreamConfig, ...]:
        """What conditions the network."""


def check_positive(config: object, names: Sequence[str]) -> None:
    """Raise ValueError unless the named fields are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def check_widths(widths: Sequence[int]) -> None:
    """Raise ValueError unless groups of four channels or more can be formed at every level."""
    if not widths or any(width < 4 or width % 4 for width in widths):
        raise ValueError(f"widths must be one or more positive multiples of 4, got {widths}")


def check_attention(config: AttentionSizes) -> None:
    """Raise ValueError for attention at a resolution that is not there, or with unfit heads."""
    for name in ("self_attention_px", "cross_attention_px"):
        if unknown := [px for px in getattr(config, name) if px not in config.level_px]:
            raise ValueError(
                f"{name} must list feature-map resolutions of this network, "
                f"{_listed(config.level_px)}; got {_listed(unknown)}"
            )
    for px, width in zip(config.level_px, config.widths, strict=True):
        has_attention = px in config.self_attention_px or px in config.cross_attention_px
        if has_attention and width % config.head_width:
            raise ValueError(
                f"head_width must divide every width with attention, got {config.head_width} "
                f"and width {width} at {px} px; use a divisor of {width}"
            )


def check_streams(config: AttentionSizes) -> None:
    """Raise ValueError unless names are distinct and cross-attention has tokens, and they it."""
    names = [stream.name for stream in config.streams]
    if len(set(names)) < len(names):
        raise ValueError(f"streams must have distinct names, got {', '.join(names)}")
    attended = [stream.name for stream in config.streams if stream.has_context]
    if attended and not config.cross_attention_px:
        raise ValueError(
            f"streams {', '.join(attended)} have tokens but nothing attends to them; set "
            f"cross_attention_px to some of {_listed(config.level_px)}"
        )
    if config.cross_attention_px and not attended:
        raise ValueError(
            f"cross_attention_px is {_listed(config.cross_attention_px)} but no stream has "
            "tokens; add a stream with token_width, or clear cross_attention_px"
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def config_to_json(config: Config) -> dict[str, Any]:
    """Return a config's fields as JSON values."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
    }


def config_values(config_class: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor's arguments from what `config_to_json` wrote.

    Raises:
        ValueError: an unknown field.
    """
    check_json_keys(config_class, data)
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
    }
    streams = tuple(StreamConfig.from_json(stream) for stream in values.pop("streams", ()))
    return {**values, "streams": streams}
