"""Tests of pipelines.commands.doctor: the whole visit, as people and programs see it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.doctor import Finding, Needs
from pipelines.cli import main
from pipelines.store.ledger import Ledger


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Needs]:
    """The machine itself is not asked, and is fine; the list gets what would have been."""
    seen: list[Needs] = []

    def examine(needs: Needs) -> list[Finding]:
        seen.append(needs)
        return [Finding(name="python", ok=True, found="3.11")]

    monkeypatch.setattr("cluster.doctor.examine", examine)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return seen


def test_programs_get_an_object_a_finding(ediffi: Callable[..., tuple], asked: list[Needs]) -> None:
    """All is well: exit code 0."""
    code, out, err = ediffi("doctor", "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [one["name"] for one in told] == ["python", "store", "store's clock"]
    assert all(one["ok"] and not one["remedy"] for one in told)


def test_one_fault_is_enough(
    ediffi: Callable[..., tuple], asked: list[Needs], ledger: Ledger
) -> None:
    """Exit code 1, and the remedy below."""
    (ledger.store / "ediffi-store.json").write_text('{"format": 99}')
    code, out, _ = ediffi("doctor")
    assert code == 1
    assert out.startswith("ok   python")
    assert "BAD  store" in out
    assert "-> do what it says, or name another store with --store" in out


def test_a_bucket_is_tried_itself(
    asked: list[Needs], s3_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room is asked of the directory where work in flight lies."""
    assert main(["doctor", "--store", s3_store]) == 0
    assert f"{s3_store} can be written" in capsys.readouterr().out
    assert asked[0].disk_path.is_dir()
    assert main(["doctor", "--store", "s3://absent-bucket/x", "--json"]) == 1
    assert "absent-bucket" in capsys.readouterr().out


def test_a_recipe_says_how_much_room_it_needs(
    ediffi: Callable[..., tuple], asked: list[Needs], tmp_path: Path
) -> None:
    """Its weights and its sum are asked for; what cannot be predicted is named."""
    listed = tmp_path / "list.csv"
    listed.write_text("file,caption,split\na.png,a picture,train\nb.png,another,held_out\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\n"
        f"data: {{source: urls, list: {listed}, address_column: file, image_px: 16,\n"
        "  held_out: {column: split, value: held_out}}\n"
        "encoders: {t5: {family: transformers, weights: /no/such/model, max_tokens: 8}}\n"
    )
    code, _, err = ediffi("doctor", str(recipe))
    assert (code, err) == (0, "")
    (needs,) = asked
    assert needs.weights == {"t5": "/no/such/model"}
    assert needs.free_disk_gib == 10.0  # nothing of this kind was ever measured
    assert "the recipe cannot be planned from here" in needs.free_disk_why
    text = recipe.read_text().replace("/no/such/model", "google/t5-v1_1-small")
    recipe.write_text(text)
    ediffi("doctor", str(recipe))
    assert asked[1].free_disk_why.startswith("about 0.0 GiB to come, without ingest, embed/t5:")


def test_a_profile_is_asked_too(
    ediffi: Callable[..., tuple], asked: list[Needs], tmp_path: Path
) -> None:
    """What it names must be at hand; a profile that is not there is a clear error."""
    profile = tmp_path / "far.yaml"
    profile.write_text("kind: ray\nray: {address: 'http://127.0.0.1:1'}\n")
    code, out, _ = ediffi("doctor", "--cluster", str(profile))
    assert code == 1
    assert "BAD  far: address" in out
    code, _, err = ediffi("doctor", "--cluster", "nowhere")
    assert (code, "--cluster: no profile 'nowhere'" in err) == (2, True)
    assert len(asked) == 1  # a wrong name is told before anything is tried


def test_a_cluster_that_is_named_is_visited(
    ediffi: Callable[..., tuple], asked: list[Needs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAY_ADDRESS leads nowhere: told, with exit code 1."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    code, out, _ = ediffi("doctor")
    assert code == 1
    assert "nobody listens at 127.0.0.1:1" in out


RECIPE = """
name: mine
data: {source: urls, list: %s, address_column: file, image_px: 16}
encoders:
  t5: {family: transformers, weights: google/t5-v1_1-small, max_tokens: 8}
  clip: {family: open_clip_image, model: ViT-B-32, weights: openai}
resources:
  embed: {gpus: 8, cpus: 64, memory_gib: 100}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe that takes more than this machine has."""
    listed = tmp_path / "list.csv"
    listed.write_text("file,caption\na.png,a picture\n")
    (tmp_path / "mine.yaml").write_text(RECIPE % listed)
    return str(tmp_path / "mine.yaml")


def test_a_machine_must_have_what_the_largest_unit_takes(
    ediffi: Callable[..., tuple], asked: list[Needs], recipe: str
) -> None:
    """Cores, accelerators and memory of the recipe, and every encoder's weights."""
    ediffi("doctor", recipe)
    (needs,) = asked
    assert (needs.num_cpus, needs.num_accelerators, needs.memory_gib) == (64, 8, 100)
    assert needs.weights == {"t5": "google/t5-v1_1-small", "clip": "open_clip:ViT-B-32:openai"}


def test_a_place_is_asked_for_what_its_jobs_will_have(
    asked: list[Needs], recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own store, tracking server and nodes; this machine only submits."""
    profile = tmp_path / "far.yaml"
    profile.write_text(
        "kind: ray\nray: {address: 'http://127.0.0.1:1'}\n"
        f"shared_paths: [{tmp_path}]\nstore: {tmp_path}/theirs\n"
        "environment: {MLFLOW_TRACKING_URI: 'http://127.0.0.1:1'}\n"
        "node_groups: {small: {cpus_per_node: 2, memory_per_node_gib: 4}}\n"
        "stages: {embed: small}\n"
    )
    assert main(["doctor", recipe, "--cluster", str(profile), "--json"]) == 1
    findings = {one["name"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    (needs,) = asked
    assert needs.tracking_uri == "http://127.0.0.1:1"
    assert (needs.num_cpus, needs.num_accelerators) == (2, 0)
    assert needs.disk_path == tmp_path / "theirs"
    assert f"{tmp_path}/theirs can be written" in findings["store"]["found"]
    assert not findings["far: stages"]["ok"]
    assert "1 workers of 64 CPUs, 8 GPUs, 100 GiB" in findings["far: stages"]["found"]


def test_a_store_that_does_not_answer_stops_no_other_question(
    asked: list[Needs], recipe: str, s3_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it holds already cannot be told then; all the rest can."""
    assert main(["doctor", recipe, "--store", "s3://absent-bucket/x", "--json"]) == 1
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["name"] for one in findings if not one["ok"]] == ["store"]
    assert asked[0].weights
