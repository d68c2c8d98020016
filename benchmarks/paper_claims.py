"""Which of eDiff-I's claims show at small scale: `python -m benchmarks.paper_claims [--quick]`.

Trains three bases, each once more as three experts and once as it is, and one model of pairs of
pictures; then judges them on held-out emoji. Data, models and drawings are kept in `.bench/claims`,
so that the same command goes on where it was. About two hours on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims.control import Painting, Style
from benchmarks.claims.drawing import Model, Part
from benchmarks.claims.ensembles import Experts, Routing, Text
from benchmarks.claims.gallery import write_pictures
from benchmarks.claims.models import SEEDS, make_models
from benchmarks.claims.results import SAMPLING, Results
from benchmarks.claims.study import Claim, Comparison, Study, finish
from benchmarks.interleave import our_versions, row, write_rows
from benchmarks.peers import ROOT
from benchmarks.report import Row

COMMAND = "python -m benchmarks.paper_claims"
EMOJI = ROOT.parent / "shared" / "data" / "emoji"
FOLDER = ROOT / ".bench" / "claims"
CLAIMS: dict[str, type[Claim]] = {
    "experts": Experts,
    "text": Text,
    "routing": Routing,
    "style": Style,
    "painting": Painting,
}
TIMED_PICTURES = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, draw, judge; `--json FILE` writes the rows there and the tables beside it."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--emoji", type=Path, default=EMOJI, help="folder of the emoji data set")
    parser.add_argument("--claims", nargs="+", choices=[*CLAIMS, "time"], default=[*CLAIMS, "time"])
    parser.add_argument("--quick", action="store_true", help="one training seed")
    parser.add_argument("--runs", type=int, default=5, help="timed runs")
    parser.add_argument("--pictures", type=Path, help="write pictures of the drawings here")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    if not (options.emoji / "emoji.parquet").exists():
        print(f"no emoji.parquet in {options.emoji}: name its folder with --emoji", file=sys.stderr)
        return 2
    models = make_models(options.emoji, FOLDER, SEEDS[:1] if options.quick else SEEDS)
    study = Study(models, FOLDER, options.emoji, Results(FOLDER / "results"))
    claims = [CLAIMS[name](study) for name in options.claims if name in CLAIMS]
    if claims:
        finish(claims, study.results, tell)
    answers = [claim.answer() for claim in claims]
    rows = [_row(one) for answer in answers for one in answer.comparisons]
    if "time" in options.claims:
        rows.append(_row(_sampling_time(study, options.runs)))
    text = "\n".join(table.markdown() for answer in answers for table in answer.tables)
    print(text, file=sys.stderr)
    if options.pictures:
        write_pictures(study, options.pictures)
    if options.json:
        options.json.with_suffix(".md").write_text(text)
    write_rows(rows, options.json)
    return 0


def tell(line: str) -> None:
    """Narration goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def _row(one: Comparison) -> Row:
    return row(
        one.measure,
        one.unit,
        one.ours,
        one.other,
        other_name=one.other_name,
        better=one.better,
        command=COMMAND,
        versions=our_versions("torch", "timm"),
    )


def _sampling_time(study: Study, runs: int) -> Comparison:
    """Seconds for the same pictures by the ensemble and by its base, in turn."""
    generator = Model(ensemble=str(study.models.experts[0])).load()
    prompts = study.captions[:TIMED_PICTURES]
    seconds: dict[Part, list[float]] = {"ensemble": [], "base": []}
    for _ in range(runs + 1):
        for model, found in seconds.items():
            start = time.perf_counter()
            generator.draw(prompts, seeds=range(len(prompts)), config=SAMPLING, model=model)
            found.append(time.perf_counter() - start)
    ours, other = (found[1:] for found in seconds.values())  # the first loads encoders and base
    return Comparison(
        measure=f"Sampling {TIMED_PICTURES} pictures",
        unit="s",
        ours=ours,
        other=other,
        other_name="the base",
        better="lower",
    )


if __name__ == "__main__":
    sys.exit(main())
