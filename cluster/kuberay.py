"""A job as a RayJob of the KubeRay operator: one manifest, purely from the specification.

The operator makes a Ray cluster of the profile's node groups, runs the driver on its head, and
takes all of it down. What is finished lies in the store, so that a job that is started again on
new nodes (`backoffLimit`) goes on where the old one was. The head does no units: its pod is small.

Pods name their group to Ray by themselves: the operator sets the label `ray.io/node-group`.
"""

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from cluster.job import JobSpec
from cluster.kuberay_rules import problems
from cluster.places import KubeRaySettings, NodeGroup
from cluster.ray_jobs import STOP_WAIT_S

Json = dict[str, Any]
# From the word that a pod has to go to SIGKILL. SIGTERM would reach Ray alone, so a file tells
# driver and workers before it, and they save meanwhile.
GRACE_S = 120
RAY_END_S = 10  # of it: what Ray has for its own end
NOTICE = "/tmp/ediffi-preempted"
OBJECT_STORE_FRACTION = 0.5  # of shared memory: gangs and loaders of data take from the rest
_GIB = 1024**3


def render(job: JobSpec) -> str:
    """The manifest as YAML.

    Raises:
        ValueError: KubeRay would not take it; all that is wrong is named.
    """
    made = manifest(job)
    if found := problems(made):
        raise ValueError(f"profile {job.profile.name}: " + "; ".join(found))
    return yaml.safe_dump(made, sort_keys=False, width=100)


def manifest(job: JobSpec) -> Json:
    """The manifest as nested dictionaries, not yet checked."""
    profile, settings = job.profile, job.profile.kuberay
    assert settings is not None, "a profile of kind kuberay has its section"
    labels = {"app.kubernetes.io/name": "ediffi", "app.kubernetes.io/instance": job.name}
    spec: Json = {
        "entrypoint": shlex.join(job.command),
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": settings.keep_s,
        "backoffLimit": profile.max_restarts,
    }
    if profile.deadline_s != "none":
        spec["activeDeadlineSeconds"] = profile.deadline_s
    if profile.start_deadline_s != "none":
        spec["preRunningDeadlineSeconds"] = profile.start_deadline_s
    if profile.queue:
        labels["kueue.x-k8s.io/queue-name"] = profile.queue
        spec["suspend"] = True  # until Kueue admits it, all of it at once
    spec["submitterPodTemplate"] = _submitter(job, settings)
    spec["rayClusterSpec"] = _cluster(job, settings)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job.name, "namespace": settings.namespace, "labels": labels},
        "spec": spec,
    }


def _cluster(job: JobSpec, settings: KubeRaySettings) -> Json:
    """The Ray cluster: a head, and a group of workers for each node group."""
    groups = job.profile.node_groups
    cluster: Json = {
        "rayVersion": settings.ray_version,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
            "template": _pod(job, settings, _head(settings), "ray-head"),
        },
        "workerGroupSpecs": [_worker_group(job, settings, group) for group in groups],
    }
    if settings.token_secret:
        cluster["authOptions"]["secretName"] = settings.token_secret
    if any(group.min_nodes != "all" for group in groups):
        cluster["enableInTreeAutoscaling"] = True
        cluster["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": 120}
    return cluster


def _head(settings: KubeRaySettings) -> NodeGroup:
    return NodeGroup(
        name="head",
        cpus_per_node=settings.head_cpus,
        memory_per_node_gib=settings.head_memory_gib,
        shared_memory_gib=min(2.0, settings.head_memory_gib / 4),
    )


def _worker_group(job: JobSpec, settings: KubeRaySettings, group: NodeGroup) -> Json:
    object_store = int(group.shared_memory_gib * OBJECT_STORE_FRACTION * _GIB)
    minimum = group.num_nodes if group.min_nodes == "all" else group.min_nodes
    return {
        "groupName": group.name,
        "replicas": minimum,
        "minReplicas": minimum,
        "maxReplicas": group.num_nodes,
        "rayStartParams": {"object-store-memory": str(object_store)},
        "template": _pod(job, settings, group, "ray-worker"),
    }


def _pod(job: JobSpec, settings: KubeRaySettings, group: NodeGroup, container: str) -> Json:
    """A pod of the head or of a worker."""
    volumes: list[Json] = [{"name": "shm", "emptyDir": _shared_memory(group)}]
    mounts: list[Json] = [{"name": "shm", "mountPath": "/dev/shm"}]
    for one in settings.volumes:
        source: Json = {"persistentVolumeClaim": {"claimName": one.claim}}
        if one.secret:
            source = {"secret": {"secretName": one.secret}}
        volumes.append({"name": one.name, **source})
        mounts.append({"name": one.name, "mountPath": one.mount_path, "readOnly": one.read_only})
    amounts = _amounts(group, settings)
    spec: Json = {
        **_placement(group, settings),
        "restartPolicy": "Never",  # the operator makes a new pod; a container never starts twice
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": _pod_security(settings),
        "containers": [
            {
                "name": container,
                "image": job.profile.image,
                "imagePullPolicy": "IfNotPresent",
                **_environment(job, settings),
                "resources": {"requests": amounts, "limits": dict(amounts)},
                "securityContext": _container_security(),
                "lifecycle": {"preStop": {"exec": {"command": _telling()}}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    return {"metadata": {"labels": {"app.kubernetes.io/instance": job.name}}, "spec": spec}


def _telling() -> list[str]:
    """Tell all in a pod that it has to go, and give them time to save."""
    return ["/bin/sh", "-c", f"touch {NOTICE}; sleep {GRACE_S - RAY_END_S}"]


def _submitter(job: JobSpec, settings: KubeRaySettings) -> Json:
    """The small pod that hands the entrypoint to Ray and passes the driver's words on."""
    amounts = {"cpu": "200m", "memory": "512Mi"}
    container = {
        "name": "ray-job-submitter",
        "image": job.profile.image,
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": amounts, "limits": {**amounts, "cpu": "1"}},
        "securityContext": _container_security(),
    }
    spec: Json = {
        **_pulling(settings),
        "restartPolicy": "Never",
        "securityContext": _pod_security(settings),
        "containers": [container],
    }
    return {"metadata": {"labels": {"app.kubernetes.io/instance": job.name}}, "spec": spec}


def _placement(group: NodeGroup, settings: KubeRaySettings) -> Json:
    """On which nodes a pod may stand."""
    selector = dict(group.labels)
    if group.accelerator and settings.accelerator_resource.startswith("nvidia.com/"):
        selector["nvidia.com/gpu.product"] = group.accelerator  # a label of GPU feature discovery
    placement = _pulling(settings)
    if selector:
        placement["nodeSelector"] = selector
    if group.tolerations:
        placement["tolerations"] = [
            {"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in group.tolerations
        ]
    return placement


def _pulling(settings: KubeRaySettings) -> Json:
    """As whom a pod stands, and with which rights its image is fetched."""
    found: Json = {}
    if settings.service_account:
        found["serviceAccountName"] = settings.service_account
    if settings.image_pull_secrets:
        found["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return found


def _environment(job: JobSpec, settings: KubeRaySettings) -> Json:
    """Variables by value; secrets by name alone."""
    variables = {
        "EDIFFI_PREEMPTION_FILE": NOTICE,
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),  # a driver told to end has to save
        **job.variables,
    }
    env: list[Json] = [{"name": name, "value": value} for name, value in sorted(variables.items())]
    for name, reference in sorted(settings.secret_variables.items()):
        secret, _, key = reference.partition("/")
        source = {"secretKeyRef": {"name": secret, "key": key}}
        env.append({"name": name, "valueFrom": source})
    found: Json = {"env": env}
    if settings.secrets:
        found["envFrom"] = [{"secretRef": {"name": name}} for name in settings.secrets]
    return found


def _amounts(group: NodeGroup, settings: KubeRaySettings) -> Mapping[str, str]:
    """Asked for and allowed alike: such pods are the last to be driven out."""
    amounts = {"cpu": str(group.cpus_per_node), "memory": _quantity(group.memory_per_node_gib)}
    if group.accelerators_per_node:
        amounts[settings.accelerator_resource] = str(group.accelerators_per_node)
    return amounts


def _shared_memory(group: NodeGroup) -> Json:
    return {"medium": "Memory", "sizeLimit": _quantity(group.shared_memory_gib)}


def _quantity(gib: float) -> str:
    """An amount of memory as Kubernetes writes it, in whole MiB."""
    return f"{int(gib)}Gi" if float(gib).is_integer() else f"{int(gib * 1024)}Mi"


def _pod_security(settings: KubeRaySettings) -> Json:
    return {
        "runAsNonRoot": True,
        "runAsUser": settings.run_as_user,
        "fsGroup": settings.run_as_user,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> Json:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
