"""eDiff-I (arXiv 2211.01324): a text-to-image diffusion model as an ensemble of expert denoisers.

`ediffi.load(path)` opens an ensemble directory; everything else is imported from its module.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ediffi.generator import Generator


def load(path: str | Path, *, device: str = "cpu") -> Generator:
    """Open an ensemble directory for generating pictures.

    Raises:
        SnapshotError: the directory is incomplete or damaged; the message names the file.
    """
    from ediffi.generator import Generator

    return Generator(Path(path), device=device)
