"""RayJob manifests: against the operator's schema, where it is at hand, and field by field."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster import kuberay
from cluster.job import JobSpec
from cluster.kuberay_rules import problems
from cluster.profile import Profile, load_profile

PROFILES = Path(__file__).with_name("profiles")
SCHEMA = Path(__file__).parents[3] / "shared" / "data" / "kuberay" / "ray.io_rayjobs.yaml"


def job_at(profile: Profile, *words: str) -> JobSpec:
    """A job at a place."""
    return JobSpec(name="ediffi-demo-1", command=words or ("ediffi", "run"), profile=profile)


def manifest_of(name: str) -> Any:
    """The manifest of a job at one of the profiles beside this file."""
    return yaml.safe_load(kuberay.render(job_at(load_profile(str(PROFILES / f"{name}.yaml")))))


def strict(schema: Any) -> Any:
    """A schema of Kubernetes as one of JSON that refuses unknown fields, as the API server does."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    is_object = made.get("type") == "object" and isinstance(made.get("properties"), dict)
    if is_object and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    return made


@functools.cache
def operators_schema() -> Any:
    """The schema of a RayJob; a megabyte of YAML."""
    crd = yaml.load(SCHEMA.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def schema_problems(manifest: Any) -> list[str]:
    """What the operator's schema has against a manifest; skips where it cannot be asked."""
    if not SCHEMA.is_file():
        pytest.skip("the KubeRay schemas do not lie beside this checkout")
    found = Validator(operators_schema()).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in found]


def _rules_in_words(
    _validator: object, rules: list[dict[str, str]], _value: object, _schema: object
) -> Iterator[jsonschema.ValidationError]:
    """The API server evaluates these; nothing here can, so no field of ours may have any."""
    yield from (jsonschema.ValidationError(f"has a rule: {one['rule']}") for one in rules)


Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator, {"x-kubernetes-validations": _rules_in_words}
)


@pytest.mark.parametrize("name", ["kuberay", "autoscaled"])
def test_the_operator_takes_the_manifest(name: str) -> None:
    """Every field is known to KubeRay's schema, with its type; and our own rules agree."""
    assert schema_problems(manifest_of(name)) == []
    assert problems(manifest_of(name)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entrypiont"), "x"),
        (("spec", "managedBy"), "ray.io/kuberay-operator"),
        (("spec", "backoffLimit"), "2"),
        (("spec", "preRunningDeadlineSeconds"), 0),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers"), [{}]),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ],
)
def test_the_schema_would_have_refused_it(path: tuple[str, ...], value: Any) -> None:
    """The check above can fail: a wrong name, type, number, word, a rule or a missing field."""
    manifest = manifest_of("kuberay")
    node = manifest
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert schema_problems(manifest) != []


def test_secrets_are_references() -> None:
    """By name of secret and key; no variable that looks like one has a value."""
    manifest = manifest_of("kuberay")
    cluster = manifest["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "store-credentials"}}]
        hook = next(one for one in container["env"] if one["name"] == "EDIFFI_WEBHOOK_URL")
        assert hook == {
            "name": "EDIFFI_WEBHOOK_URL",
            "valueFrom": {"secretKeyRef": {"name": "chat", "key": "url"}},
        }


def test_pods_that_have_to_go_are_told_in_time() -> None:
    """By a file, before Ray hears of it; and a driver that is told to end may save for as long."""
    cluster = manifest_of("kuberay")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        values = {one["name"]: one.get("value") for one in container["env"]}
        assert values["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
        _, _, words = container["lifecycle"]["preStop"]["exec"]["command"]
        assert words == f"touch {values['EDIFFI_PREEMPTION_FILE']}; sleep 110"
        assert pod["terminationGracePeriodSeconds"] > 110


def test_groups_become_groups_of_workers() -> None:
    """With their number, devices, memory, shared memory, labels and tolerations."""
    cpu, gpu = manifest_of("kuberay")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (cpu["groupName"], gpu["groupName"]) == ("cpu", "gpu")
    assert (gpu["minReplicas"], gpu["replicas"], gpu["maxReplicas"]) == (4, 4, 4)
    pod = gpu["template"]["spec"]
    amounts = {"cpu": "16", "memory": "130560Mi", "nvidia.com/gpu": "8"}
    assert pod["containers"][0]["resources"] == {"requests": amounts, "limits": amounts}
    assert pod["nodeSelector"] == {
        "pool": "training",
        "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
    }
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert pod["volumes"][0] == {
        "name": "shm",
        "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"},
    }
    mounts = {one["name"]: one["mountPath"] for one in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"shm": "/dev/shm", "cache": "/cache", "keys": "/keys"}


def test_a_job_in_a_queue_waits_to_be_admitted() -> None:
    """Kueue finds it by its label, and it is suspended until then; without a queue it is not."""
    manifest = manifest_of("kuberay")
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert manifest["spec"]["suspend"] is True
    assert "suspend" not in manifest_of("autoscaled")["spec"]


def test_limits_reach_the_operator() -> None:
    """Deadlines and restarts; what the profile leaves out is left out."""
    spec = manifest_of("kuberay")["spec"]
    limits = ("activeDeadlineSeconds", "preRunningDeadlineSeconds", "backoffLimit")
    assert [spec[name] for name in limits] == [86400, 1800, 2]
    assert not {"activeDeadlineSeconds", "preRunningDeadlineSeconds"} & set(
        manifest_of("autoscaled")["spec"]
    )


def test_nodes_come_as_they_are_needed() -> None:
    """With min_nodes the autoscaler is on, and starts with so many."""
    cluster = manifest_of("autoscaled")["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 4)


def test_what_kuberay_would_refuse_is_refused_here() -> None:
    """The error names the profile and what is wrong, before anything is sent."""
    values = load_profile(str(PROFILES / "autoscaled.yaml")).to_mapping() | {"queue": "q"}
    profile = Profile.from_mapping("ours", values)
    with pytest.raises(ValueError, match=r"profile ours: .*leave min_nodes out"):
        kuberay.render(job_at(profile))
    with pytest.raises(ValueError, match="a shell reads"):
        kuberay.render(job_at(load_profile(str(PROFILES / "kuberay.yaml")), "run", "a b;c"))
