"""Charts and grids of measurements; equal figures give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MOST_ROWS = 12  # of a grid for people


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart; `error` are half widths, or (below, above) pairs; () for none."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | Sequence[tuple[float, float]] = ()
    texts: Sequence[str] = ()  # beside the points


def line_chart(
    path: Path,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_scale: Literal["linear", "log"] = "linear",
) -> None:
    """Draw lines with error bars as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.set_xscale(x_scale)
    for line in lines:
        errors = [one if isinstance(one, tuple) else (one, one) for one in line.error]
        bars = list(zip(*errors, strict=True)) if errors else None
        axes.errorbar(line.x, line.y, yerr=bars, capsize=3, marker=".", label=line.label)
        for x, y, text in zip(line.x, line.y, line.texts, strict=False):
            axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.legend()
    # no software version or date in the file: equal results give equal bytes
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def picture_grid(path: Path, prompts: Sequence[str], pictures: Mapping[str, Tensor]) -> None:
    """Write the first rows of a labelled grid as PNG.

    Args:
        prompts: one a row.
        pictures: by title, uint8 (prompts, pictures a row, 3, H, W).
    """
    from pipelines.grids import draw_grid

    shown = {name: rows[:MOST_ROWS] for name, rows in pictures.items()}
    draw_grid(prompts[:MOST_ROWS], shown).save(path)
