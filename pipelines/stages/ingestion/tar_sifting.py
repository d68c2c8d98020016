"""Sifting one tar made elsewhere: what is fit, what is left out and why, and a copy of the fit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.stages.ingestion.adopted_samples import Judged, SampleLimits, is_namable, judge
from pipelines.stages.ingestion.rejects import Rejection, Tally

if TYPE_CHECKING:
    from ediffi.storage.tar_index import Members, Problem

SHARD_PROBLEMS = ("shard_empty", "shard_truncated", "shard_damaged")  # samples are beyond reach
MEMBER_UNNAMABLE = "member_unnamable:dropped"
_DUPLICATES = ("duplicate_key", "duplicate_member")  # of a sample that stays


@dataclass(frozen=True, kw_only=True)
class Fix:
    """What a fit sample needs: members to leave out, and a caption (b"": it has its own)."""

    dropped: tuple[str, ...] = ()
    caption: bytes = b""


SOUND = Fix()


@dataclass(frozen=True, kw_only=True)
class Sieve:
    """Judges the samples of one tar and counts what becomes of them."""

    place: str  # of the tar, for the report
    drop: Collection[str]  # keys that an earlier tar has
    limits: SampleLimits
    tally: Tally

    def count_problems(self, problems: Iterable[Problem]) -> bool:
        """Count what is wrong with the tar as a whole and with its members.

        A sample that is lost counts once, whatever befell its members. Of those that a cut or
        damage has put beyond reach only the tar itself can be counted; `check_budget` charges more.

        Returns:
            Whether samples may be beyond reach.
        """
        lost: set[str] = set()
        is_torn = False
        for problem in problems:
            found = Rejection(reason=problem.reason, message=problem.message)
            source = {"tar": self.place, "member": problem.name}
            is_torn = is_torn or problem.reason in SHARD_PROBLEMS
            if problem.key in lost:
                self.tally.note(problem.key, found, source)
            elif problem.key:
                if problem.reason not in _DUPLICATES:
                    lost.add(problem.key)
                self.tally.reject(problem.key, found, source)
            elif problem.reason in SHARD_PROBLEMS:
                self.tally.reject(self.place.rpartition("/")[2], found, source)
            else:  # of no sample: a link or an unsafe path that nobody would read
                dropped = Rejection(reason=f"{problem.reason}:dropped", message=problem.message)
                self.tally.flag(problem.name, dropped, source)
        return is_torn

    def judge(self, path: Path, samples: Mapping[str, Members]) -> dict[str, Fix]:
        """Count every sample; of the fit ones, in their order, what they need."""
        from ediffi.storage.tar_index import MappedTar

        fixes: dict[str, Fix] = {}
        if not samples:
            return fixes
        with closing(MappedTar(path)) as tar:
            for key, members in samples.items():
                judged = self._duplicate(key) or judge(tar, key, members, self.limits)
                if isinstance(judged, Rejection):
                    self.tally.reject(key, judged, self._source(key))
                    continue
                for extension, rejection in judged.dropped.items():
                    self.tally.flag(key, rejection, self._source(f"{key}.{extension}"))
                self.tally.keep(key, judged.caption, judged.picture)
                fixes[key] = _fix(judged)
        return fixes

    def write(
        self, path: Path, samples: Mapping[str, Members], fixes: Mapping[str, Fix], target: Path
    ) -> None:
        """Copy the fit samples, mended, to a tar of ours, which may stay empty."""
        from ediffi.shards import ShardWriter
        from ediffi.storage.tar_index import MappedTar

        with ShardWriter(target) as writer:
            if not fixes:
                return
            with closing(MappedTar(path)) as tar:
                for key, fix in fixes.items():
                    kept = {
                        name: tar.read(span)
                        for name, span in samples[key].items()
                        if name not in fix.dropped and self._can_name(key, name)
                    }
                    writer.write(key, {**kept, "txt": fix.caption} if fix.caption else kept)

    def _duplicate(self, key: str) -> Rejection | None:
        if key not in self.drop:
            return None
        return Rejection(reason="duplicate_key", message="an earlier tar has this key")

    def _can_name(self, key: str, extension: str) -> bool:
        """Whether a member can keep its name in the copy; if not, that is told."""
        if is_namable(key, extension):
            return True
        problem = f"member {key}.{extension}: too long for a tar of ours, or hidden from webdataset"
        dropped = Rejection(reason=MEMBER_UNNAMABLE, message=problem)
        self.tally.flag(key, dropped, self._source(f"{key}.{extension}"))
        return False

    def _source(self, member: str) -> dict[str, str]:
        return {"tar": self.place, "member": member}


def _fix(judged: Judged) -> Fix:
    if judged.is_sound:
        return SOUND
    caption = b"" if judged.has_caption_member else judged.caption
    return Fix(dropped=tuple(judged.dropped), caption=caption)
