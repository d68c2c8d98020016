"""Rejected samples: why, how many, where to read of them, and how many are too many."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pipelines.errors import StageFailed
from pipelines.stage import File, Json, Outcome, Receipt, Unit
from pipelines.stages.ingestion.shard_digests import ShardDigests

if TYPE_CHECKING:
    from ediffi.shards import ImageError

NUM_MESSAGES = 3  # kept in a receipt, per reason
MAX_MESSAGE_CHARACTERS = 300
NUM_KEYS_SHOWN = 3  # per reason, in the report of a failed stage
REPORTS_FOLDER = "rejects"  # a file for each unit that has something to report


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Why a row or a member of a tar does not become a sample."""

    reason: str
    message: str = ""

    @classmethod
    def of_image(cls, error: ImageError) -> Self:
        """For a picture that cannot be decoded."""
        # PIL names its input by memory address, which would differ in every run.
        return cls(reason=error.reason, message=error.detail.partition(" <_io.")[0])


@dataclass
class Tally:
    """What became of the samples of one unit.

    A receipt has the rejected keys by reason and a few messages. Every single one, with its
    message and its origin, is a line of `rejects/UNIT.jsonl`: `key`, `reason`, `message`, `source`.
    """

    num_in: int = 0
    num_out: int = 0
    rejects: dict[str, list[str]] = field(default_factory=dict)
    flagged: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    digests: ShardDigests = field(default_factory=ShardDigests)
    report: list[dict[str, Json]] = field(default_factory=list)

    def keep(self, key: str, caption: bytes, picture: bytes) -> None:
        """Count a sample that is written, with the bytes that later stages read of it."""
        self.num_in += 1
        self.num_out += 1
        self.digests.add(key, caption, picture)

    def reject(self, key: str, rejection: Rejection, source: Mapping[str, Json]) -> None:
        """Count a sample that is left out; `source` says where it was found."""
        self.num_in += 1
        self.rejects.setdefault(rejection.reason, []).append(key)
        self.note(key, rejection, source)

    def flag(self, key: str, rejection: Rejection, source: Mapping[str, Json]) -> None:
        """Note what was mended or dropped without losing a sample."""
        keys = self.flagged.setdefault(rejection.reason, [])
        if key not in keys[-1:]:  # several members of one sample
            keys.append(key)
        self.note(key, rejection, source)

    def note(self, key: str, rejection: Rejection, source: Mapping[str, Json]) -> None:
        """Put a line into the report, and the first few of a reason into the receipt."""
        told = {"key": key, "reason": rejection.reason, "message": rejection.message}
        self.report.append({**told, "source": dict(source)})
        messages = self.errors.setdefault(rejection.reason, [])
        if rejection.message and len(messages) < NUM_MESSAGES:
            messages.append(f"{key}: {rejection.message}"[:MAX_MESSAGE_CHARACTERS])

    def write_report(self, unit: Unit, scratch: Path) -> list[str]:
        """Write `rejects/UNIT.jsonl`; its name, or none if there is nothing to tell."""
        if not self.report:
            return []
        name = f"{REPORTS_FOLDER}/{unit.id}.jsonl"
        (scratch / REPORTS_FOLDER).mkdir(exist_ok=True)
        lines = (json.dumps(line, sort_keys=True) + "\n" for line in self.report)
        (scratch / name).write_text("".join(lines))
        return [name]

    def outcome(
        self,
        unit: Unit,
        *,
        files: Sequence[str] = (),
        adopted: Sequence[File] = (),
        facts: Mapping[str, Json] | None = None,
        timings: Mapping[str, float] | None = None,
    ) -> Outcome:
        return Outcome(
            files=files,
            adopted=adopted,
            num_in=self.num_in,
            num_out=self.num_out,
            rejects={reason: self.rejects[reason] for reason in sorted(self.rejects)},
            flagged={reason: self.flagged[reason] for reason in sorted(self.flagged)},
            facts={
                "split": unit.arguments["split"],
                "shard": f"{unit.id}.tar",
                "num_samples": self.num_out,
                "digests": self.digests.facts(),
                "errors": self.errors,
                **(facts or {}),
            },
            timings=timings or {},
        )


def read_report(path: Path) -> dict[str, Rejection]:
    """The rejections of one unit by key, as `Tally.write_report` left them."""
    lines = (json.loads(line) for line in path.read_text().splitlines())
    found: dict[str, Rejection] = {}
    for line in lines:
        # The first row of a key decides; the others are its duplicates.
        found.setdefault(line["key"], Rejection(reason=line["reason"], message=line["message"]))
    return found


# -- the budget -----------------------------------------------------------------------------------


def check_budget(receipts: Iterable[Receipt], max_rejects_fraction: float) -> None:
    """Judge the rejects of all units together. Reads the receipts once, keeps none.

    How many samples a torn tar has lost nobody can know. It is charged as if it had held as many
    as the average sound one: what is missing to that number counts as rejected.

    Raises:
        StageFailed: more than `max_rejects_fraction` of the rows were rejected, or no sample is
            left for training. The message counts every reason and names the first keys.
    """
    seen = _Seen()
    for receipt in receipts:
        seen.add(receipt)
    num_lost = seen.num_lost
    num_in = seen.num_in + num_lost
    num_rejects = num_in - seen.num_out
    if num_rejects > max_rejects_fraction * num_in:
        problem = (
            f"{num_rejects} of {num_in} rows were rejected ({num_rejects / num_in:.1%}), "
            f"data.max_rejects_fraction allows {max_rejects_fraction:.1%}"
        )
    elif seen.num_train == 0:
        problem = f"no training samples: {num_in} rows, {num_rejects} of them rejected"
    else:
        return
    raise StageFailed("\n  ".join([f"ingest: {problem}", *seen.lines(), *_REMEDIES]))


_REMEDIES = (
    f"every one is told, with its message and origin, in {REPORTS_FOLDER}/*.jsonl of the stage's "
    "folder",
    "if the network was at fault: `ediffi cache retry ingest` asks again for what may have passed",
    "else mend the list, or raise data.max_rejects_fraction",
)


@dataclass
class _Seen:
    """Sums over receipts."""

    num_in: int = 0
    num_out: int = 0
    num_train: int = 0
    num_sound: int = 0  # tars
    num_in_sound: int = 0
    in_torn: list[int] = field(default_factory=list)  # samples found in each torn tar
    counts: dict[str, int] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def add(self, receipt: Receipt) -> None:
        self.num_in += receipt.num_in
        self.num_out += receipt.num_out
        self.num_train += receipt.num_out * (receipt.facts["split"] == "train")
        if receipt.facts.get("is_torn"):
            self.in_torn.append(receipt.num_in)
        else:
            self.num_sound += 1
            self.num_in_sound += receipt.num_in
        for reason, rejected in receipt.rejects.items():
            self.counts[reason] = self.counts.get(reason, 0) + len(rejected)
            shown = self.keys.setdefault(reason, [])
            shown += rejected[: NUM_KEYS_SHOWN - len(shown)]
            for message in receipt.facts["errors"].get(reason, ())[:1]:
                self.messages.setdefault(reason, message)

    @property
    def num_lost(self) -> int:
        """Samples that torn tars probably held, beyond those that were found in them."""
        if self.num_sound:
            usual = round(self.num_in_sound / self.num_sound)
        else:
            usual = max(self.in_torn, default=0)
        return sum(max(0, usual - found) for found in self.in_torn)

    def lines(self) -> Iterator[str]:
        """One line per reason, the most frequent first: its count, first keys, first message."""
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            keys = self.keys[reason]
            shown = ", ".join(keys) + ", ..." * (count > len(keys))
            example = f"; {self.messages[reason]}" if reason in self.messages else ""
            yield f"{reason}: {count} ({shown}){example}"
        if self.num_lost:
            yield f"torn tars: {len(self.in_torn)}, with about {self.num_lost} samples beyond reach"
