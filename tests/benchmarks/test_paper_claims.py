"""The judges of the claims, on pictures whose answer is known; the data they are asked about."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import paper_claims
from benchmarks.claims import data, drawing, judges
from benchmarks.claims.results import Results
from benchmarks.claims.study import Table
from benchmarks.claims.style_judge import StyleJudge, agreement
from pipelines.colours import COLOURS


@pytest.fixture
def emoji(tmp_path: Path) -> Path:
    """A folder like the emoji's: one circle of each colour in each style, and a held-out cat."""
    rows = []
    (tmp_path / "images").mkdir()
    for style in data.STYLES:
        for colour, rgb in {**COLOURS, "grey": (128, 128, 128)}.items():
            name = "grey cat" if colour == "grey" else f"{colour} circle"
            picture = Image.new("RGB", (64, 64), "white")
            picture.paste(rgb, (8, 8, 56, 56))
            url = f"images/{style}-{colour}.png"
            picture.save(tmp_path / url)
            rows.append(
                {
                    "url": url,
                    "key": f"{style}-{colour}",
                    "caption": name,
                    "caption_long": f"{data.STYLES[style]} icon of {name}, symbols",
                    "style": style,
                    "split": "test" if colour == "grey" else "train",
                }
            )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "emoji.parquet")
    return tmp_path


def test_every_picture_has_a_caption_with_its_style_and_one_without(
    emoji: Path, tmp_path: Path
) -> None:
    """The list is self-contained: its pictures lie beside it."""
    rows = data.read_list(data.write_singles(emoji, tmp_path / "singles"))
    assert len(rows) == 2 * len(data.read_emoji(emoji))
    assert [row["caption"] for row in rows[:2]] == [
        "outlined icon of red circle, symbols",
        "icon of red circle, symbols",
    ]
    assert [data.is_styled(row) for row in rows[:2]] == [True, False]
    assert all((tmp_path / "singles" / row["url"]).exists() for row in rows)


def test_a_pair_shows_both_and_does_not_say_where(emoji: Path, tmp_path: Path) -> None:
    """Both colours are there, each in a half of its own, and neither order of words is a rule."""
    path = data.write_pairs(emoji, tmp_path / "pairs")
    rows = data.read_list(path)
    pictures = judges.read_pictures(path.parent, rows)
    first, second = zip(*(row["caption"].split(" and ") for row in rows), strict=True)
    masks = judges.colour_masks(pictures, [data.colour_of(one) for one in first])
    halves = torch.stack([drawing.half_mask(half, 32) for half in drawing.HALVES])
    inside = (masks[:, None] & halves).sum((2, 3)) / masks.sum((1, 2))[:, None]
    assert (inside.amax(1) > 0.95).all()
    assert set(inside.argmax(1).tolist()) == {0, 1, 2, 3}
    assert all(data.colour_of(a) != data.colour_of(b) for a, b in zip(first, second, strict=True))


def test_a_combination_is_held_out_in_both_orders() -> None:
    """What training never saw it has not seen the other way round either."""
    names = [f"{colour} {one}" for colour in COLOURS for one in data.OBJECTS]
    pairs = [(a, b) for a in names for b in names if a < b]
    held_out = [pair for pair in pairs if data.is_held_out(*pair)]
    assert 0 < len(held_out) < len(pairs)
    assert all(data.is_held_out(b, a) for a, b in held_out)


def test_halves_are_halves() -> None:
    """Left and right, top and bottom: each pair covers the picture once."""
    left, right, top, bottom = (drawing.half_mask(half, 8) for half in drawing.HALVES)
    for one, other, edge in ((left, right, left[:, 0]), (top, bottom, top[0])):
        assert (one ^ other).all()
        assert edge.all()


def test_tables_are_markdown() -> None:
    """A row for each row, after header and rule."""
    text = Table("Title", ("", "a"), [("x", 1), ("y", 2)]).markdown()
    assert text.splitlines()[2:] == ["|  | a |", "|---|--:|", "| x | 1 |", "| y | 2 |"]


def test_absent_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the emoji nothing starts."""
    assert paper_claims.main(["--emoji", str(tmp_path)]) == 2
    assert f"no emoji.parquet in {tmp_path}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_judge_of_styles_learns_them_from_the_training_pictures(tmp_path: Path) -> None:
    """It tells held-out pictures of three textures apart, and is the same when made again."""
    rows = []
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(276):
        style = list(data.STYLES)[index % 3]
        grain = torch.rand((3, 64, 64), generator=generator) * 80
        step = (4, 16, 64)[index % 3]  # px from stripe to stripe
        grain[:, torch.arange(64) % step < step // 2] += 120
        url = f"images/{index}.png"
        Image.fromarray(grain.byte().permute(1, 2, 0).numpy()).save(tmp_path / url)
        split = "train" if index < 256 else "test"
        rows.append({"url": url, "style": style, "split": split})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "emoji.parquet")
    judge, results = StyleJudge(emoji=str(tmp_path)), Results(tmp_path / "results")
    made = judge.run(results)
    save_file(made, results.path(judge))
    held_out = [row for row in rows if row["split"] == "test"]
    found = judge.judge(results, judges.read_pictures(tmp_path, held_out))
    assert sum(agreement(found, [row["style"] for row in held_out])) >= 0.9 * len(held_out)
    assert torch.equal(judge.run(results)["state"], made["state"])
