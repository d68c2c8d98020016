"""Ingest of webdataset tars made elsewhere: verified, and left where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipelines.errors import UserError
from pipelines.stage import File, Json, Manifest, Outcome, Receipt, Unit, Workspace
from pipelines.stages.ingestion.adopted_samples import SampleLimits
from pipelines.stages.ingestion.duplicate_keys import KEYS_FOLDER, find_duplicates, write_keys
from pipelines.stages.ingestion.picture_files import max_bytes_of
from pipelines.stages.ingestion.rejects import Tally, check_budget
from pipelines.stages.ingestion.source_files import TarSource, find_tars, version_of
from pipelines.stages.ingestion.source_list import SPLITS
from pipelines.stages.ingestion.tar_sifting import SOUND, Sieve
from pipelines.store.fingerprint import canonical, file_sha256, unit_key
from pipelines.store.location import Location, location

if TYPE_CHECKING:
    from pipelines.recipe import ReadyShards


@dataclass(frozen=True, kw_only=True)
class AdoptShards:
    """Verify webdataset tars made elsewhere. Sound ones stay where they lie, nothing is copied.

    A tar with anything that no later stage could use is copied without it: whole samples are
    salvaged from torn tars, and captions that stand only in JSON members become `.txt` members.
    A key that an earlier tar has is left out of the later one, which is done again for it.
    """

    config: ReadyShards

    name: ClassVar[str] = "ingest"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ()
    gang: ClassVar[bool] = False

    def identity(self) -> Json:
        """Place, size and time (or tag) of every tar: reading them would be the stage's work."""
        tars = {split: find_tars(pattern) for split, pattern in self._patterns.items()}
        return {
            "source": "shards",
            **self._limits_identity(),
            **{
                split: {
                    "num_tars": len(found),
                    "num_bytes": sum(tar.num_bytes for tar in found),
                    "sha256": _digest(found),
                }
                for split, found in tars.items()
            },
        }

    def plan(self, inputs: Mapping[str, Manifest]) -> Iterable[Unit]:
        """One unit per tar. Raises UserError for a pattern that matches none."""
        tars = {split: find_tars(pattern) for split, pattern in self._patterns.items()}
        for split, found in tars.items():
            if not found:
                raise UserError(f"data.{split}: no .tar file matches {self._patterns[split]}")
        return self._units(tars)

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Read one tar through. Raises UserError if it is gone or another one by now."""
        from ediffi.storage.tar_index import salvage, write_index

        scratch, place, tally = workspace.scratch, unit.arguments["place"], Tally()
        path = _local_copy(unit, scratch)
        salvaged = salvage(path)
        sieve = Sieve(
            place=place, drop=set(unit.arguments["drop"]), limits=self._limits, tally=tally
        )
        is_torn = sieve.count_problems(salvaged.problems)
        fixes = sieve.judge(path, salvaged.samples)
        is_sound = not salvaged.problems and all(
            fixes.get(key) == SOUND for key in salvaged.samples
        )
        tar_path = path if is_sound else scratch / f"{unit.id}.tar"
        if not is_sound:
            sieve.write(path, salvaged.samples, fixes, tar_path)
        index_name, keys_name = f"{unit.id}.index.json", f"{KEYS_FOLDER}/{unit.id}.u64"
        write_index(tar_path, scratch / index_name)
        write_keys(fixes, scratch / keys_name)
        ours = () if is_sound else (tar_path.name,)
        source = {name: unit.arguments[name] for name in ("place", "version", "drop")}
        return tally.outcome(
            unit,
            files=(*ours, index_name, keys_name, *tally.write_report(unit, scratch)),
            adopted=(_adopted(place, path),) if is_sound else (),
            facts={"is_torn": is_torn, "source": source},
        )

    def check(self, receipts: Iterable[Receipt]) -> None:
        """Raise StageFailed if too many samples were rejected, see `check_budget`."""
        check_budget(receipts, self.config.max_rejects_fraction)

    def amend(self, receipts: Iterable[Receipt], directory: Location) -> list[Unit]:
        """Units to do again without keys that an earlier unit has; none once they are done."""
        units, num_keys = [], 0
        for receipt in receipts:
            units.append((receipt.unit, receipt.facts["split"], receipt.facts["source"]))
            num_keys += receipt.num_out
        duplicates = find_duplicates(directory, [unit for unit, _, _ in units], num_keys)
        again = []
        for index, keys in duplicates.items():
            unit_id, split, source = units[index]
            again.append(self._unit(unit_id, split, {**source, "drop": [*source["drop"], *keys]}))
        return again

    # -- units ------------------------------------------------------------------------------------

    @property
    def _patterns(self) -> dict[str, str]:
        patterns = {split: getattr(self.config, split) for split in SPLITS}
        return {split: pattern for split, pattern in patterns.items() if pattern}

    def _units(self, tars: Mapping[str, list[TarSource]]) -> Iterator[Unit]:
        for split, found in tars.items():
            for index, tar in enumerate(found):
                source = {"place": tar.place, "version": tar.version, "drop": []}
                yield self._unit(f"{split.replace('_', '-')}-{index:05d}", split, source)

    def _unit(self, unit_id: str, split: str, source: Mapping[str, Json]) -> Unit:
        settings = {"source": "shards", "version": self.version, **self._limits_identity()}
        return Unit(
            id=unit_id,
            arguments={"split": split, **source},
            key=unit_key(
                settings, tar=[source["place"], source["version"]], duplicates=source["drop"]
            ),
        )

    def _limits_identity(self) -> dict[str, Json]:
        names = ("max_pixels", "max_picture_mib", "max_caption_characters")
        return {name: getattr(self.config, name) for name in names}

    @property
    def _limits(self) -> SampleLimits:
        return SampleLimits(
            max_picture_bytes=max_bytes_of(self.config.max_picture_mib),
            max_pixels=self.config.max_pixels,
            max_caption_characters=self.config.max_caption_characters,
        )


def _adopted(place: str, path: Path) -> File:
    return File(path=place, sha256=file_sha256(path), num_bytes=path.stat().st_size)


def _digest(tars: Iterable[TarSource]) -> str:
    lines = ((tar.place, tar.version) for tar in tars)
    return hashlib.sha256(canonical(list(lines))).hexdigest()


def _local_copy(unit: Unit, scratch: Path) -> Path:
    """The tar on this machine: where it lies, or a copy in scratch.

    Raises:
        UserError: it is gone, or no longer the one that was planned.
    """
    field, place = f"data.{unit.arguments['split']}", location(unit.arguments["place"])
    try:
        version = version_of(place)
        if version != unit.arguments["version"]:
            raise UserError(
                f"{field}: {place} has changed since this run began (size and time or tag were "
                f"{unit.arguments['version']}, are {version}); run again"
            )
        if isinstance(place, Path):
            with place.open("rb"):
                return place
        path = scratch / "source.tar"
        place.fs.get_file(place.path, str(path))
        return path
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{field}: cannot read {place}: {error}") from error
