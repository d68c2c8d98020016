"""What attacks came to: kept as they end, so that a long run can go on; rows and a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos.attack import Attack
from benchmarks.interleave import our_versions
from benchmarks.report import Row

NOT_A_KILL = ("busy", "refused", "stall", "cut", "absent", "told")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One attack.

    Attributes:
        index: which of the seed's attacks.
        scenery: `machine`, `nodes` or `bucket`.
        kinds: of every blow that was struck.
        codes: exit codes of all runs, the last one 0.
        num_files: that had to have the bytes of an undisturbed run.
        num_units: of the pipeline.
        num_begun: attempts at units.
        num_starting_over: units that were finished when a driver ended: what it would cost to
            begin again.
        seconds: from the first start to the end.
        problems: a line for all that was not as it should be; none is what we want.
    """

    index: int
    scenery: str
    kinds: Sequence[str]
    codes: Sequence[int]
    num_files: int
    num_units: int
    num_begun: int
    num_starting_over: int
    seconds: float
    problems: Sequence[str] = field(default_factory=list)

    @property
    def num_redone(self) -> int:
        """Attempts beside one a unit."""
        return max(0, self.num_begun - self.num_units)


def remember(path: Path, outcome: Outcome) -> None:
    """Add an outcome to those of the run."""
    with path.open("a") as stream:
        stream.write(json.dumps(asdict(outcome)) + "\n")


def recall(path: Path) -> list[Outcome]:
    """The outcomes of a run that was cut off; a line that was being written is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            values: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.append(Outcome(**values))
    return found


def num_kills(outcomes: Sequence[Outcome]) -> int:
    """Blows that ended a process or a node with SIGKILL."""
    return sum(kind not in NOT_A_KILL for one in outcomes for kind in one.kinds)


def unexplained(attack: Attack, num_begun: int, num_units: int) -> list[str]:
    """What the attack itself saw go wrong."""
    lines = [f"done again although it had its receipt: {name}" for name in attack.done_again]
    lines += attack.wrong_codes
    lines += [f"still does a unit after the end: {name}" for name in attack.survivors]
    if num_begun > num_units + attack.most_begun:
        lines.append(
            f"{num_begun} attempts at {num_units} units: {len(attack.blows)} blows explain "
            f"{attack.most_begun} more at most"
        )
    return lines


def rows(outcomes: Sequence[Outcome], command: str) -> list[Row]:
    """Units done again a blow, beside starting over at every end of the driver."""
    found = []
    for scenery in dict.fromkeys(one.scenery for one in outcomes):
        these = [one for one in outcomes if one.scenery == scenery]
        num_blows = sum(len(one.kinds) for one in these)
        ours = sum(one.num_redone for one in these) / num_blows
        other = sum(one.num_starting_over for one in these) / num_blows
        if not other:
            continue
        found.append(
            Row(
                measure=f"units done again a blow, {num_blows} blows ({scenery}), "
                f"{sum(one.num_files for one in these)} files compared",
                unit="units",
                ours=ours,
                other=other,
                other_name="starting over whenever the driver ended (same moments)",
                ratio=ours / other,
                better="lower",
                spread=0.0,
                runs=len(these),
                command=command,
                versions=our_versions("ray", "torch", "mlflow"),
            )
        )
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: one line a scenery, then one a kind of blow."""
    lines = [
        "| where | runs to the end | blows | of them kills | starts | units | done again "
        "| files equal | problems |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for scenery in dict.fromkeys(one.scenery for one in outcomes):
        lines.append(_line(scenery, [one for one in outcomes if one.scenery == scenery]))
    lines.append(_line("all", outcomes))
    counts = Counter(kind for one in outcomes for kind in one.kinds)
    lines += ["", "| blow | times |", "|---|--:|"]
    lines += [f"| {kind} | {number} |" for kind, number in sorted(counts.items())]
    found = [f"- {one.scenery} {one.index}: {line}" for one in outcomes for line in one.problems]
    return "\n".join([*lines, "", *found]).rstrip() + "\n"


def _line(name: str, outcomes: Sequence[Outcome]) -> str:
    cells = (
        name,
        len(outcomes),
        sum(len(one.kinds) for one in outcomes),
        num_kills(outcomes),
        sum(len(one.codes) for one in outcomes),
        sum(one.num_units for one in outcomes),
        sum(one.num_redone for one in outcomes),
        sum(one.num_files for one in outcomes),
        sum(len(one.problems) for one in outcomes),
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
