"""What an earlier attempt at a shard has settled, so that only the rest is asked for again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipelines.stage import File, Unit, Workspace
from pipelines.stages.ingestion.fetch import PASSING_REASONS
from pipelines.stages.ingestion.rejects import REPORTS_FOLDER, Rejection, read_report
from pipelines.store.fingerprint import file_sha256

if TYPE_CHECKING:
    from ediffi.storage.tar_index import MappedTar, Members


@dataclass
class EarlierShard:
    """The samples of a unit's previous receipt, and its rejections that do not pass.

    Without one, or if it is of other rows or settings or its files are damaged, it has settled
    nothing. Use it in a `with` block.
    """

    rejections: dict[str, Rejection] = field(default_factory=dict)
    samples: dict[str, Members] = field(default_factory=dict)
    tar: MappedTar | None = None

    @classmethod
    def of(cls, unit: Unit, workspace: Workspace) -> Self:
        """Open what `workspace.previous` names."""
        previous = workspace.previous
        if previous is None or previous.key != unit.key:
            return cls()
        names = (f"{unit.id}.tar", f"{REPORTS_FOLDER}/{unit.id}.jsonl")
        files = {file.path: _local_copy(file, workspace) for file in previous.files}
        tar_path, report_path = (files.get(name) for name in names)
        if tar_path is None or (previous.rejects and report_path is None):
            return cls()
        from ediffi.storage.tar_index import MappedTar

        tar = MappedTar(tar_path)
        rejections = read_report(report_path) if report_path else {}
        settled = {
            key: rejection
            for key, rejection in rejections.items()
            if not PASSING_REASONS.fullmatch(rejection.reason)
        }
        return cls(rejections=settled, samples=tar.index(), tar=tar)

    def settled(self, key: str) -> dict[str, bytes] | Rejection | None:
        """The members of a sample, or why it is none; None if it is to be fetched."""
        if self.tar is not None and key in self.samples:
            return {name: self.tar.read(span) for name, span in self.samples[key].items()}
        return self.rejections.get(key)

    def has_settled(self, key: str) -> bool:
        return key in self.samples or key in self.rejections

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.tar is not None:
            self.tar.close()


def _local_copy(file: File, workspace: Workspace) -> Path | None:
    """A file of the previous receipt on this machine; None if it is gone or damaged."""
    place = workspace.previous_path(file)
    if isinstance(place, Path):
        path = place
    else:
        path = workspace.scratch / f"earlier-{Path(file.path).name}"
        if place.exists():
            place.fs.get_file(place.path, str(path))
    if not path.is_file() or file_sha256(path) != file.sha256:
        return None
    return path
