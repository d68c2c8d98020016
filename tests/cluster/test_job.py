"""Job specifications and the profiles they are made from."""

from pathlib import Path
from typing import Any

import pytest

from cluster.job import JobSpec, Profile, load_profile, profile_names

PLACE: dict[str, Any] = {"cpus_per_node": 16, "memory_per_node_gib": 128}


def test_every_shipped_profile_loads() -> None:
    """The profiles in the package are valid, and the laptop is among them."""
    assert "laptop" in profile_names()
    for name in profile_names():
        assert load_profile(name).name == name


def test_job_takes_the_place_of_its_profile() -> None:
    """Every field of the place reaches the specification."""
    place = {
        **PLACE,
        "image": "registry.example/ediffi:0.1.0",
        "num_nodes": 4,
        "accelerators_per_node": 8,
        "accelerator": "H100",
        "environment": {"NCCL_DEBUG": "WARN"},
    }
    profile = Profile.from_mapping("gpu-cluster", place)
    job = profile.job("train", ["ediffi", "run", "recipe.yaml"])
    assert job == JobSpec(name="train", command=("ediffi", "run", "recipe.yaml"), **place)


def test_job_environment_is_a_frozen_copy() -> None:
    """Neither the caller's dictionary nor the job's can change the job afterwards."""
    environment = {"A": "1"}
    job = JobSpec(name="j", command=("true",), environment=environment)
    environment["A"] = "2"
    assert job.environment == {"A": "1"}
    with pytest.raises(TypeError):
        job.environment["A"] = "3"  # type: ignore[index]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"command": ()}, "command must be"),
        ({"command": "ediffi run"}, "split a shell line"),
        ({"command": ("ediffi", 3)}, "command must be text"),
        ({"name": "Train_Base"}, "job name must be"),
        ({"name": "a" * 64}, "job name must be"),
        ({"num_nodes": 0}, "num_nodes must be .* at least 1, got 0"),
        ({"cpus_per_node": 1.5}, "cpus_per_node must be"),
        ({"accelerators_per_node": -1}, "accelerators_per_node must be"),
        ({"memory_per_node_gib": "24Gi"}, "write 24, not 24Gi"),
        ({"memory_per_node_gib": float("nan")}, "memory_per_node_gib"),
        ({"accelerator": "H100"}, "accelerators_per_node is 0"),
        ({"environment": {"NCCL-DEBUG": "x"}}, "no name of an environment variable"),
        ({"environment": {"DEBUG": False}}, "environment.DEBUG must be text, got False"),
    ],
)
def test_job_that_no_scheduler_could_run_is_refused(values: dict[str, Any], words: str) -> None:
    """The error names the field, what it must be and what was found."""
    with pytest.raises(ValueError, match=words):
        JobSpec(**{"name": "job", "command": ("true",), **values})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cpu_per_node: 2\nmemory_per_node_gib: 8\n", "did you mean cpus_per_node"),
        ("cpus_per_node: 2\n", "missing field 'memory_per_node_gib'"),
        ("- cpus_per_node: 2\n", "must hold a mapping of fields, got list"),
        ("", "must hold a mapping of fields, got NoneType"),
        ("cpus_per_node: [2\n", "not a YAML file"),
        (
            "cpus_per_node: 2\nmemory_per_node_gib: 8\nenvironment:\n  DEBUG: off\n",
            "environment.DEBUG must be text, got False",
        ),
        (
            "cpus_per_node: 2\nmemory_per_node_gib: 8\nenvironment: fast\n",
            "environment must map",
        ),
    ],
)
def test_profile_error_names_file_and_field(tmp_path: Path, text: str, words: str) -> None:
    """What is wrong in a profile is told with the file it is wrong in."""
    path = tmp_path / "here.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"here\.yaml: .*{words}"):
        load_profile(str(path))


def test_profile_by_path_is_named_after_its_file(tmp_path: Path) -> None:
    """A profile outside the package is as good as one inside."""
    path = tmp_path / "our-cluster.yaml"
    path.write_text("cpus_per_node: 16\nmemory_per_node_gib: 128\n")
    assert load_profile(str(path)) == Profile(name="our-cluster", **PLACE)


def test_unknown_profile_lists_the_known_ones() -> None:
    """A name that is no profile is answered with those that are."""
    with pytest.raises(ValueError, match=r"no profile 'latpop'.*laptop"):
        load_profile("latpop")
