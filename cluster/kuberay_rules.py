"""What KubeRay and Kueue refuse in a RayJob beyond the schema of its fields.

The operator tells such things only after the manifest has been taken, in the job's status. Here
they are told before anything is sent. The rules follow the operator's own validation, v1.7.0.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.fields import looks_secret

Json = Mapping[str, Any]
MAX_NAME_LENGTH = 47
MAX_KUEUE_GROUPS = 7
OLDEST_RAY_WITH_TOKENS = (2, 52)
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
SECRET_FREE = ("RAY_AUTH_MODE",)

_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
# The entrypoint goes through a shell in the submitter and another one beside the driver.
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_./:@%+=,-]+")


def problems(manifest: Json) -> list[str]:
    """All that would be refused, each with the field it stands in; none: it may be sent."""
    found = [*_metadata(manifest.get("metadata", {}))]
    spec = manifest.get("spec", {})
    found += _job(spec)
    if cluster := spec.get("rayClusterSpec"):
        found += _cluster(cluster)
        found += _submission(spec, cluster)
        if QUEUE_LABEL in manifest.get("metadata", {}).get("labels", {}):
            found += _kueue(spec, cluster)
    elif not spec.get("clusterSelector"):
        found.append("spec.rayClusterSpec: must be there, a job needs a cluster")
    return found


def _metadata(metadata: Json) -> Iterator[str]:
    name = str(metadata.get("name", ""))
    if not _DNS_LABEL.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        yield (
            f"metadata.name: must begin with a letter and be at most {MAX_NAME_LENGTH} lower-case "
            f"letters, digits and inner hyphens, got {name!r}"
        )
    yield from _labels("metadata.labels", metadata.get("labels", {}))


def _labels(where: str, labels: Json) -> Iterator[str]:
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(str(value)):
            yield f"{where}: {key}={value!r} is no label that Kubernetes takes"


def _job(spec: Json) -> Iterator[str]:
    """Numbers and words of the job itself."""
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in SUBMISSION_MODES:
        yield f"spec.submissionMode: must be one of {', '.join(SUBMISSION_MODES)}, got {mode!r}"
    words = str(spec.get("entrypoint", "")).split()
    if not words and mode != "InteractiveMode":
        yield "spec.entrypoint: must hold a command"
    for word in words:
        if not _PLAIN_WORD.fullmatch(word):
            yield (
                f"spec.entrypoint: the word {word} has characters that a shell reads; two shells "
                "stand between here and the driver: rename what it names"
            )
    for name, least in (
        ("ttlSecondsAfterFinished", 0),
        ("backoffLimit", 0),
        ("activeDeadlineSeconds", 1),
        ("preRunningDeadlineSeconds", 1),
    ):
        if (value := spec.get(name, least)) < least:
            yield f"spec.{name}: must be at least {least}, got {value}"
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    if not shuts_down and spec.get("ttlSecondsAfterFinished", 0) > 0:
        yield "spec.ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if not shuts_down and spec.get("suspend"):
        yield "spec.suspend: needs shutdownAfterJobFinishes"
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield "spec.suspend: a cluster that was there before cannot be suspended"
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "spec.backoffLimit: must be 0 in InteractiveMode"
    if "deletionStrategy" in spec and not spec["deletionStrategy"]:
        yield "spec.deletionStrategy: must hold rules, or be left out"


def _submission(spec: Json, cluster: Json) -> Iterator[str]:
    """What holds between the way of submitting and the pods."""
    if spec.get("submissionMode") == "SidecarMode":
        for name in ("submitterPodTemplate", "submitterConfig"):
            if name in spec:
                yield f"spec.{name}: is not taken in SidecarMode"
    submitter = spec.get("submitterPodTemplate", {}).get("spec", {})
    if submitter and submitter.get("restartPolicy") not in ("Never", "OnFailure"):
        yield (
            "spec.submitterPodTemplate: restartPolicy must be Never or OnFailure, got "
            f"{submitter.get('restartPolicy')!r}"
        )
    must_not_restart = spec.get("submissionMode") == "SidecarMode" or (
        cluster.get("enableInTreeAutoscaling")
        and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    )
    for where, group in _groups(cluster):
        policy = group.get("template", {}).get("spec", {}).get("restartPolicy", "")
        if must_not_restart and policy not in ("", "Never"):
            yield f"{where}: restartPolicy must be Never here, got {policy!r}"
        elif policy not in ("", "Never", "Always", "OnFailure"):
            yield f"{where}: restartPolicy is no policy of Kubernetes: {policy!r}"


def _cluster(cluster: Json) -> Iterator[str]:
    """Groups, their sizes and containers, authentication."""
    names = [group.get("groupName", "") for group in cluster.get("workerGroupSpecs", [])]
    for name in names:
        if not _DNS_LABEL.fullmatch(name):
            yield f"workerGroupSpecs: a group's name must begin with a letter, got {name!r}"
        if names.count(name) > 1:
            yield f"workerGroupSpecs: the group {name!r} stands twice"
    for where, group in _groups(cluster):
        yield from _group(where, group)
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = str(cluster.get("rayVersion", ""))
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
        if len(numbers) < 2 or numbers < OLDEST_RAY_WITH_TOKENS:
            yield f"rayVersion: tokens need Ray 2.52 or newer, stated as X.Y.Z, got {version!r}"


def _group(where: str, group: Json) -> Iterator[str]:
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    replicas = group.get("replicas", least)
    if not 0 <= least <= replicas <= most:
        yield f"{where}: must have 0 <= minReplicas <= replicas <= maxReplicas, got " + ", ".join(
            str(number) for number in (least, replicas, most)
        )
    parameters = group.get("rayStartParams", {})
    if "labels" in parameters:
        yield f"{where}: rayStartParams.labels is not taken, use labels"
    own = {"num-cpus", "num-gpus", "memory", "resources"} & parameters.keys()
    if own and group.get("resources"):
        yield f"{where}: resources stand both in rayStartParams and in resources"
    if any(not isinstance(value, str) for value in parameters.values()):
        yield f"{where}: values of rayStartParams must be text"
    yield from _labels(f"{where}.labels", group.get("labels", {}))
    pod = group.get("template", {}).get("spec", {})
    if not pod.get("containers"):
        yield f"{where}: must have a container"
    for container in pod.get("containers", []):
        yield from _container(where, container, {one["name"] for one in pod.get("volumes", [])})


def _container(where: str, container: Json, volumes: set[str]) -> Iterator[str]:
    """Secrets by reference, and mounts of volumes that are there."""
    for variable in container.get("env", []):
        name, value = variable["name"], str(variable.get("value", ""))
        if name not in SECRET_FREE and looks_secret(name, value) and value:
            yield f"{where}: {name} looks like a secret and stands there in plain: use a secret"
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"{where}: no volume {mount['name']!r} to mount at {mount['mountPath']}"
    paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        yield f"{where}: two volumes are mounted at {path}"
    amounts = container.get("resources", {})
    for name, limit in amounts.get("limits", {}).items():
        # devices cannot be shared: what is asked for is what is allowed
        if "/" in name and amounts.get("requests", {}).get(name, limit) != limit:
            yield f"{where}: {name} must be asked for as it is allowed, {limit}"


def _kueue(spec: Json, cluster: Json) -> Iterator[str]:
    """What Kueue cannot admit all at once."""
    if not spec.get("suspend"):
        yield "spec.suspend: must be true for a job in a queue, until Kueue lets it go"
    if cluster.get("enableInTreeAutoscaling"):
        yield "min_nodes: a job in a queue starts all its nodes at once; leave min_nodes out"
    if len(cluster.get("workerGroupSpecs", [])) > MAX_KUEUE_GROUPS:
        yield f"workerGroupSpecs: Kueue admits at most {MAX_KUEUE_GROUPS} groups"


def _groups(cluster: Json) -> Iterator[tuple[str, Json]]:
    yield "headGroupSpec", cluster.get("headGroupSpec", {})
    for index, group in enumerate(cluster.get("workerGroupSpecs", [])):
        yield f"workerGroupSpecs[{index}]", group
