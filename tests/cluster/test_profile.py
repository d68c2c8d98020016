"""Profiles: read, checked, and written into a job's record."""

from pathlib import Path
from typing import Any

import pytest

from cluster.places import KubeRaySettings
from cluster.profile import Profile, load_profile, profile_names

HERE = Path(__file__).with_name("profiles")
LOCK = Path(__file__).parents[2] / "requirements.lock"
GROUP = {"gpu": {"cpus_per_node": 16, "memory_per_node_gib": 128}}
DIGEST = "x@sha256:" + 64 * "0"
KUBERAY: dict[str, Any] = {"kind": "kuberay", "image": "x:1", "node_groups": GROUP}
SLURM: dict[str, Any] = {"kind": "slurm", "node_groups": GROUP, "slurm": {"directory": "/shared"}}
RAY: dict[str, Any] = {"kind": "ray", "ray": {"address": "http://10.0.0.5:8265"}}


def test_every_shipped_profile_loads() -> None:
    """The profiles in the package are valid, and the laptop is among them."""
    assert "laptop" in profile_names()
    for name in profile_names():
        assert load_profile(name).name == name


@pytest.mark.parametrize("path", sorted(HERE.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_profile_survives_a_record(path: Path) -> None:
    """What a job's record keeps of a profile makes the same profile again."""
    profile = load_profile(str(path))
    assert Profile.from_mapping(profile.name, profile.to_mapping()) == profile


def test_fields_reach_the_profile() -> None:
    """Groups, stages, prices and the section of its kind are as they were written."""
    profile = load_profile(str(HERE / "kuberay.yaml"))
    assert [group.name for group in profile.node_groups] == ["cpu", "gpu"]
    assert profile.node_groups[1].accelerators_per_node == 8
    assert dict(profile.stages) == {"base": "gpu", "experts": "gpu"}
    assert profile.kuberay is not None
    assert profile.kuberay.volumes[1].secret == "keys"
    assert profile.prices_per_device_hour_in("gpu") == {"gpu": 2.5, "cpu": 0.04}
    assert profile.prices_per_device_hour_in("cpu") == {"cpu": 0.04}


def test_what_a_place_shares_with_this_machine() -> None:
    """Everything, if it is this machine; else what lies below its shared paths."""
    assert load_profile("laptop").shares("/anything")
    profile = load_profile(str(HERE / "ray.yaml"))
    assert profile.shares("/shared/store")
    assert not profile.shares("/shared-not/store")
    assert not profile.shares("/home/me/store")
    near = Profile.from_mapping("near", {"kind": "ray", "ray": {"address": "http://127.0.0.2:1"}})
    assert near.shares("/home/me/store")


def test_values_that_go_along_are_named() -> None:
    """The webhook's address comes from a variable of any name."""
    assert load_profile(str(HERE / "ray.yaml")).passed == {
        "AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
        "EDIFFI_WEBHOOK_URL": "CHAT_ADDRESS",
    }


def test_pods_start_the_ray_that_was_tested() -> None:
    """KubeRay is told the version of the lock unless a profile says another."""
    assert f"ray=={KubeRaySettings().ray_version}\n" in LOCK.read_text()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "missing field 'kind'"),
        ({"kind": "kubray"}, "kind must be one of .*did you mean kuberay"),
        ({"kind": "local", "prise": 1}, "unknown field 'prise'"),
        ({"kind": "local", "image": 3}, "image must be text"),
        ({"kind": "local", "program": "ediffi"}, "program must be a list"),
        ({"kind": "local", "program": []}, "program must have a word"),
        ({"kind": "local", "node_groups": GROUP}, "this machine is what it is"),
        ({"kind": "local", "environment": {"DEBUG": False}}, "DEBUG must be text, got False"),
        ({"kind": "local", "environment": {"API_KEY": "x"}}, "API_KEY looks like a secret"),
        ({"kind": "local", "pass_environment": ["A-B"]}, "pass_environment: 'A-B' is no name"),
        ({"kind": "local", "webhook": "https://chat"}, "webhook: .* is no name"),
        ({"kind": "local", "deadline_s": 0}, "deadline_s must be whole seconds above 0"),
        ({"kind": "local", "start_deadline_s": "1h"}, "start_deadline_s must be"),
        ({"kind": "local", "max_restarts": -1}, "max_restarts must be"),
        ({"kind": "local", "shared_paths": ["data"]}, "shared_paths must be absolute"),
        ({"kind": "local", "pin": "exact"}, "pin must be one of lock, image, none"),
        ({"kind": "local", "prices_per_device_hour": {"tpu": 1}}, "must be one of cpu, gpu"),
        ({"kind": "local", "prices_per_device_hour": {"gpu": -1}}, "gpu must be a number"),
        ({"kind": "local", "ray": {"address": "http://x"}}, "ray: belongs to profiles of kind ray"),
        ({"kind": "ray"}, "ray: missing field 'address'"),
        ({"kind": "ray", "ray": {"address": "10.0.0.5:6379"}}, "address must be the dashboard's"),
        ({"kind": "ray", "ray": {"address": "http://u:p@x"}}, "without a password"),
        ({**KUBERAY, "image": ""}, "image must be named"),
        ({**KUBERAY, "pin": "image"}, "must end in @sha256:DIGEST"),
        ({**KUBERAY, "node_groups": {}}, "a group at least"),
        ({**KUBERAY, "node_groups": [1]}, "node_groups must map names to groups"),
        ({**KUBERAY, "pass_environment": ["A"]}, "pass_environment: .*name a secret"),
        ({**KUBERAY, "webhook": "CHAT"}, "webhook: .*name a secret"),
        ({**KUBERAY, "stages": {"base": "gpus"}}, "stages.base: no node group 'gpus'; groups: gpu"),
        ({**KUBERAY, "kuberay": {"namspace": "x"}}, "kuberay: unknown field .*namespace"),
        ({**KUBERAY, "kuberay": {"secret_variables": {"A": "b"}}}, "A must be SECRET/KEY"),
        ({**KUBERAY, "kuberay": {"volumes": {"name": "x"}}}, "volumes must be a list"),
        ({**KUBERAY, "kuberay": {"volumes": None}}, "volumes must be a list .*, got None: leave"),
        ({**KUBERAY, "kuberay": {"volumes": 3}}, "volumes must be a list .*, got 3"),
        (
            {**KUBERAY, "kuberay": {"volumes": [{"name": "x", "mount_path": "/x"}]}},
            r"volumes\[0\]: a volume is either a claim or a secret",
        ),
        ({**KUBERAY, "kuberay": {"run_as_user": 0}}, "run_as_user must be .* at least 1"),
        ({**SLURM, "slurm": {"directory": "work"}}, "slurm: directory must be an absolute path"),
        ({**SLURM, "slurm": {}}, "slurm: missing field 'directory'"),
        ({**SLURM, "node_groups": {**GROUP, "b": GROUP["gpu"]}}, "one group of nodes, got gpu, b"),
        ({**RAY, "stages": {"base": "gpu"}}, "no node group 'gpu'; groups: none"),
        ({**RAY, "image": "x:1"}, r"image: a place of kind ray cannot .* \(only kuberay\), got"),
        ({**RAY, "image": DIGEST, "pin": "image"}, "pin: image is for kind kuberay, got kind ray"),
        ({**RAY, "queue": "q"}, r"queue: .* kind ray .*\(only kuberay, slurm\), got 'q': leave it"),
        ({**RAY, "deadline_s": 60}, "deadline_s: a place of kind ray cannot follow it"),
        ({**RAY, "max_restarts": 1}, "max_restarts: a place of kind ray cannot follow it"),
        ({"kind": "local", "queue": "q"}, "queue: a place of kind local cannot follow it"),
        ({**SLURM, "image": "x:1"}, "image: a place of kind slurm cannot follow it"),
        ({**SLURM, "start_deadline_s": 60}, "start_deadline_s: a place of kind slurm cannot"),
        (
            {**SLURM, "node_groups": {"gpu": {**GROUP["gpu"], "min_nodes": 0}}},
            r"node_groups\.gpu\.min_nodes: a place of kind slurm cannot follow it",
        ),
        (
            {**SLURM, "node_groups": {"gpu": {**GROUP["gpu"], "shared_memory_gib": 8}}},
            r"node_groups\.gpu\.shared_memory_gib: .*kuberay, ray\), got 8",
        ),
        (
            {**RAY, "node_groups": {"gpu": {**GROUP["gpu"], "tolerations": ["x"]}}},
            r"node_groups\.gpu\.tolerations: a place of kind ray",
        ),
    ],
)
def test_a_profile_that_is_wrong_is_refused(values: dict[str, Any], words: str) -> None:
    """The error names the field, what it must be, what was found, and what to do."""
    with pytest.raises(ValueError, match=words):
        Profile.from_mapping("here", values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_nodes": 0}, "num_nodes must be .* at least 1, got 0"),
        ({"min_nodes": 2}, r"min_nodes must be at most num_nodes \(1\), got 2"),
        ({"cpus_per_node": 1.5}, "cpus_per_node must be"),
        ({"accelerators_per_node": -1}, "accelerators_per_node must be"),
        ({"memory_per_node_gib": "24Gi"}, "a positive number of GiB, got '24Gi'"),
        ({"memory_per_node_gib": float("nan")}, "memory_per_node_gib"),
        ({"shared_memory_gib": 128}, "must be below memory_per_node_gib"),
        ({"accelerator": "H100"}, "accelerators_per_node is 0"),
        ({"labels": {"a": 1}}, "labels.a must be text"),
        ({"cpu_per_node": 1}, "did you mean cpus_per_node"),
    ],
)
def test_a_group_that_is_wrong_is_refused(values: dict[str, Any], words: str) -> None:
    """The error says which group."""
    group = {"cpus_per_node": 16, "memory_per_node_gib": 128, **values}
    with pytest.raises(ValueError, match=rf"node_groups\.gpu: .*{words}"):
        Profile.from_mapping("here", {**KUBERAY, "node_groups": {"gpu": group}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- kind: local\n", "must hold a mapping of fields, got list"),
        ("", "must hold a mapping of fields, got NoneType"),
        ("kind: [local\n", "not a YAML file"),
        ("kind: local\nenvironment: fast\n", "environment must map"),
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
    path.write_text("kind: local\n")
    assert load_profile(str(path)) == Profile(name="our-cluster", kind="local")


def test_unknown_profile_lists_the_known_ones() -> None:
    """A name that is no profile is answered with those that are."""
    with pytest.raises(ValueError, match=r"no profile 'latpop'.*laptop"):
        load_profile("latpop")
