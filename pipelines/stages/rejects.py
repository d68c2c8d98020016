"""Rejected samples: why, how many, and how many are too many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from pipelines.errors import StageFailed
from pipelines.stage import File, Outcome, Receipt, Unit

if TYPE_CHECKING:
    from ediffi.shards import ImageError

NUM_MESSAGES = 3  # kept in a receipt, per reason
MAX_MESSAGE_CHARACTERS = 300
NUM_KEYS_SHOWN = 3  # per reason, in the report of a failed stage


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
    """Counts the samples of one unit; for each reason the rejected keys and a few messages."""

    num_in: int = 0
    num_out: int = 0
    rejects: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)

    def count(self, key: str, rejection: Rejection | None) -> None:
        self.num_in += 1
        if rejection is None:
            self.num_out += 1
            return
        self.rejects.setdefault(rejection.reason, []).append(key)
        messages = self.errors.setdefault(rejection.reason, [])
        if rejection.message and len(messages) < NUM_MESSAGES:
            messages.append(f"{key}: {rejection.message}"[:MAX_MESSAGE_CHARACTERS])

    def outcome(
        self, unit: Unit, *, files: Sequence[str] = (), adopted: Sequence[File] = ()
    ) -> Outcome:
        return Outcome(
            files=files,
            adopted=adopted,
            num_in=self.num_in,
            num_out=self.num_out,
            rejects={reason: self.rejects[reason] for reason in sorted(self.rejects)},
            facts={
                "split": unit.arguments["split"],
                "shard": f"{unit.id}.tar",
                "num_samples": self.num_out,
                "errors": self.errors,
            },
        )


def check_budget(receipts: Sequence[Receipt], max_rejects_fraction: float) -> None:
    """Judge the rejects of all units together.

    Raises:
        StageFailed: more than `max_rejects_fraction` of the rows were rejected, or no sample is
            left for training. The message counts every reason and names the first keys.
    """
    num_in = sum(receipt.num_in for receipt in receipts)
    num_rejects = num_in - sum(receipt.num_out for receipt in receipts)
    num_train = sum(r.num_out for r in receipts if r.facts["split"] == "train")
    if num_rejects > max_rejects_fraction * num_in:
        problem = (
            f"{num_rejects} of {num_in} rows were rejected ({num_rejects / num_in:.1%}), "
            f"data.max_rejects_fraction allows {max_rejects_fraction:.1%}"
        )
    elif num_train == 0:
        problem = f"no training samples: {num_in} rows, {num_rejects} of them rejected"
    else:
        return
    remedy = "mend the list, or raise data.max_rejects_fraction"
    raise StageFailed("\n  ".join([f"ingest: {problem}", *_reasons(receipts), remedy]))


def _reasons(receipts: Sequence[Receipt]) -> Iterator[str]:
    """One line per reason, the most frequent first: its count, first keys, first message."""
    keys: dict[str, list[str]] = {}
    messages: dict[str, list[str]] = {}
    for receipt in receipts:
        for reason, rejected in receipt.rejects.items():
            keys.setdefault(reason, []).extend(rejected)
            messages.setdefault(reason, []).extend(receipt.facts["errors"][reason])
    for reason, rejected in sorted(keys.items(), key=lambda item: (-len(item[1]), item[0])):
        shown = ", ".join(rejected[:NUM_KEYS_SHOWN]) + ", ..." * (len(rejected) > NUM_KEYS_SHOWN)
        example = f"; {messages[reason][0]}" if messages[reason] else ""
        yield f"{reason}: {len(rejected)} ({shown}){example}"
