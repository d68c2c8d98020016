"""The whole pipeline through the command line, on a tiny recipe and real components."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load

import ediffi
from ediffi.ensemble_file import read_ensemble_info

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STAGES = (
    *("ingest", "clip_fit", "embed/t5", "embed/clip_text", "embed/clip_image"),
    *("base", "experts", "assemble", "sample", "evaluate", "report"),
)


def states(result: Any) -> dict[str, str]:
    """State of every stage of a result."""
    return {row["name"]: row["state"] for row in result["stages"]}


def test_every_stage_runs_and_is_reported(undisturbed: Any) -> None:
    """A first run reports each stage as run, with its units, seconds, fingerprint and folder."""
    assert states(undisturbed) == dict.fromkeys(STAGES, "ran")
    assert all(row["units"] and row["seconds"] > 0 for row in undisturbed["stages"])
    assert all(Path(row["path"]).name == row["fingerprint"] for row in undisturbed["stages"])


def test_bad_rows_are_named_and_counted(project: Any, undisturbed: Any) -> None:
    """Corrupt, truncated, missing, wordless and unreachable rows are rejected by name, no other."""
    receipts = project.manifest(undisturbed, "ingest")["receipts"]
    rejects: dict[str, list[str]] = {}
    for receipt in receipts:
        for reason, keys in receipt["rejects"].items():
            rejects.setdefault(reason, []).extend(keys)
    assert rejects == {
        "image_undecodable": ["corrupt"],
        "image_truncated": ["truncated"],
        "http_404": ["gone"],
        "caption_empty": ["wordless"],
        "dead_host": ["dead"],
    }
    num_out = {"train": 0, "held_out": 0}
    for receipt in receipts:
        num_out[receipt["facts"]["split"]] += receipt["num_out"]
    assert num_out == {"train": 96, "held_out": 24}


def test_embeddings_are_read_by_webdataset_alone(project: Any, undisturbed: Any) -> None:
    """An embedding shard joins its image shard by key in a plain webdataset loader."""
    images = project.manifest(undisturbed, "ingest")["receipts"][0]
    row = next(row for row in undisturbed["stages"] if row["name"] == "embed/t5")
    folder = Path(undisturbed["stages"][0]["path"])
    pictures = wds.WebDataset(str(folder / images["facts"]["shard"]), shardshuffle=False)
    states = wds.WebDataset(str(Path(row["path"]) / images["facts"]["shard"]), shardshuffle=False)
    keys = [sample["__key__"] for sample in pictures]
    found = {sample["__key__"]: load(sample["safetensors"])["tokens"] for sample in states}
    assert list(found) == keys
    assert {tokens.shape[1] for tokens in found.values()} == {384}


def test_a_finished_run_imports_nothing_heavy(project: Any, undisturbed: Any) -> None:
    """The same command again finds everything, without Ray, torch or MLflow, in another run."""
    code = (
        "import sys; from pipelines.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'ray', 'torch', 'mlflow', 'deepspeed'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *project.arguments("store", "--json")],
        cwd=project.path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert states(again) == dict.fromkeys(STAGES, "cached")
    assert again["ensemble"] == undisturbed["ensemble"]
    assert again["run_id"] != undisturbed["run_id"]


def test_the_ensemble_draws_on_its_own(undisturbed: Any, tmp_path: Path) -> None:
    """The ensemble directory, copied elsewhere, draws the same picture whatever the batch."""
    copy = tmp_path / "ensemble"
    Path(undisturbed["ensemble"]).rename(copy)
    try:
        generator = ediffi.load(copy)
        prompts = ["a red circle on the left", "a blue ring at the top"]
        both = generator.draw(prompts, seeds=[3, 4])
        alone = generator.draw(prompts[1:], seeds=[4])
    finally:
        copy.rename(undisturbed["ensemble"])
    assert both.shape == (2, 3, 16, 16)
    assert (both[1].int() - alone[0].int()).abs().max() <= 1


def test_experts_own_the_papers_intervals(undisturbed: Any) -> None:
    """The ensemble's experts carry the recipe's split, and each has seen its images."""
    info = read_ensemble_info(Path(undisturbed["ensemble"]))
    assert [expert.name for expert in info.experts] == ["low", "middle", "high"]
    assert {expert.images_seen for expert in info.experts} == {128}
    assert info.base is not None
    assert info.base.images_seen == 5120


def test_pictures_and_report_lie_in_the_store(undisturbed: Any) -> None:
    """The grid shows both models; the report holds loss by noise bin, distance and alignment."""
    paths = {row["name"]: Path(row["path"]) for row in undisturbed["stages"]}
    with Image.open(paths["sample"] / "grid.png") as grid:
        assert grid.width > 2 * 2 * 96  # two models, two seeds, enlarged pictures
    report = json.loads((paths["report"] / "report.json").read_text())
    assert len(report["loss"]["base"]) == len(report["loss"]["ensemble"]) == 4
    assert report["alignment"]["real"]["score"] == 1
    assert report["distance"]["ensemble"]["frechet"] > report["distance"]["train"]["frechet"]
    page = (paths["report"] / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3  # grid, drawings, losses


def test_mlflow_mirrors_the_run(undisturbed: Any) -> None:
    """Parent, a child per stage, a grandchild per expert; data sets, pictures and metrics."""
    store = Path(undisturbed["store"])
    client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    query = f"tags.`ediffi.run_id` = '{undisturbed['run_id']}'"
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id], query)}
    assert set(runs) == {"tiny", *STAGES, "low", "middle", "high"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs["tiny"].info.run_id
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in STAGES} == {parent}
    assert runs["low"].data.tags["mlflow.parentRunId"] == runs["experts"].info.run_id
    assert runs["tiny"].data.params["base.total_images"] == "5120"
    losses = client.get_metric_history(runs["base"].info.run_id, "loss")
    assert [metric.step for metric in losses][-1] == 5120
    digests = {one.dataset.name: one.dataset.digest for one in runs["base"].inputs.dataset_inputs}
    rows = {row["name"]: row for row in undisturbed["stages"]}
    assert digests["ingest"] == rows["ingest"]["fingerprint"]
    files = {
        name: client.list_artifacts(runs[name].info.run_id)
        for name in ("sample", "evaluate", "report")
    }
    assert [one.path for one in files["sample"]] == ["grid.png"]
    assert "loss_by_sigma.png" in [one.path for one in files["evaluate"]]
    assert [one.path for one in files["report"]] == ["report.html", "report.json"]
    assert "ensemble/text_alignment" in runs["report"].data.metrics
    assert [one.path for one in client.list_artifacts(runs["base"].info.run_id, "curves")]
    assert runs["ingest"].data.metrics["rejects/http_404"] == 1


def test_changed_experts_rerun_only_what_follows(project: Any, undisturbed: Any) -> None:
    """New expert settings leave all up to the base cached, linked to the run that made it."""
    result = project.run("store", "--set=experts.train.lr=2e-4")
    after = ("experts", "assemble", "sample", "evaluate", "report")
    assert states(result) == {name: "ran" if name in after else "cached" for name in STAGES}
    client = MlflowClient(tracking_uri=f"sqlite:///{Path(result['store']) / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None

    def run_of(result: Any, stage: str) -> Any:
        query = f"tags.`ediffi.run_id` = '{result['run_id']}' and tags.`ediffi.stage` = '{stage}'"
        return client.search_runs([experiment.experiment_id], query)[0]

    base = run_of(undisturbed, "base").info.run_id
    assert run_of(result, "base").data.tags["cached_from"] == base
    assert "config.train.lr" in run_of(result, "experts").data.tags["ediffi.reason"]
