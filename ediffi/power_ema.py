"""Power-function averages of the weights, and any width of them after training (EDM2, section 3).

The average at image T weighs the weights at image t by a profile p(t) = (g + 1) t^g / T^(g + 1).
Its width is its standard deviation relative to T, `std`: 0.05 is a short average, 0.10 a longer
one. Training keeps a few widths and stores them now and then; here the average of another width is
made of what was stored, by the linear combination whose profile comes nearest to the wanted one.

    power_ema/
        images-0000012800-std-0.05.safetensors    one stored average
        power_ema.json                            written last: images and width of each, sha256

Images are those that the run itself had seen. `images_before` says how old the average was when the
run began: not zero where an expert carries on its parent's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ediffi.snapshot import SnapshotError, errors_name, publish_json, read_json, verify_sha256

FOLDER_NAME = "power_ema"
RECORD_NAME = "power_ema.json"
FORMAT = 1
LARGEST_STD = 12**-0.5  # of the plain mean, g = 0; a wider profile would have to favour the start


# -- profiles -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """Which weights an average is made of: power `gamma`, up to the image `end_images`."""

    gamma: float
    end_images: float


def gamma_of(std: float) -> float:
    """Power g of the profile with relative width `std`: (g + 1) = std^2 (g + 2)^2 (g + 3).

    Raises:
        ValueError: `std` is not between 0 and 1 / sqrt(12).
    """
    if not 0 < std < LARGEST_STD:
        raise ValueError(f"std must lie between 0 and {LARGEST_STD:.4f}, got {std}")
    roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
    return float(roots.real.max())  # three real ones for these widths; only this is positive


def decay(gamma: float, end_images: float, batch_images: float) -> float:
    """What an average keeps of itself in a step that ends at `end_images`; nothing in the first.

    The product of these telescopes: the weights of a step that went from a to b enter with the
    integral of the profile from a to b, exactly.
    """
    return float((1 - batch_images / end_images) ** (gamma + 1))


def combination(stored: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Coefficients of the stored averages that come nearest to the wanted one.

    They minimise the integral of the squared difference of profiles, in closed form, and add up to
    one: whatever the weights have in common over time is kept exactly. EDM2 leaves this condition
    out; with few stored averages it is worth a factor of ten.

    Returns:
        One coefficient per stored profile, and the 2-norm of the difference that is left, relative
        to the wanted profile's.
    """
    if wanted in stored:
        return np.array([float(one == wanted) for one in stored]), 0.0
    products = _inner_products(stored, stored)
    with_wanted = _inner_products(stored, [wanted])[:, 0]
    own = float(_inner_products([wanted], [wanted])[0, 0])
    norms = np.sqrt(np.diag(products))
    num = len(stored)
    system = np.zeros((num + 1, num + 1))  # scaled to a unit diagonal; the multiplier comes last
    system[:num, :num] = products / norms / norms[:, None]
    system[:num, num] = system[num, :num] = norms.min() / norms
    right = np.append(with_wanted / norms, norms.min())
    coefficients = np.linalg.lstsq(system, right, rcond=None)[0][:num] / norms
    left = own - 2 * coefficients @ with_wanted + coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(0.0, left) / own))


def _inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> NDArray[np.float64]:
    """Integrals of p_a(t) p_b(t) over all t; written in ratios, as powers of images overflow."""
    gamma_a, end_a = np.array([[one.gamma, one.end_images] for one in a]).T[:, :, None]
    gamma_b, end_b = np.array([[one.gamma, one.end_images] for one in b]).T[:, None, :]
    shared = np.minimum(end_a, end_b)
    height = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / shared
    return np.asarray(
        height * (shared / end_a) ** (gamma_a + 1) * (shared / end_b) ** (gamma_b + 1)
    )


# -- stored averages ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StoredAverage:
    """One file: the average of width `std` when the run had seen `images`."""

    images: int
    std: float
    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PowerRecord:
    """Everything `power_ema.json` says."""

    images_before: int = 0  # age of the averages when the run began
    averages: tuple[StoredAverage, ...]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the record of a `power_ema` folder; SnapshotError if absent or damaged."""
        path = directory / RECORD_NAME
        record = read_json(path, FORMAT)
        with errors_name(path):
            averages = tuple(StoredAverage(**one) for one in record["averages"])
            if not averages:
                raise ValueError("it names no average")
            return cls(images_before=record["images_before"], averages=averages)

    def write(self, directory: Path) -> None:
        """Write the record; the files it names are there already."""
        publish_json(directory / RECORD_NAME, {"format": FORMAT, **asdict(self)})

    def profile(self, images: int, std: float) -> Profile:
        """Profile of the average of width `std` when the run had seen `images`."""
        return Profile(gamma_of(std), self.images_before + images)

    @property
    def times(self) -> list[int]:
        """Images seen at which averages were stored, in order."""
        return sorted({one.images for one in self.averages})


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """An average made after training."""

    state: Mapping[str, Tensor]  # float32, by parameter name
    images: int
    num_stored: int  # averages that it was made of
    profile_error: float  # 2-norm of what is missing of its profile, relative to the profile


def reconstruct(directory: Path, record: PowerRecord, *, std: float, images: int) -> Reconstruction:
    """Make the average of width `std` as it would have been after `images`.

    A width that was tracked comes back bit for bit. Averages stored later than `images` are left
    out. One parameter of all files is in memory at a time.

    Args:
        directory: the folder with the files.
        record: what is in it.
        std: relative width, between 0 and 1 / sqrt(12).
        images: one of `record.times`.

    Raises:
        ValueError: nothing was stored at `images`, or `std` is out of range.
        SnapshotError: a file is missing or damaged.
    """
    if images not in record.times:
        known = ", ".join(map(str, record.times))
        raise ValueError(f"no average was stored at {images} images: choose one of {known}")
    sources = [one for one in record.averages if one.images <= images]
    stored = [record.profile(one.images, one.std) for one in sources]
    coefficients, error = combination(stored, record.profile(images, std))
    used = [(one, float(c)) for one, c in zip(sources, coefficients) if c]
    for one, _ in used:
        verify_sha256(directory / one.file, one.sha256)
    state = dict(_combined([(directory / one.file, c) for one, c in used]))
    return Reconstruction(state=state, images=images, num_stored=len(used), profile_error=error)


def _combined(files: Sequence[tuple[Path, float]]) -> Iterator[tuple[str, Tensor]]:
    """Linear combination of safetensors files, one tensor after the other, summed in float64."""
    try:
        with ExitStack() as stack:
            opened = [(stack.enter_context(safe_open(path, "pt")), c) for path, c in files]
            newest, _ = opened[-1]
            for name in newest.keys():  # noqa: SIM118 (not a mapping)
                newest_tensor = newest.get_tensor(name)
                if len(opened) == 1 or not newest_tensor.is_floating_point():
                    yield name, newest_tensor
                    continue
                total = torch.zeros_like(newest_tensor, dtype=torch.float64)
                for file, coefficient in opened:
                    total.add_(file.get_tensor(name), alpha=coefficient)
                yield name, total.to(newest_tensor.dtype)
    except SafetensorError as error:
        raise SnapshotError(f"{files[-1][0].parent}: {error}") from error
