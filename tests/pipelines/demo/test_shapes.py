"""The embedded data set: its split, its drawing against closed forms, its files on disk."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.demo import shapes

AREA_AT_RADIUS_1 = {
    "circle": math.pi,
    "square": 1.8**2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.15**2,
    "ring": math.pi * (1 - 0.55**2),
}


def write_small(directory: Path, **changes: int) -> Path:
    settings = {"image_px": 16, "num_train": 10, "num_per_held_out": 1, "seed": 3} | changes
    return shapes.write_data_set(directory, **settings)


def bytes_below(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_captions_are_unique() -> None:
    """Six colours, four shapes and five positions make 120 different captions."""
    assert len({combination.caption for combination in shapes.COMBINATIONS}) == 6 * 4 * 5


def test_a_fifth_is_held_out() -> None:
    """The two splits hold 96 and 24 combinations and share none."""
    train, held_out = shapes.combinations_of("train"), shapes.combinations_of("held_out")
    assert (len(train), len(held_out)) == (96, 24)
    assert set(train) | set(held_out) == set(shapes.COMBINATIONS)


@pytest.mark.parametrize(
    "fields", [("colour", "shape"), ("colour", "position"), ("shape", "position")]
)
def test_every_pair_is_trained_on(fields: tuple[str, str]) -> None:
    """Every pair of attributes, hence every single attribute, occurs in a training combination."""
    values = {"colour": shapes.COLOURS, "shape": shapes.SHAPES, "position": shapes.POSITIONS}
    trained = {tuple(getattr(c, f) for f in fields) for c in shapes.combinations_of("train")}
    assert trained == set(itertools.product(*(values[f] for f in fields)))


def test_an_unknown_attribute_is_refused() -> None:
    """A combination outside the data set cannot be made, and the error lists the choices."""
    with pytest.raises(ValueError, match=r"shape must be one of circle, .* got 'star'"):
        shapes.Combination(colour="red", shape="star", position="on the left")


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_coverage_has_the_area_and_centroid_of_the_shape(shape: str) -> None:
    """Coverage integrates to the closed-form area, around the centre that was asked for."""
    centre, radius, image_px = (0.45, 0.55), 0.22, 128
    coverage_HW = shapes.coverage(shape, centre=centre, radius=radius, image_px=image_px)
    middles = (np.arange(image_px) + 0.5) / image_px
    mass = coverage_HW.sum()
    assert coverage_HW.mean() == pytest.approx(AREA_AT_RADIUS_1[shape] * radius**2, rel=0.02)
    assert coverage_HW.sum(0) @ middles / mass == pytest.approx(centre[0], abs=0.003)
    assert coverage_HW.sum(1) @ middles / mass == pytest.approx(centre[1], abs=0.003)


def test_edges_mix_the_colour_with_white() -> None:
    """A pixel half covered lies halfway between white and the colour."""
    picture_HWC = shapes.paint(np.array([[0.0, 0.5, 1.0]]), "red")
    red = np.array(shapes.COLOURS["red"])
    assert picture_HWC[0, 0].tolist() == [255, 255, 255]
    assert np.abs(picture_HWC[0, 1] - (255 + red) / 2).max() <= 0.5
    assert picture_HWC[0, 2].tolist() == red.tolist()


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("position", shapes.POSITIONS)
def test_every_shape_fits_inside_the_picture(shape: str, position: str) -> None:
    """The largest shape at the farthest jitter leaves the border pixels white."""
    x, y = shapes.POSITIONS[position]
    for dx, dy in itertools.product((-shapes.JITTER_FRACTION, shapes.JITTER_FRACTION), repeat=2):
        coverage_HW = shapes.coverage(
            shape, centre=(x + dx, y + dy), radius=shapes.RADIUS_FRACTION[1], image_px=128
        )
        assert not coverage_HW[[0, -1], :].any()
        assert not coverage_HW[:, [0, -1]].any()


def test_pictures_of_one_combination_differ() -> None:
    """Size and place are jittered: two draws from one generator are not the same picture."""
    rng = np.random.default_rng(0)
    combination = shapes.COMBINATIONS[0]
    first, second = (shapes.draw(combination, image_px=16, rng=rng) for _ in range(2))
    assert (first != second).any()


def test_the_parquet_describes_every_picture(tmp_path: Path) -> None:
    """Each row names an existing PNG of the right size, with its caption and its split."""
    rows = pq.read_table(write_small(tmp_path)).to_pylist()
    assert len(rows) == len({row["key"] for row in rows}) == 10 + 24
    for row in rows:
        combination = shapes.Combination(
            colour=row["colour"], shape=row["shape"], position=row["position"]
        )
        assert row["caption"] == combination.caption
        assert row["split"] == shapes.split_of(combination)
        with Image.open(tmp_path / row["url"]) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (16, 16))


def test_training_pictures_spread_evenly(tmp_path: Path) -> None:
    """No training combination has two pictures more than another."""
    table = pq.read_table(write_small(tmp_path, num_train=100, num_per_held_out=0))
    counts = [entry["counts"] for entry in table["caption"].value_counts().to_pylist()]
    assert len(counts) == 96
    assert max(counts) - min(counts) <= 1


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    """Two directories written with the same arguments are identical, file by file."""
    write_small(tmp_path / "a")
    write_small(tmp_path / "b")
    assert bytes_below(tmp_path / "a") == bytes_below(tmp_path / "b")


def test_another_seed_gives_other_pictures(tmp_path: Path) -> None:
    """The seed decides the jitter of every picture."""
    write_small(tmp_path / "a")
    write_small(tmp_path / "b", seed=4)
    ours, others = bytes_below(tmp_path / "a"), bytes_below(tmp_path / "b")
    assert ours.keys() == others.keys()
    assert all(ours[name] != others[name] for name in ours)


def test_a_longer_data_set_begins_with_the_shorter(tmp_path: Path) -> None:
    """Asking for more pictures changes none of those there were."""
    write_small(tmp_path / "short")
    write_small(tmp_path / "long", num_train=20)
    short, long = bytes_below(tmp_path / "short"), bytes_below(tmp_path / "long")
    del short[shapes.CAPTIONS_FILE]
    assert short.items() <= long.items()


def test_a_finished_data_set_is_left_alone(tmp_path: Path) -> None:
    """A second call writes nothing: not even a picture that was removed comes back."""
    captions_path = write_small(tmp_path)
    next((tmp_path / shapes.PICTURES_FOLDER).iterdir()).unlink()
    before = bytes_below(tmp_path)
    assert write_small(tmp_path) == captions_path
    assert bytes_below(tmp_path) == before


def test_a_killed_call_is_repaired_by_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after some pictures, there is no parquet; the next call ends at the same bytes."""
    write_small(tmp_path / "whole")
    draw, num_drawn = shapes.draw, itertools.count()

    def draw_until_killed(*args: Any, **kwargs: Any) -> np.ndarray:
        if next(num_drawn) == 7:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(shapes, "draw", draw_until_killed)
    with pytest.raises(KeyboardInterrupt):
        write_small(tmp_path / "killed")
    assert not (tmp_path / "killed" / shapes.CAPTIONS_FILE).exists()
    write_small(tmp_path / "killed")
    assert bytes_below(tmp_path / "killed") == bytes_below(tmp_path / "whole")


def test_a_directory_with_another_data_set_is_refused(tmp_path: Path) -> None:
    """A data set of other settings is neither reused nor overwritten."""
    write_small(tmp_path)
    with pytest.raises(ValueError, match="holds another data set"):
        write_small(tmp_path, seed=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_px", 4), ("num_train", -1), ("num_per_held_out", -1), ("seed", -1)],
)
def test_impossible_settings_are_refused(tmp_path: Path, field: str, value: int) -> None:
    """The error names the field, and nothing is written."""
    with pytest.raises(ValueError, match=field):
        write_small(tmp_path / "new", **{field: value})
    assert not (tmp_path / "new").exists()
