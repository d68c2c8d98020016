"""Keeping the tracked power-function averages while training, and the result made of them.

They lie beside the checkpoints, which resume cannot do without them:

    power_ema/
        images-0000012800-std-0.05.safetensors
        images-0000012800.json    written last of what was stored then: sha256 by width

A run that goes on from a checkpoint first forgets what was stored after it. See `ediffi.power_ema`
for the folder that is published with the snapshot.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ediffi.power_ema import FOLDER_NAME, PowerRecord, StoredAverage, reconstruct
from ediffi.snapshot import file_sha256, publish, publish_json, read_json
from ediffi.train.config import TrainConfig
from ediffi.train.ema import HALF_LIFE_KIND, power_kind
from ediffi.train.engine import Worker

_FORMAT = 1

Whole = Callable[
    [str], Mapping[str, Tensor]
]  # kind of average -> whole tensors by name, collective


class PowerSnapshots:
    """Stored averages of one run; with profile `half_life` there are none, and nothing happens.

    Every method is called by all ranks together; rank 0 writes.

    Args:
        directory: on storage that all ranks share; made when something is stored.
        config: of the run.
        worker: this process.
        images_before: as `Averages` has it.
    """

    def __init__(
        self, directory: Path, config: TrainConfig, worker: Worker, *, images_before: int = 0
    ) -> None:
        self.directory = directory
        self._config = config
        self._writes = worker.rank == 0
        self._images_before = images_before
        self._stds = config.ema_track_stds if config.ema_profile == "power" else ()

    def is_due(self, images_seen: int) -> bool:
        """Whether the batch that ends at `images_seen` crossed `ema_snapshot_images`.

        Not at the very end: `result` stores those.
        """
        if not self._stds or images_seen >= self._config.final_images:
            return False
        return self._config.crosses(images_seen, self._config.ema_snapshot_images)

    def store(self, images_seen: int, whole: Whole) -> None:
        """Keep all tracked averages. A checkpoint of the same image must be saved afterwards."""
        digests = {}
        for std in self._stds:
            state = whole(power_kind(std))  # one at a time: they are as large as the network
            if self._writes:
                digests[f"{std!r}"] = self._write(state, images_seen, std)
        if digests:
            record = {"format": _FORMAT, "images": images_seen, "sha256": digests}
            publish_json(self._record_path(images_seen), record)

    def forget_after(self, images_seen: int) -> None:
        """Remove what was stored later: the run goes on from `images_seen`, perhaps otherwise."""
        if not self._writes:
            return
        for path in self.directory.glob("images-*.json"):  # the record first, then what it names
            if _images_of(path) > images_seen:
                path.unlink()
        for path in self.directory.glob("images-*-std-*"):
            if not self._record_path(_images_of(path)).exists():
                path.unlink()

    def result(self, images_seen: int, whole: Whole, snapshot_path: Path) -> Mapping[str, Tensor]:
        """Finish: the averaged weights that are the run's result.

        With profile `power`, the averages of the end are stored and all are published in
        `snapshot_path / "power_ema"`; the result has the width `ema_std`, a tracked one as it is,
        another one reconstructed. Only rank 0 may rely on what is returned.

        Raises:
            ValueError: a stored average is missing or damaged.
        """
        if not self._stds:
            return whole(HALF_LIFE_KIND)
        self.store(images_seen, whole)
        if not self._writes:
            return {}
        folder = snapshot_path / FOLDER_NAME
        record = self._publish(folder)
        std = self._config.ema_std
        return reconstruct(folder, record, std=std, images=images_seen).state

    def _write(self, state: Mapping[str, Tensor], images_seen: int, std: float) -> str:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / _file_name(images_seen, std)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        publish(path, lambda aside: save_file(tensors, aside))
        return file_sha256(path)

    def _publish(self, folder: Path) -> PowerRecord:
        """Link or copy all files into `folder`, and write the record that names them."""
        averages = []
        for path in sorted(self.directory.glob("images-*.json")):
            record = read_json(path, _FORMAT)
            averages += [
                StoredAverage(
                    images=record["images"],
                    std=float(std),
                    file=_file_name(record["images"], float(std)),
                    sha256=sha256,
                )
                for std, sha256 in record["sha256"].items()
            ]
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for one in averages:
            link_or_copy(self.directory / one.file, folder / one.file)
        published = PowerRecord(images_before=self._images_before, averages=tuple(averages))
        published.write(folder)
        return published

    def _record_path(self, images_seen: int) -> Path:
        return self.directory / f"images-{images_seen:010d}.json"


def _file_name(images_seen: int, std: float) -> str:
    return f"images-{images_seen:010d}-std-{std!r}.safetensors"


def _images_of(path: Path) -> int:
    """Images seen, out of the name of a file of `PowerSnapshots`."""
    return int(path.name.split("-")[1].removesuffix(".json"))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; across file systems, copy it."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
