"""Families of networks: one way to build them, one record."""

import json

import pytest

from ediffi.efficient_unet import EfficientUNet, EfficientUNetConfig
from ediffi.network import NetworkConfig, build_network, network_from_json, network_to_json
from ediffi.unet import UNet, UNetConfig

ADM = UNetConfig(image_px=8, widths=(8,), num_blocks=1)
EFFICIENT = EfficientUNetConfig(image_px=8, widths=(8,), num_blocks=(1,), low_res_factor=2)


@pytest.mark.parametrize(("config", "kind"), [(ADM, UNet), (EFFICIENT, EfficientUNet)])
def test_every_family_is_built_from_its_config(config: NetworkConfig, kind: type) -> None:
    """The config's class decides; all networks have the same attributes."""
    network = build_network(config)
    assert type(network) is kind
    assert network.config == config
    assert network.num_parameters > 0
    assert network.gradient_checkpointing is False


@pytest.mark.parametrize(("config", "family"), [(ADM, "adm"), (EFFICIENT, "efficient")])
def test_the_record_names_its_family(config: NetworkConfig, family: str) -> None:
    """A config comes back from JSON as what it was."""
    record = json.loads(json.dumps(network_to_json(config)))
    assert record["family"] == family
    assert network_from_json(record) == config


def test_a_record_without_a_family_is_of_the_adm_family() -> None:
    """Snapshots from before there were families can be read."""
    assert network_from_json(ADM.to_json()) == ADM


def test_an_unknown_family_is_refused() -> None:
    """The families there are are listed."""
    with pytest.raises(ValueError, match="must be one of adm, efficient, got 'dit'"):
        network_from_json({**ADM.to_json(), "family": "dit"})
