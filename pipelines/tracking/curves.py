"""Training curves as pictures: one a metric, one line a unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Lines = Mapping[str, Sequence[tuple[float, float]]]  # unit -> (images seen, value)


def draw_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> Iterator[tuple[str, Any]]:
    """One picture a metric, one line a unit, by images seen; yields names and PIL pictures."""
    for name in ("loss", "images_per_s"):
        lines = {
            unit: [(row["images"], row[name]) for row in rows if name in row]
            for unit, rows in curves.items()
        }
        if any(lines.values()):
            yield name, _drawn(name, lines)


def _drawn(name: str, lines: Lines) -> Any:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="images seen", ylabel=name)
    for unit, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=unit)
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
