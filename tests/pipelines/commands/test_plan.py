"""Tests of pipelines.commands.plan: what `ediffi plan` tells people and programs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands.plan import human_bytes, human_time
from pipelines.commands.prices import parse_prices
from pipelines.errors import UserError
from pipelines.planning import plan
from pipelines.prediction.cost import Rate
from pipelines.prediction.probe import Probed
from pipelines.recipe import Recipe
from pipelines.store.ledger import Ledger
from tests.pipelines import in_process
from tests.pipelines.fake_stages import FakeStage, manifest, receipt, write_run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def filled(ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]) -> Ledger:
    """A store in which an encoder was run with one setting, and another is planned."""
    use_stages(*stages(0))
    in_process.run_recipe(demo_recipe, ledger)
    use_stages(*stages(7))
    return ledger


def stages(setting: int) -> tuple[FakeStage, ...]:
    return (
        FakeStage(name="ingest"),
        FakeStage(
            name="embed/t5",
            needs=("ingest",),
            units=("a", "b"),
            keys={"a": "settings:0", "b": f"settings:{setting}"},
            setting=setting,
        ),
        FakeStage(name="base", needs=("embed/t5",)),
    )


def test_programs_are_told_everything(ediffi: Callable[..., tuple], filled: Ledger) -> None:
    """One JSON object on stdout and nothing else."""
    code, out, err = ediffi("plan", "demo", "--json", "--price-per-device-hour", "3600")
    document = json.loads(out)
    assert (code, err, document["recipe"]) == (0, "", "demo")
    hit, miss, waiting = document["stages"]
    assert (hit["name"], hit["hit"], hit["reasons"], hit["units"]) == ("ingest", True, [], None)
    assert (miss["hit"], miss["reasons"]) == (False, ["config.setting: 0 -> 7"])
    assert miss["units"] == {
        "kept": 0,
        "taken_over": 1,
        "to_do": 1,
        "first": [{"unit": "b", "why": "settings changed"}],
    }
    assert Path(miss["path"]).name == miss["fingerprint"]
    assert miss["cost"]["device"] == "cpu"
    assert miss["cost"]["money"] == pytest.approx(miss["cost"]["device_hours"] * 3600)
    assert waiting["units"] is None
    assert waiting["note"] == "units can be told when embed/t5 is finished"


def test_a_stage_is_priced_by_its_node_group(
    ediffi: Callable[..., tuple], filled: Ledger, tmp_path: Path
) -> None:
    """By the group that the profile gives it; one that runs anywhere has no clear price."""
    group = "{cpus_per_node: 2, memory_per_node_gib: 4, prices_per_device_hour: {cpu: %s}}"
    profile = tmp_path / "far.yaml"
    place = "kind: ray\nray: {address: 'http://x'}\n"
    place += f"node_groups:\n  cheap: {group % 1}\n  dear: {group % 3600}\n"
    profile.write_text(place + "stages: {embed: dear}\n")
    told = ediffi("plan", "demo", "--json", "--cluster", str(profile))[1]
    _, miss, _ = json.loads(told)["stages"]
    assert miss["cost"]["money"] == pytest.approx(miss["cost"]["device_hours"] * 3600)
    profile.write_text(place)
    code, _, err = ediffi("plan", "demo", "--cluster", str(profile))
    assert (code, "cheap, dear ask different prices for a cpu" in err) == (2, True)


def test_people_are_told_why_and_how_much(ediffi: Callable[..., tuple], filled: Ledger) -> None:
    """A line a stage, beneath it the units, beneath them what they will take."""
    _, out, _ = ediffi("plan", "demo", "--price-per-device-hour", "cpu=2")
    lines = [line.split(None, 3) for line in out.splitlines()]
    assert lines[0][:2] == ["ingest", "hit"]
    assert lines[1][:2] + lines[1][3:] == ["embed/t5", "miss", "config.setting: 0 -> 7"]
    assert "units: 1 taken over, 1 to do: b (settings changed)" in out
    assert "cpu-hours" in out
    assert "at that price  (measured by " in out
    assert out.splitlines()[-1].startswith("total")


def test_a_probe_comes_before_what_was_measured_once(
    ediffi: Callable[..., tuple],
    filled: Ledger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked for so many samples, and says why it has no rate for a stage."""
    asked: list[int] = []

    def probe(recipe: Any, planned: Any, manifests: Any, num_samples: int) -> Probed:
        asked.append(num_samples)
        rate = Rate(
            num_samples_per_unit=0,
            seconds=1800,
            num_bytes=10,
            num_out_fraction=1,
            source="probe of 5 samples",
        )
        return Probed(rates={"embed/t5": rate}, left_out={"base": "not an encoder"})

    monkeypatch.setattr("pipelines.prediction.probe.probe", probe)
    _, out, _ = ediffi("plan", "demo", "--probe", "5", "--json")
    _, miss, base = json.loads(out)["stages"]
    assert asked == [5]
    assert (miss["cost"]["device_hours"], miss["cost"]["source"]) == (0.5, "probe of 5 samples")
    assert base["note"] == "units can be told when embed/t5 is finished"


def test_caches_are_predicted_before_ingest_is_finished(
    ediffi: Callable[..., tuple], filled: Ledger, demo_recipe: Recipe
) -> None:
    """From what ingest will hold: samples that are done already, and those to come."""
    record = plan(demo_recipe, filled)[0].record
    (record.directory / "manifest.json").unlink()
    ingest, embed, _ = json.loads(ediffi("plan", "demo", "--json")[1])["stages"]
    assert (ingest["units"]["kept"], ingest["units"]["to_do"], ingest["cost"]) == (1, 0, None)
    assert (embed["units"], embed["cost"]["num_samples"]) == (None, 1)


@pytest.mark.parametrize(
    ("texts", "prices"),
    [
        ([], {}),
        (["0.05"], {"gpu": 0.05, "cpu": 0.05}),
        (["gpu=2.5", "cpu=0"], {"gpu": 2.5, "cpu": 0.0}),
    ],
)
def test_prices(texts: list[str], prices: dict[str, float]) -> None:
    """One for all, or one a device."""
    assert parse_prices(texts) == prices


@pytest.mark.parametrize("text", ["", "x", "tpu=1", "gpu=", "-1", "nan", "inf", "=1"])
def test_what_is_no_price_is_refused(text: str) -> None:
    """With an example of what is."""
    with pytest.raises(UserError, match=r"--price-per-device-hour must be .* gpu=2\.5"):
        parse_prices([text])


def test_sizes_are_told_in_decimal_units() -> None:
    """As stores bill them."""
    sizes = [human_bytes(num) for num in (0, 999, 1000, 25_000_000, 3e12)]
    assert sizes == ["0 bytes", "999 bytes", "1.0 kB", "25.0 MB", "3.0 TB"]


def test_a_plan_needs_none_of_the_heavy_packages(tmp_path: Path) -> None:
    """With ingest finished and encoders to do, units and all: no torch, ray or mlflow."""
    code = f"""
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"torch", "ray", "mlflow", "transformers", "open_clip"}}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocker())
from pathlib import Path
from benchmarks.simulated_store import make_store
from pipelines.cli import main
scene = make_store(Path({str(tmp_path)!r}), 20)
sys.exit(main(["--store", str(scene.ledger.store), "plan", str(scene.recipe_path)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "units: 20 taken over, 1 to do: train-00000 (captions changed)" in done.stdout
    assert "units: 10 kept, 11 to do" in done.stdout


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (59, "59.0 s"), (90, "1.5 min"), (7200, "2.0 h"), (259200, "3.0 days")],
)
def test_times_are_told_in_the_unit_that_suits(seconds: float, text: str) -> None:
    """Days only from two on: hours are plainer before."""
    assert human_time(seconds) == text


def test_training_is_predicted_by_an_earlier_run(
    ediffi: Callable[..., tuple],
    ledger: Ledger,
    demo_recipe: Recipe,
    use_stages: Callable[..., None],
) -> None:
    """Before its inputs are there, too; the run that was measured is named."""
    use_stages(FakeStage(name="base", units=("base",)))
    (before,) = plan(demo_recipe, ledger)
    before.record.open({}, {})
    trained = receipt("base", num_in=1000, num_out=1000, seconds=50.0)
    manifest(before.record.directory, trained, stage="base")
    write_run(ledger, "run-1", resolved=demo_recipe.model_dump(mode="json"))
    use_stages(FakeStage(name="ingest"), FakeStage(name="base", needs=("ingest",)))
    _, base = json.loads(ediffi("plan", "demo", "--json")[1])["stages"]
    assert base["units"] is None
    assert base["cost"]["num_samples"] == demo_recipe.base.final_images
    assert base["cost"]["seconds"] == pytest.approx(demo_recipe.base.final_images * 0.05)
    assert base["cost"]["source"] == "measured by base of run run-1"
    assert "measured by base of run run-1" in ediffi("plan", "demo")[1]
