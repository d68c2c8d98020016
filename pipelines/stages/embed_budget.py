"""Judge a whole embedding cache: how much it left out, and whether one encoder made all of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipelines.errors import StageFailed
from pipelines.recipe import Encoder
from pipelines.stage import Receipt
from pipelines.stages.inputs import EMBED_PREFIX

NUM_SHOWN = 3  # keys per reason and units per commit, in the report of a failed stage


def check_receipts(receipts: Iterable[Receipt], encoder_name: str, encoder: Encoder) -> None:
    """Judge the units of one cache together, reading the receipts once and keeping none.

    Raises:
        StageFailed: more samples were rejected than `max_rejects_fraction` of the encoder allows,
            or units were made with different commits of a hub name that moved meanwhile. The
            message counts every reason and names the first keys.
    """
    seen = _Seen()
    for receipt in receipts:
        seen.add(receipt)
    problem = seen.of_commits(encoder_name, encoder) or seen.of_rejects(encoder_name, encoder)
    if problem:
        raise StageFailed("\n  ".join(problem))


@dataclass
class _Seen:
    """Sums over receipts."""

    num_in: int = 0
    num_rejects: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    units: dict[str, list[str]] = field(default_factory=dict)  # commit -> the first of its units

    def add(self, receipt: Receipt) -> None:
        self.num_in += receipt.num_in
        self.num_rejects += receipt.num_in - receipt.num_out
        for reason, keys in receipt.rejects.items():
            self.counts[reason] = self.counts.get(reason, 0) + len(keys)
            shown = self.keys.setdefault(reason, [])
            shown += keys[: NUM_SHOWN - len(shown)]
        units = self.units.setdefault(receipt.facts.get("revision", ""), [])
        units += [receipt.unit] * (len(units) < NUM_SHOWN)

    def of_commits(self, encoder_name: str, encoder: Encoder) -> list[str]:
        """Lines that tell of units made with different weights; none if all are of one commit."""
        if len(self.units) < 2:
            return []
        name = encoder.weights.partition("@")[0]
        return [
            f"{EMBED_PREFIX}{encoder_name}: {encoder.weights!r} led to different commits while "
            "the stage ran",
            *(f"{commit or 'unknown'}: {', '.join(u)}, ..." for commit, u in self.units.items()),
            f"pin one, and run again: encoders.{encoder_name}.weights: {name}@COMMIT",
        ]

    def of_rejects(self, encoder_name: str, encoder: Encoder) -> list[str]:
        """Lines that tell of too many rejects; none if they are within the budget."""
        allowed = encoder.max_rejects_fraction
        if self.num_rejects <= allowed * self.num_in:
            return []
        setting = f"encoders.{encoder_name}.max_rejects_fraction"
        return [
            f"{EMBED_PREFIX}{encoder_name}: {self.num_rejects} of {self.num_in} samples were "
            f"rejected ({self.num_rejects / self.num_in:.1%}), {setting} allows {allowed:.1%}",
            *self._lines(),
            f"leave them out of the data, or raise {setting} and say in missing_embeddings what "
            "training does with samples that lack an embedding",
        ]

    def _lines(self) -> Iterator[str]:
        """One line per reason, the most frequent first."""
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            keys = self.keys[reason]
            yield f"{reason}: {count} ({', '.join(keys)}{', ...' * (count > len(keys))})"
