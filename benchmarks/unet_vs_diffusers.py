"""Our U-Net's training step against diffusers': `python -m benchmarks.unet_vs_diffusers [--quick]`.

Images per second of forward, backward and AdamW, with equal parameters (within 2 %), pictures,
tokens and optimizer. diffusers' `UNet2DConditionModel` stands on the other side twice: with the
blocks of Stable Diffusion (transformers with a feed-forward layer, its default), and with those of
DeepFloyd IF (attention with nothing around it, scale-shift normalisation), which are nearest to
ours. Whether channels come last and which attention kernel it takes is tried out first, and its
fastest is what counts. Pixel-unshuffle is done for it, so that both work at one resolution.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.interleave import our_versions, row, write_rows
from benchmarks.peers import Peer, environment, version_of
from benchmarks.report import Row

COMMAND = "python -m benchmarks.unet_vs_diffusers"
REQUIREMENT = "diffusers==0.42.1"
TOKEN_WIDTH = 384
NUM_TOKENS = 32  # of which ours makes the last itself: its learned null token
PARAMETER_TOLERANCE_FRACTION = 0.02


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of network, for all sides; every field is what `UNetConfig` means by it."""

    name: str
    image_px: int
    patch_px: int
    num_blocks: int
    self_attention_px: tuple[int, ...]
    cross_attention_px: tuple[int, ...]
    head_width: int
    context_width: int
    batch_images: int
    num_steps: int  # of one run
    ours: tuple[int, ...]  # widths
    stable_diffusion: tuple[int, ...]  # narrower, as its feed-forward layers take parameters too
    deepfloyd_if: tuple[int, ...]


CASES = (
    Case(  # the network of pipelines/recipes/emoji-32px.yaml
        name="32 px, 4.8M parameters",
        image_px=32,
        patch_px=2,
        num_blocks=1,
        self_attention_px=(4,),
        cross_attention_px=(8, 4),
        head_width=32,
        context_width=128,
        batch_images=32,
        num_steps=5,
        ours=(48, 96, 128),
        stable_diffusion=(48, 96, 112),
        deepfloyd_if=(48, 96, 128),
    ),
    Case(
        name="64 px, 28M parameters",
        image_px=64,
        patch_px=1,
        num_blocks=2,
        self_attention_px=(16, 8),
        cross_attention_px=(16, 8),
        head_width=64,
        context_width=256,
        batch_images=4,
        num_steps=2,
        ours=(64, 128, 192, 256),
        stable_diffusion=(56, 112, 192, 224),
        deepfloyd_if=(64, 144, 192, 256),
    ),
)
OURS = "ours"
OTHERS = {
    "stable_diffusion": "diffusers, Stable Diffusion's blocks",
    "deepfloyd_if": "diffusers, DeepFloyd IF's blocks",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of one case: a smoke test")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args(arguments)
    cases = [replace(CASES[0], num_steps=1, batch_images=4)] if options.quick else CASES
    precisions, runs = (("fp32",), 1) if options.quick else (("fp32", "bf16"), options.runs)
    rows: list[Row] = []
    for case in cases:
        for num_threads in options.threads[:1] if options.quick else options.threads:
            for precision in precisions:
                rows += measure(case, precision, num_threads, runs)
    write_rows(rows, options.json)
    return 0


def measure(case: Case, precision: str, num_threads: int, runs: int) -> list[Row]:
    """One row for each of `OTHERS`; the work of one image too, once a case (fp32, one thread)."""
    python = environment("diffusers", [REQUIREMENT])
    rates: dict[str, list[float]] = {OURS: [], **{name: [] for name in OTHERS}}
    with ExitStack() as stack:
        peers: dict[str, Peer] = {}
        about: dict[str, Any] = {}
        settings = {"case": asdict(case), "precision": precision, "num_threads": num_threads}
        for name in rates:
            side = (
                ("ours_unet", Path(sys.executable)) if name == OURS else ("diffusers_unet", python)
            )
            peers[name] = stack.enter_context(Peer(f"benchmarks.peers.{side[0]}", side[1]))
            about[name] = peers[name].ask(action="build", blocks=name, **settings)
            print(f"{case.name}, {precision}, {name}: {about[name]}", file=sys.stderr)
        check_parameters({name: facts["num_parameters"] for name, facts in about.items()})
        for run_index in range(runs):
            for name in peers if run_index % 2 else reversed(peers):
                seconds = peers[name].ask(action="measure")["seconds"]
                rates[name].append(case.batch_images * case.num_steps / seconds)
            print({name: round(rate[-1], 2) for name, rate in rates.items()}, file=sys.stderr)
    threads = "one thread" if num_threads == 1 else f"{num_threads} threads"
    what = f"training step, {case.name}, {precision}, {threads}"
    rows = _rows(what, "images/s", rates, "higher", python)
    if (precision, num_threads) == ("fp32", 1):
        work = {name: [facts["image_gflop"]] for name, facts in about.items()}
        rows += _rows(f"work of one training image, {case.name}", "GFLOP", work, "lower", python)
    return rows


def _rows(
    measure: str,
    unit: str,
    values: dict[str, list[float]],
    better: Literal["higher", "lower"],
    python: Path,
) -> list[Row]:
    versions = {**our_versions("torch"), "diffusers": version_of(python, "diffusers")}
    return [
        row(
            measure,
            unit,
            values[OURS],
            values[name],
            other_name=other_name,
            better=better,
            command=COMMAND,
            versions=versions,
        )
        for name, other_name in OTHERS.items()
    ]


def check_parameters(num_parameters: dict[str, int]) -> None:
    """Raise ValueError unless all sides have as many parameters as ours, within the tolerance."""
    for name, found in num_parameters.items():
        if abs(found / num_parameters[OURS] - 1) > PARAMETER_TOLERANCE_FRACTION:
            raise ValueError(
                f"{name} must have our {num_parameters[OURS]:,} parameters within "
                f"{PARAMETER_TOLERANCE_FRACTION:.0%}, it has {found:,}: change its widths"
            )


if __name__ == "__main__":
    sys.exit(main())
