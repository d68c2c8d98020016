"""Tests of pipelines.commands.cost: what `ediffi cost` tells people and programs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.jobs.submitted import Job, Jobs
from pipelines.planning import plan
from pipelines.recipe import Recipe
from pipelines.store.ledger import Ledger
from tests.pipelines.fake_stages import FakeStage, manifest, receipt, write_run


@pytest.fixture
def filled(ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]) -> Ledger:
    """A run that trained two experts and found the pictures."""
    use_stages(FakeStage(name="ingest"), FakeStage(name="experts", needs=("ingest",)))
    ingest, experts = plan(demo_recipe, ledger)
    manifest(ingest.record.directory, receipt("a", num_in=1000, num_out=900, seconds=36.0))
    made = [receipt(name, num_in=500, num_out=500, seconds=1800.0) for name in ("low", "high")]
    manifest(experts.record.directory, *made, stage="experts")
    common = {"seconds": 3600.0, "units": 2, "path": ""}
    rows = [
        {"name": "ingest", "fingerprint": ingest.fingerprint, "state": "cached", **common},
        {
            "name": "experts",
            "fingerprint": experts.fingerprint,
            "state": "ran",
            "worker_seconds": 7200.0,
            "cpus": 1.0,
            "gpus": 0.0,
            **common,
        },
    ]
    write_run(ledger, "run-1", resolved=demo_recipe.model_dump(mode="json"), stages=rows)
    return ledger


def test_people_see_stages_experts_and_sums(ediffi: Callable[..., tuple], filled: Ledger) -> None:
    """Device-seconds, what a thousand images took, what was saved, and the price."""
    code, out, err = ediffi("cost", "--price-per-device-hour", "cpu=2")
    assert (code, err) == (0, "")
    assert out.startswith("run-1  finished\n")
    assert "7,200.0 cpu-s" in out
    assert "saved at least 36.0" in out
    assert "made by run-1" in out
    assert "  low" in out
    assert "spent                    2 cpu-hours, 4.00 at that price" in out
    assert "saved by the store       0.01 cpu-hours, 0.02 at that price" in out


def test_programs_are_told_the_same(ediffi: Callable[..., tuple], filled: Ledger) -> None:
    """One object; money is absent where no price was given."""
    document = json.loads(ediffi("cost", "run-1", "--json")[1])
    assert document["device_hours"] == {"gpu": 0.0, "cpu": 2.0}
    assert document["saved_device_hours"]["cpu"] == pytest.approx(0.01)
    assert (document["money"], document["prices_per_device_hour"]) == (None, {})
    ingest, experts = document["stages"]
    assert (ingest["stage"], ingest["state"], ingest["device_s"]) == ("ingest", "cached", 0.0)
    assert set(experts["device_s_by_unit"]) == {"low", "high"}
    assert experts["device_s_per_thousand_images"] == pytest.approx(7200.0)


def test_a_profile_has_prices(ediffi: Callable[..., tuple], filled: Ledger, tmp_path: Path) -> None:
    """Those said on the command line come before them."""
    profile = tmp_path / "mine.yaml"
    profile.write_text("kind: local\nprices_per_device_hour: {cpu: 10, gpu: 1}\n")
    words = ("cost", "--json", "--cluster", str(profile))
    assert json.loads(ediffi(*words)[1])["money"] == 20.0
    assert json.loads(ediffi(*words, "--price-per-device-hour", "cpu=1")[1])["money"] == 2.0


def test_what_is_not_there_is_a_clear_error(ediffi: Callable[..., tuple], ledger: Ledger) -> None:
    """An empty store, an unknown run, an unknown profile."""
    code, _, err = ediffi("cost")
    assert (code, "no runs in" in err) == (2, True)
    code, _, err = ediffi("cost", "run-9")
    assert (code, "no run in" in err) == (2, True)
    code, _, err = ediffi("cost", "--cluster", "nowhere")
    assert (code, "--cluster: no profile 'nowhere'" in err) == (2, True)


CLUSTER = """
kind: ray
ray: {address: "http://127.0.0.1:1"}
prices_per_device_hour: {cpu: 1}
node_groups:
  small: {cpus_per_node: 2, memory_per_node_gib: 4}
  large: {cpus_per_node: 2, memory_per_node_gib: 4, prices_per_device_hour: {cpu: 4}}
"""


def test_each_stage_costs_what_its_nodes_cost(
    ediffi: Callable[..., tuple], filled: Ledger, tmp_path: Path
) -> None:
    """By its node group; of a stage that runs anywhere, prices that differ have to be said."""
    profile = tmp_path / "mine.yaml"
    words = ("cost", "--json", "--cluster", str(profile))
    profile.write_text(CLUSTER + "stages: {experts: large, ingest: small}\n")
    document = json.loads(ediffi(*words)[1])
    assert document["money"] == 8.0
    assert document["saved_money"] == pytest.approx(0.01)
    assert document["prices_per_device_hour"] == {"ingest": 1.0, "experts": 4.0}
    profile.write_text(CLUSTER)
    code, _, err = ediffi(*words)
    assert (code, "small, large ask different prices for a cpu" in err) == (2, True)
    assert json.loads(ediffi(*words, "--price-per-device-hour", "cpu=4")[1])["money"] == 8.0


def test_a_job_costs_what_its_own_place_does(
    ediffi: Callable[..., tuple], filled: Ledger, demo_recipe: Recipe
) -> None:
    """Its record holds the profile; the group that the run's recipe names counts."""
    group = {"cpus_per_node": 2, "memory_per_node_gib": 4, "prices_per_device_hour": {"cpu": 5.0}}
    place = {"kind": "ray", "ray": {"address": "http://x"}, "node_groups": {"dear": group}}
    job = Job(
        job_id="ediffi-demo-1",
        recipe="demo",
        profile=place,
        profile_name="there",
        kind="ray",
        store=str(filled.store),
        stages=(),
        command=("ediffi",),
        environment="",
    )
    Jobs(filled).write(job)
    resolved = demo_recipe.model_dump(mode="json")
    resolved["resources"] = {"experts": {"node_group": "dear"}}
    filled.write_run(filled.run("run-1") | {"resolved": resolved, "job": job.job_id})
    assert json.loads(ediffi("cost", "--json")[1])["money"] == 10.0
    cheap = {**group, "prices_per_device_hour": {"cpu": 1.0}}
    Jobs(filled).write(replace(job, profile={**place, "node_groups": {"dear": group, "b": cheap}}))
    code, out, err = ediffi("cost", "--json")  # nobody asked for the price of ingest
    assert (code, json.loads(out)["prices_per_device_hour"]) == (0, {"experts": 5.0})
    assert "ingest has no price" in err
