"""The truth table of stale caches: after each change exactly the right shards are made again.

The real runner, ledger and stages, with tiny encoders: eight pictures in four shards, two text
caches and one of pictures. Units run in this process, so that encoders are imported only once.
"""

from __future__ import annotations

import copy
import csv
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import create_autospec

import pytest
import ray
from PIL import Image

from pipelines.driver.pool import Started
from pipelines.driver.progress import Progress
from pipelines.driver.runner import Runner
from pipelines.planning import plan
from pipelines.recipe import CacheRecipe, Resources
from pipelines.store.ledger import Ledger
from pipelines.tracking.tracker import Tracker
from pipelines.worker.execute import Task, execute
from tests.tiny_encoders import write_clip, write_t5, write_tokenizer

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(300)]

WORDS = ("red", "green", "blue", "grey", "disk", "on", "paper")
COLOURS = ("red", "green", "blue", "grey") * 2
CAPTIONS = [f"{colour} disk on paper" for colour in COLOURS]
SHARDS = {f"train-{index:05d}" for index in range(4)}
Json = Any


class InProcess:
    """Stands in for the pool of actors: each unit is done on dispatch, here."""

    arriving: ClassVar[tuple[()]] = ()

    def dispatch(self, task: Task, resources: Resources) -> Started:
        reference = ray.put(execute(task))
        return Started(reference, begins=reference)

    def release(self, reference: ray.ObjectRef, *, lost: bool) -> None:
        assert not lost

    def retire(self) -> None:
        """There are none."""


@dataclass
class Team:
    """A store, its pictures and weights, and a recipe that changes."""

    path: Path
    recipe: dict[str, Json]

    def write_captions(self, captions: list[str]) -> None:
        with (self.path / "captions.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["path", "caption"])
            rows.writerows((f"{index}.png", text) for index, text in enumerate(captions))

    def run(self) -> dict[str, set[str]]:
        """Run the recipe; units really made, by stage. What is said goes to `said`."""
        recipe = CacheRecipe.model_validate(self.recipe)
        ledger = Ledger.open(self.path / "store")
        planned = plan(recipe, ledger)
        self.said = [f"{one.name}: {reason}" for one in planned for reason in one.reasons]
        before = {path: path.stat().st_mtime_ns for path in self._receipts()}
        progress = create_autospec(Progress, instance=True)
        tracker = create_autospec(Tracker, instance=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipelines.driver.flights.WorkerPool", InProcess)
            one = Runner(recipe, ledger, planned, run_id="run", tracker=tracker, progress=progress)
            one.run()
        self.said += [call.args[0] for call in progress.say.call_args_list]
        made: dict[str, set[str]] = {one.name: set() for one in planned}
        for name, state in one.states.items():
            for path in (state.planned.record.directory / "receipts").iterdir():
                receipt = state.planned.record.receipt(path.stem)
                is_new = before.get(path) != path.stat().st_mtime_ns
                if receipt is not None and is_new and not receipt.taken_from:
                    made[name].add(path.stem)
        return {name: units for name, units in made.items() if units}

    def bytes_of(self, stage: str) -> set[bytes]:
        """Shards of a stage's newest folder."""
        folders = (self.path / "store" / stage).iterdir()
        newest = max(folders, key=lambda folder: (folder / "made.json").stat().st_mtime_ns)
        return {path.read_bytes() for path in newest.glob("*.tar")}

    def _receipts(self) -> Iterator[Path]:
        return (self.path / "store").glob("**/receipts/*.json")


@pytest.fixture(scope="module")
def finished(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Team:
    """Everything made once; a copy of it lies beside."""
    path = tmp_path_factory.mktemp("stale") / "team"
    write_t5(path / "t5", WORDS)
    write_clip(path / "clip")
    for index, colour in enumerate(COLOURS):
        Image.new("RGB", (8 + index, 8), colour).save(path / f"{index}.png")
    clip = {"weights": str(path / "clip"), "max_tokens": 20}
    recipe = {
        "name": "team",
        "data": {
            "source": "folder",
            "folder": str(path),
            "list": str(path / "captions.csv"),
            "held_out": {"fraction": 0.0},
            "image_px": 8,
            "shard_images": 2,
        },
        "encoders": {
            "t5": {"family": "transformers", "weights": str(path / "t5"), "max_tokens": 12},
            "clip_text": {"family": "open_clip_text", **clip},
            "clip_image": {"family": "open_clip_image", **clip},
        },
    }
    one = Team(path, recipe)
    one.write_captions(CAPTIONS)
    made = one.run()
    assert made["ingest"] == SHARDS
    assert made["embed/t5"] == made["embed/clip_image"] == SHARDS | {"null"}
    shutil.copytree(path, path.with_name("finished"))
    return one


@pytest.fixture
def team(finished: Team) -> Team:
    """The finished team, as if nothing had been changed since, at the same place."""
    shutil.rmtree(finished.path)
    shutil.copytree(finished.path.with_name("finished"), finished.path)
    return Team(finished.path, copy.deepcopy(finished.recipe))


def test_nothing_is_made_again_without_a_change(team: Team) -> None:
    """Nor for what cannot change bytes: resources, the name, how pictures are decoded."""
    assert team.run() == {}
    team.recipe["resources"] = {"embed": {"cpus": 0.25, "attempts": 7}}
    team.recipe["name"] = "another"
    team.recipe["data"]["max_rejects_fraction"] = 0.5
    assert team.run() == {}


def new_weights(team: Team) -> None:
    write_t5(team.path / "t5", WORDS, seed=1)


def new_tokenizer(team: Team) -> None:
    write_tokenizer(team.path / "t5", tuple(reversed(WORDS)))


def setting(**values: Json) -> Callable[[Team], None]:
    def change(team: Team) -> None:
        team.recipe["encoders"]["t5"] |= values

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (new_weights, "weights"),
        (new_tokenizer, "tokenizer"),
        (setting(max_tokens=4), "max_tokens"),
        (setting(storage_dtype="fp32"), "storage_dtype"),
        (setting(storage_dtype="int8"), "storage_dtype"),
        (setting(layer="penultimate"), "layer"),
        (setting(pad="keep"), "pad"),
        (setting(compute_dtype="bf16"), "compute_dtype"),
    ],
    ids=["weights", "tokenizer", "max_tokens", "fp32", "int8", "layer", "pad", "compute_dtype"],
)
def test_another_encoder_makes_its_own_cache_again(
    team: Team, change: Callable[[Team], None], field: str
) -> None:
    """All of that cache, nothing of the others, and the field is named."""
    before = team.bytes_of("embed/t5")
    change(team)
    assert team.run() == {"embed/t5": SHARDS | {"null"}}
    assert team.bytes_of("embed/t5").isdisjoint(before)
    assert any(line.startswith(f"embed/t5: config.{field}: ") for line in team.said)


def test_one_caption_makes_one_shard_of_text_again(team: Team) -> None:
    """Its pictures are the same, so their embeddings stay."""
    captions = list(CAPTIONS)
    captions[5] = "grEy disk on paper"  # as many bytes as before
    team.write_captions(captions)
    one = {"train-00002"}
    assert team.run() == {"ingest": one, "embed/t5": one, "embed/clip_text": one}
    assert "ingest/train-00002: done again: rows changed" in team.said
    assert "embed/t5/train-00002: done again: captions changed" in team.said


def test_one_picture_makes_one_shard_of_everything_but_text_again(team: Team) -> None:
    """The caption cache does not care what the picture shows."""
    Image.new("RGB", (9, 9), "white").save(team.path / "1.png")
    (team.path / "captions.csv").write_text(
        (team.path / "captions.csv").read_text().replace("1.png", "./1.png", 1)
    )
    one = {"train-00000"}
    assert team.run() == {"ingest": one, "embed/clip_image": one}


def test_appended_rows_make_only_their_own_shards(team: Team) -> None:
    """A list that grows at its end."""
    for index in (8, 9):
        Image.new("RGB", (8, 8), "white").save(team.path / f"{index}.png")
    team.write_captions([*CAPTIONS, "red", "blue"])
    new = {"train-00004"}
    assert team.run() == dict.fromkeys(
        ("ingest", "embed/t5", "embed/clip_text", "embed/clip_image"), new
    )


def test_going_back_makes_nothing(team: Team) -> None:
    """What was made under earlier settings is still there."""
    before = team.recipe["encoders"]["t5"]["max_tokens"]
    setting(max_tokens=9)(team)
    team.run()
    setting(max_tokens=before)(team)
    assert team.run() == {}


def test_the_loaders_of_the_documents_read_these_caches(team: Team) -> None:
    """The webdataset loader of docs/caches.md and the one with ediffi, run as they stand there."""
    page = (Path(__file__).parents[2] / "docs" / "caches.md").read_text(encoding="utf-8")
    alone, ours = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (ingest,) = (team.path / "store" / "ingest").iterdir()
    (t5,) = (team.path / "store" / "embed" / "t5").iterdir()
    places = {"store/ingest/1a2b": str(ingest), "store/embed/t5/3c4d": str(t5)}
    for name, place in places.items():
        alone, ours = alone.replace(name, place), ours.replace(name, place)
    names: dict[str, Json] = {}
    exec(alone.replace("00099", "00003"), names)
    found = [(caption, len(tokens)) for _, caption, tokens in names["joined"]()]
    assert found == [(caption, 5) for caption in CAPTIONS]
    encoder = f'weights="{team.path}/t5", max_tokens=12'
    ours = ours.replace('weights="google/t5-v1_1-xxl", max_tokens=113', encoder)
    ours = ours.replace("image_px=64", "image_px=8").replace("num_workers=2", "num_workers=0")
    seen: list[str] = []
    exec(ours.replace("print(", "seen.append(").replace("256", "1"), {"seen": _Seen(seen)})
    assert sorted(seen) == sorted(CAPTIONS)


class _Seen:
    """Takes what the document prints; keeps the captions."""

    def __init__(self, captions: list[str]) -> None:
        self._captions = captions

    def append(self, caption: str, *_: object) -> None:
        self._captions.append(caption)
