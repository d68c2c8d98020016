"""The families of networks: the base's ADM U-Net, super-resolution's Efficient U-Net.

All are called alike, network(x_BCHW, c_noise_B, conditioning) -> F of x's shape. All have
`config`, `num_parameters` and a switch `gradient_checkpointing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ediffi.efficient_unet import EfficientUNet, EfficientUNetConfig
from ediffi.unet import UNet, UNetConfig

NetworkConfig = UNetConfig | EfficientUNetConfig
Network = UNet | EfficientUNet

_CONFIGS: dict[str, type[NetworkConfig]] = {"adm": UNetConfig, "efficient": EfficientUNetConfig}


def build_network(config: NetworkConfig) -> Network:
    """Make the network that a config describes, with random weights."""
    if isinstance(config, UNetConfig):
        return UNet(config)
    return EfficientUNet(config)


def network_to_json(config: NetworkConfig) -> dict[str, Any]:
    """Return the family and the fields as JSON values."""
    family = next(name for name, kind in _CONFIGS.items() if isinstance(config, kind))
    return {"family": family, **config.to_json()}


def network_from_json(data: Mapping[str, Any]) -> NetworkConfig:
    """Inverse of `network_to_json`; records from before there were families are of `adm`.

    Raises:
        ValueError: an unknown family or field.
    """
    fields = dict(data)
    family = fields.pop("family", "adm")
    if family not in _CONFIGS:
        raise ValueError(f"network family must be one of {', '.join(_CONFIGS)}, got {family!r}")
    return _CONFIGS[family].from_json(fields)
