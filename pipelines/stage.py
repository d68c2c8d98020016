"""What a stage is: a `plan` that lists units of work and an idempotent `run(unit)`.

A stage knows nothing of Ray, retries, skipping or MLflow; the runner knows nothing of pictures.
Between them travel four records: `Unit` (what to do), `Outcome` (what a stage says it did),
`Receipt` (the published proof of it) and `Manifest` (a finished stage and all its receipts).

What a receipt or manifest says of the work itself is a function of the inputs; what varies from
run to run (seconds, attempts, hosts, run ids) is kept apart, so that equal work gives equal bytes.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipelines.errors import Damaged
from pipelines.store.location import Location, location, read_text

Json = Any  # what json.loads gives back

RECEIPTS_FILE = "receipts.jsonl"  # of a finished stage, in the order of its units
_FOLDERS: dict[str, Path] = {}  # fetched by this process; gone when it ends
_place_of_folders: Path | None = None  # None: where temporary files go
CIRCUMSTANCES_FILE = "made.json"  # who made a finished stage, when and how long it took
_CIRCUMSTANCES = ("timings", "seconds", "attempt", "host", "taken_from", "reason")


def keep_folders_in(place: Path) -> None:
    """Where this process puts its copies of published folders: it may be killed, and leave them."""
    global _place_of_folders
    _place_of_folders = place


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The smallest thing worth redoing: one shard, one expert, one batch of prompts.

    `key` names everything that decides the unit's bytes, see `store.fingerprint.unit_key`. A
    receipt with the same key is taken over from an earlier fingerprint of the stage, and one with
    another key is done again. Without a key, a unit belongs to its fingerprint alone and is done
    again whenever the contents of the stage's inputs change.
    """

    id: str
    arguments: Mapping[str, Json] = field(default_factory=dict)
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class File:
    """One published file: `path` is relative to the stage directory, or an adopted one's place."""

    path: str
    sha256: str
    num_bytes: int

    @property
    def is_adopted(self) -> bool:
        """Whether it lies where somebody else put it."""
        return is_adopted(self.path)

    def place(self, directory: Location) -> Location:
        """Where it lies, for a stage in `directory`."""
        return location(self.path) if "://" in self.path else directory / self.path


def is_adopted(path: str) -> bool:
    """Whether a file of a receipt lies where somebody else put it."""
    return path.startswith("/") or "://" in path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `Stage.run` reports; the files it names lie in the workspace's scratch directory."""

    files: Sequence[str] = ()
    adopted: Sequence[File] = ()
    num_in: int = 0
    num_out: int = 0
    rejects: Mapping[str, Sequence[str]] = field(default_factory=dict)  # reason -> keys left out
    flagged: Mapping[str, Sequence[str]] = field(default_factory=dict)  # reason -> keys kept
    facts: Mapping[str, Json] = field(default_factory=dict)  # equal inputs, equal facts
    timings: Mapping[str, float] = field(default_factory=dict)  # may differ from run to run


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Proof that one unit is done: counts, rejects by reason, and the digest of every file."""

    unit: str
    key: str = ""
    files: tuple[File, ...]
    num_in: int
    num_out: int
    rejects: Mapping[str, Sequence[str]]
    flagged: Mapping[str, Sequence[str]] = field(default_factory=dict)
    facts: Mapping[str, Json]
    timings: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    attempt: int = 1
    host: str = ""
    taken_from: str = ""  # the earlier fingerprint whose files these are
    reason: str = ""  # why the unit was done, where another receipt of it was at hand

    def to_json(self) -> Json:
        return asdict(self)

    def proof(self) -> Json:
        """What does not vary from run to run."""
        return {name: value for name, value in asdict(self).items() if name not in _CIRCUMSTANCES}

    @classmethod
    def from_json(cls, data: Json) -> Receipt:
        return cls(**{**data, "files": tuple(File(**file) for file in data["files"])})


@dataclass(frozen=True)
class ReceiptFile:
    """The receipts of a finished stage, read anew each time they are walked through.

    They hold no circumstances; `Manifest.receipt` reads one that does.
    """

    path: Location

    def __iter__(self) -> Iterator[Receipt]:
        """Raises Damaged where a line is no receipt, or the file is gone."""
        try:
            stream = self.path.open()
        except FileNotFoundError as error:
            raise self._damaged("the receipts of a finished stage must be there") from error
        with stream:
            for number, line in enumerate(stream, start=1):
                try:
                    receipt = Receipt.from_json(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise self._damaged(
                        f"line {number} must be the receipt of a unit, found something else "
                        f"({type(error).__name__}: {error})"
                    ) from error
                yield receipt

    def _damaged(self, why: str) -> Damaged:
        return Damaged(
            f"{self.path}: {why}; `ediffi cache repair` gathers them again from those of each unit"
        )


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over all units of a stage."""

    num_units: int = 0
    num_in: int = 0
    num_out: int = 0
    num_bytes: int = 0
    rejects: Mapping[str, int] = field(default_factory=dict)  # reason -> samples left out
    flagged: Mapping[str, int] = field(default_factory=dict)  # reason -> samples kept

    def plus(self, receipt: Receipt) -> Totals:
        return Totals(
            num_units=self.num_units + 1,
            num_in=self.num_in + receipt.num_in,
            num_out=self.num_out + receipt.num_out,
            num_bytes=self.num_bytes + sum(file.num_bytes for file in receipt.files),
            rejects=_add_counts(self.rejects, receipt.rejects),
            flagged=_add_counts(self.flagged, receipt.flagged),
        )


def _add_counts(counts: Mapping[str, int], keys: Mapping[str, Sequence[str]]) -> Mapping[str, int]:
    if not keys:
        return counts
    return dict(Counter(counts) + Counter({why: len(names) for why, names in keys.items()}))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished stage. The file exists if and only if every unit has its receipt.

    The manifest itself is small whatever the number of units; their receipts lie beside it.
    """

    stage: str
    fingerprint: str
    directory: Location
    identity: Json
    inputs: Mapping[str, str]  # stage -> fingerprint
    input_contents: Mapping[str, str]  # stage -> its `contents` when this one was made
    contents: str  # digest of all receipts: changes when a unit was done again with other bytes
    totals: Totals
    run_id: str
    created: str
    seconds: float  # of all units, one after another
    timings: Mapping[str, float]  # summed over units; fractions averaged

    @property
    def receipts(self) -> Iterable[Receipt]:
        """All receipts, in the order of the units; without circumstances."""
        return ReceiptFile(self.directory / RECEIPTS_FILE)

    def local_folder(self, name: str) -> Path:
        """A published folder on this machine: itself, or verified copies until the process ends."""
        if isinstance(self.directory, Path):
            return self.directory / name
        address = f"{self.directory}/{name}?{self.contents}"
        if address not in _FOLDERS or not _FOLDERS[address].exists():
            _FOLDERS[address] = self._fetch_folder(name)
        return _FOLDERS[address]

    def _fetch_folder(self, name: str) -> Path:
        if _place_of_folders is not None:
            _place_of_folders.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="ediffi-folder-", dir=_place_of_folders))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for receipt in self.receipts:
            for file in receipt.files:
                if file.path.startswith(f"{name}/"):
                    target = folder / file.path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.local_path(file), target)
        return folder / name

    @property
    def num_units(self) -> int:
        return self.totals.num_units

    def receipt(self, unit: str) -> Receipt:
        """One unit's receipt, circumstances included, without reading the others."""
        path = self.directory / "receipts" / f"{unit}.json"
        return Receipt.from_json(json.loads(path.read_text()))

    def path(self, file: File) -> Location:
        """Where a file of this stage lies (adopted files keep their own place)."""
        return file.place(self.directory)

    def location(self, file: File) -> str:
        """Absolute path or URL of a file of this stage."""
        return str(self.path(file))

    def local_path(self, file: File) -> Path:
        """The file on this machine: where it lies, or a verified copy in the local cache."""
        path = self.path(file)
        if isinstance(path, Path):
            return path
        from ediffi.storage.local_cache import LocalCache

        return LocalCache.default().fetch(str(path), sha256=file.sha256, num_bytes=file.num_bytes)

    def to_json(self) -> Json:
        """The manifest file: nothing in it varies from run to run."""
        document = {
            name: value
            for name, value in vars(self).items()
            if name not in {"directory", "run_id", "created", "seconds", "timings"}
        }
        return {"format": 2, **document, "totals": asdict(self.totals)}

    def circumstances(self) -> Json:
        """The file beside it: who made it, when, how long it took."""
        names = ("run_id", "created", "seconds", "timings")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def load(cls, directory: Location) -> Manifest:
        """Read `directory/manifest.json`.

        Raises:
            FileNotFoundError: the stage is unfinished.
            Damaged: another version of ediffi wrote it, or it is half there.
        """
        path = directory / "manifest.json"
        text = read_text(path)
        try:
            data = json.loads(text)
            if (found := data.pop("format", None)) != 2:
                raise Damaged(
                    f"{path}: format must be 2, found {found!r}: made by another version of "
                    "ediffi; use that one, or another store"
                )
            made = json.loads(read_text(directory / CIRCUMSTANCES_FILE))
            totals = Totals(**data.pop("totals"))
            return cls(directory=directory, totals=totals, **data, **made)
        except Damaged:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            raise Damaged(
                f"{path}, or {CIRCUMSTANCES_FILE} beside it: damaged: {type(error).__name__}: "
                f"{error}; `ediffi cache repair` makes it again from the receipts of its units"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Where one attempt at a unit works, and what it may see."""

    scratch: Path  # fresh; files named in the outcome are published from here, the rest vanishes
    durable: Path  # survives attempts and drivers: checkpoints, progress
    inputs: Mapping[str, Manifest]
    attempt: int = 1
    device: str = "cpu"  # "cuda" where the recipe gives the stage GPUs
    rank: int = 0
    world_size: int = 1
    previous: Receipt | None = None  # of this unit, when it is retried; its files are in place
    directory: Location = Path()  # of the stage: where the previous files lie
    report: Callable[[Mapping[str, float]], None] = lambda row: None
    notice: Callable[[str], None] = lambda text: None  # words for people, told once
    should_stop: Callable[[], bool] = lambda: False  # cheap: training asks after every batch

    def previous_path(self, file: File) -> Location:
        """Where a file of the previous receipt lies."""
        return file.place(self.directory)


class Stage(Protocol):
    """One step of the pipeline. Implementations are frozen dataclasses, one file each."""

    @property
    def name(self) -> str:
        """Name of the stage, also its folder in the store, such as `embed/t5`."""

    @property
    def version(self) -> int:
        """Bumped when equal inputs would give different bytes."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages whose manifests this one reads."""

    @property
    def gang(self) -> bool:
        """Whether a unit can be done by several workers together under torch.distributed."""

    def identity(self) -> Json:
        """Every configured value that can change bytes; hashed into the fingerprint."""

    def plan(self, inputs: Mapping[str, Manifest]) -> Iterable[Unit]:
        """List the work, always in the same order; do none of it."""

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Do one unit. Safe to run again after a crash; same bytes every time."""
