"""Charts: equal figures give equal bytes, and error bars of either kind are drawn."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.stages.evaluation.charts import MOST_ROWS, Line, line_chart, picture_grid


def chart(path: Path, error: object) -> bytes:
    """A chart of one line, as bytes."""
    lines = [Line(label="base", x=[1, 10, 100], y=[1, 2, 3], error=error, texts=["a", "b", "c"])]  # type: ignore[arg-type]
    line_chart(path, lines, x_label="sigma", y_label="share", x_scale="log")
    return path.read_bytes()


def test_equal_figures_give_equal_bytes(tmp_path: Path) -> None:
    """No date or version is written; half widths are pairs of equal widths; other bars differ."""
    plain = chart(tmp_path / "a.png", [0.1, 0.2, 0.3])
    assert chart(tmp_path / "b.png", [0.1, 0.2, 0.3]) == plain
    assert chart(tmp_path / "c.png", [(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)]) == plain
    assert chart(tmp_path / "d.png", [(0.1, 0.9), (0.2, 0.2), (0.3, 0.3)]) != plain
    assert chart(tmp_path / "e.png", ()) != plain


def test_grids_show_the_first_rows(tmp_path: Path) -> None:
    """However many prompts there are, the grid stays readable."""
    pictures = torch.zeros(40, 2, 3, 16, 16, dtype=torch.uint8)
    prompts = [f"prompt {index}" for index in range(40)]
    picture_grid(tmp_path / "many.png", prompts, {"base": pictures})
    picture_grid(tmp_path / "few.png", prompts[:MOST_ROWS], {"base": pictures[:MOST_ROWS]})
    many, few = (np.asarray(Image.open(tmp_path / name)) for name in ("many.png", "few.png"))
    assert np.array_equal(many, few)
