"""What an hour of a device costs: as it was said, else by the node group of a stage."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.cost import DEVICES
from pipelines.errors import UserError

if TYPE_CHECKING:
    from cluster.profile import Profile


def price_options(verb: argparse.ArgumentParser) -> None:
    """Prices, said here or by a profile."""
    verb.add_argument(
        "--price-per-device-hour",
        dest="prices",
        action="append",
        default=[],
        metavar="[DEVICE=]PRICE",
        help="such as 0.05, or gpu=2.5; may be given for each device",
    )
    verb.add_argument("--cluster", default="", metavar="PROFILE", help="take prices from there")


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of an hour: `said` by device for all stages, and before them those of a profile."""

    said: dict[str, float] = field(default_factory=dict)
    profile: Profile | None = None

    @classmethod
    def of_options(cls, options: argparse.Namespace) -> Prices:
        """Of `price_options`. Raises UserError: no such profile, or a price that is none."""
        said = parse_prices(options.prices)
        if not options.cluster:
            return cls(said=said)
        from cluster.profile import load_profile

        try:
            return cls(said=said, profile=load_profile(options.cluster))
        except ValueError as error:
            raise UserError(f"--cluster: {error}") from error

    def of(self, device: str, stage: str, node_group: str) -> float | None:
        """What an hour of a stage's device costs; None if nobody has said.

        Args:
            node_group: that its recipe asks for; "" leaves it to the profile.

        Raises:
            UserError: the stage may be done on any node, and their prices differ.
        """
        if device in self.said or self.profile is None:
            return self.said.get(device)
        profile = self.profile
        if group := node_group or profile.stages.get(stage.partition("/")[0], ""):
            return profile.prices_per_device_hour_in(group).get(device)
        groups = [
            one.name
            for one in profile.node_groups
            if device != "gpu" or one.accelerators_per_node > 0
        ]
        found = {profile.prices_per_device_hour_in(one).get(device) for one in groups or [""]}
        if len(found) > 1:
            raise UserError(
                f"profile {profile.name}: {stage} may be done on any node, and the node groups "
                f"{', '.join(groups)} ask different prices for a {device}: name its group under "
                f"stages, or say which counts with --price-per-device-hour {device}=PRICE"
            )
        return found.pop()


def parse_prices(texts: Sequence[str]) -> dict[str, float]:
    """Prices of an hour by device from `0.05`, which is for all, and `gpu=2.5`.

    Raises:
        UserError: the device is unknown or the price is no number.
    """
    prices: dict[str, float] = {}
    for text in texts:
        device, separator, amount = text.rpartition("=")
        try:
            price = float(amount)
        except ValueError:
            price = -1.0
        if (separator and device not in DEVICES) or not 0 <= price < float("inf"):
            raise UserError(
                "--price-per-device-hour must be a price such as 0.05, or gpu=2.5 and cpu=0.04, "
                f"got {text!r}"
            )
        prices |= dict.fromkeys([device] if separator else DEVICES, price)
    return prices
