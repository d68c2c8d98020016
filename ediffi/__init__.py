"""eDiff-I (arXiv 2211.01324): a text-to-image diffusion model as an ensemble of expert denoisers.

`ediffi.load(path)` opens an ensemble directory; everything else is imported from its module.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ediffi.ensemble import Blend
    from ediffi.generator import Generator
    from ediffi.residency import Residency


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    residency: Residency | None = None,
    missing_experts: Literal["error", "base"] = "error",
    blend: Blend | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Generator:
    """Open an ensemble directory for generating pictures.

    Args:
        path: the directory.
        device: where the networks run, such as cuda.
        residency: when experts are loaded, and how many stay on the device. None: all at once,
            and all of them.
        missing_experts: `base` lets the base stand in for experts whose files are absent.
        blend: None sends each network call to one expert, as the paper does; see
            `ediffi.ensemble.Blend` for the average of all.
        precision: of the networks; `bf16` computes as training in bf16 does.

    Raises:
        SnapshotError: the directory is incomplete or damaged; the message names the file.
    """
    from ediffi.ensemble import Blend
    from ediffi.generator import Generator
    from ediffi.residency import Residency

    return Generator(
        Path(path),
        device=device,
        residency=residency or Residency(),
        missing_experts=missing_experts,
        blend=blend or Blend(),
        precision=precision,
    )
