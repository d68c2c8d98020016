"""Tests of pipelines.tracking.curves: pictures of what was measured, and of nothing else."""

from pipelines.tracking.curves import draw_curves

ROWS = [{"images": 500.0, "loss": 0.5, "images_per_s": 90.0}, {"images": 1000.0, "loss": 0.25}]


def test_curves_are_drawn_of_what_was_measured() -> None:
    """One picture a metric that any unit reported; nothing reported, nothing drawn."""
    assert [name for name, _ in draw_curves({"low": ROWS})] == ["loss", "images_per_s"]
    assert [name for name, _ in draw_curves({"low": ROWS[1:]})] == ["loss"]
    assert list(draw_curves({})) == []
