"""Our own rules of RayJobs: each is broken once, and the rest of the manifest stays right."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import kuberay
from cluster.job import JobSpec
from cluster.kuberay_rules import problems
from cluster.profile import load_profile

PROFILE = load_profile(str(Path(__file__).with_name("profiles") / "kuberay.yaml"))
RIGHT = kuberay.manifest(JobSpec(name="ediffi-demo-1", command=("ediffi", "run"), profile=PROFILE))
Json = Any


def cluster(manifest: Json) -> Json:
    """The Ray cluster of a manifest."""
    return manifest["spec"]["rayClusterSpec"]


def container(manifest: Json) -> Json:
    """The head's container."""
    return cluster(manifest)["headGroupSpec"]["template"]["spec"]["containers"][0]


def worker(manifest: Json) -> Json:
    """The first group of workers."""
    return cluster(manifest)["workerGroupSpecs"][0]


def test_a_right_manifest_has_no_problems() -> None:
    """Else the cases below would show nothing."""
    assert problems(RIGHT) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: m["metadata"].update(name="a" * 48), "metadata.name: .*at most 47"),
        (lambda m: m["metadata"].update(name="1-x"), "begin with a letter"),
        (lambda m: m["metadata"]["labels"].update(a="b c"), "metadata.labels: a='b c'"),
        (lambda m: m["spec"].update(submissionMode="K8s"), "spec.submissionMode: must be one of"),
        (lambda m: m["spec"].update(entrypoint=" "), "spec.entrypoint: must hold"),
        (lambda m: m["spec"].update(entrypoint="run $HOME"), "characters that a shell reads"),
        (lambda m: m["spec"].update(ttlSecondsAfterFinished=-1), "ttlSeconds.*at least 0, got -1"),
        (lambda m: m["spec"].update(backoffLimit=-1), "backoffLimit: must be at least 0"),
        (lambda m: m["spec"].update(activeDeadlineSeconds=0), "activeDeadlineSeconds.*at least 1"),
        (lambda m: m["spec"].update(shutdownAfterJobFinishes=False), "needs shutdownAfter"),
        (lambda m: m["spec"].update(deletionStrategy={}), "deletionStrategy: must hold rules"),
        (lambda m: m["spec"].update(clusterSelector={"a": "b"}), "suspend: a cluster that was"),
        (lambda m: m["spec"].pop("rayClusterSpec"), "rayClusterSpec: must be there"),
        (lambda m: m["spec"].update(submissionMode="SidecarMode"), "not taken in SidecarMode"),
        (
            lambda m: m["spec"].update(submissionMode="InteractiveMode"),
            "backoffLimit: must be 0 in InteractiveMode",
        ),
        (
            lambda m: m["spec"]["submitterPodTemplate"]["spec"].update(restartPolicy="Always"),
            "submitterPodTemplate: restartPolicy must be Never or OnFailure",
        ),
        (
            lambda m: worker(m)["template"]["spec"].update(restartPolicy="Sometimes"),
            r"workerGroupSpecs\[0\]: restartPolicy is no policy",
        ),
        (lambda m: worker(m).update(minReplicas=3), "0 <= minReplicas <= replicas <= maxReplicas"),
        (lambda m: worker(m).update(groupName="gpu"), "the group 'gpu' stands twice"),
        (lambda m: worker(m).update(groupName="8gpu"), "a group's name must begin with a letter"),
        (lambda m: worker(m)["rayStartParams"].update(labels="a=b"), "rayStartParams.labels"),
        (lambda m: worker(m)["rayStartParams"].update({"num-cpus": 1}), "must be text"),
        (
            lambda m: cluster(m)["headGroupSpec"].update(resources={"CPU": "1"}),
            "both in rayStartParams and in resources",
        ),
        (lambda m: worker(m).update(labels={"a": "-"}), r"labels: a='-' is no label"),
        (lambda m: worker(m)["template"]["spec"].update(containers=[]), "must have a container"),
        (lambda m: cluster(m).update(rayVersion="2.9.0"), "tokens need Ray 2.52 or newer"),
        (lambda m: cluster(m).pop("rayVersion"), "rayVersion: tokens need"),
        (
            lambda m: container(m)["env"].append({"name": "HF_TOKEN", "value": "x"}),
            "HF_TOKEN looks like a secret and stands there in plain",
        ),
        (
            lambda m: container(m)["volumeMounts"].append({"name": "no", "mountPath": "/no"}),
            "no volume 'no' to mount at /no",
        ),
        (
            lambda m: container(m)["volumeMounts"].append({"name": "shm", "mountPath": "/cache"}),
            "two volumes are mounted at /cache",
        ),
        (
            lambda m: container(m).update(
                resources={"requests": {"x/gpu": "1"}, "limits": {"x/gpu": "2"}}
            ),
            "x/gpu must be asked for as it is allowed",
        ),
        (lambda m: m["spec"].update(suspend=False), "must be true for a job in a queue"),
        (lambda m: cluster(m).update(enableInTreeAutoscaling=True), "leave min_nodes out"),
        (
            lambda m: cluster(m).update(
                workerGroupSpecs=[worker(m) | {"groupName": f"g{i}"} for i in range(8)]
            ),
            "Kueue admits at most 7 groups",
        ),
    ],
)
def test_a_broken_rule_is_told(spoil: Callable[[Json], object], words: str) -> None:
    """With the field it stands in."""
    manifest = copy.deepcopy(RIGHT)
    spoil(manifest)
    found = problems(manifest)
    assert found
    with pytest.raises(ValueError, match=words):
        raise ValueError("; ".join(found))
