"""Everything that one training run depends on, in one record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ediffi.network import NetworkConfig
from ediffi.noise import WHOLE, NoiseInterval, SigmaDistribution
from ediffi.preconditioning import Preconditioning
from ediffi.shards import Missing, Resize, ShardRef
from ediffi.train.config import TrainConfig

if TYPE_CHECKING:
    from ediffi.degradation import LowRes
    from ediffi.train.held_out import GridConfig
    from ediffi.train.start import Start


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training run: of the base, an expert, or a super-resolution model.

    All paths lie on storage that every rank shares.
    """

    network: NetworkConfig
    preconditioning: Preconditioning
    distribution: SigmaDistribution
    interval: NoiseInterval = WHOLE  # what it trains on
    serves: NoiseInterval | None = None  # what the result is for; None: all that it trains on
    config: TrainConfig
    shards: tuple[ShardRef, ...]
    held_out: tuple[ShardRef, ...] = ()  # for `config.held_out_images` and `config.grid_images`
    resize: Resize = "center_crop"
    missing: Missing = "error"  # what to do with a picture that lacks an embedding
    picture_px: int = 0  # side at which pictures are read; more than the network's: patches are cut
    low_res: LowRes | None = None  # how a super-resolution model's input is made of the picture
    start: Start | None = None  # the parent; None: random weights
    base: Path | None = None  # snapshot that answers where this run does not; None: the parent
    grid: GridConfig | None = None  # how pictures are drawn while training
    checkpoint_path: Path  # resumable state
    snapshot_path: Path  # the result: averaged weights
    grid_path: Path | None = None  # where the grids go

    @property
    def read_px(self) -> int:
        """Side of the square pictures as they are read."""
        return self.picture_px or self.network.image_px
