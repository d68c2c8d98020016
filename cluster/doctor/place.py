"""What a profile asks of the machine that submits to it, and whether its scheduler lets us in."""

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from urllib.parse import urlsplit

from cluster import ray_jobs
from cluster.doctor.finding import TIMEOUT_S, Finding, reason
from cluster.job_state import SchedulerError
from cluster.profile import Profile

_PROGRAMS = {"kuberay": "kubectl", "slurm": "sbatch"}
_HOW = {
    "kubectl": "install kubectl and choose the context of the cluster (`kubectl config`)",
    "sbatch": "submit from a login node of the Slurm cluster: sbatch, squeue and scancel are there",
}


def check_place(profile: Profile, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Are programs, variables and addresses there that this profile names, and are we let in?"""
    return [
        *_check_program(profile),
        *_check_address(profile),
        *_check_variables(profile, environment),
        *_check_shared_memory(profile),
    ]


def _check_program(profile: Profile) -> list[Finding]:
    program = _PROGRAMS.get(profile.kind)
    if program is None:
        return []
    name, path = f"{profile.name}: {program}", shutil.which(program)
    if path is None:
        return [Finding(name=name, ok=False, found="not on PATH", remedy=_HOW[program])]
    scheduler = _check_kubernetes(profile) if program == "kubectl" else _check_slurm(profile)
    return [Finding(name=name, ok=True, found=path), scheduler]


def _check_kubernetes(profile: Profile) -> Finding:
    """May we make RayJobs there, and does it know them?"""
    assert profile.kuberay is not None, "a profile of kind kuberay has its section"
    context, namespace = profile.kuberay.context, profile.kuberay.namespace
    words = ["kubectl", f"--namespace={namespace}", *([f"--context={context}"] if context else [])]
    words += [f"--request-timeout={TIMEOUT_S:g}s", "auth", "can-i", "create", "rayjobs.ray.io"]
    said, problem = _ask(words)
    name = f"{profile.name}: permission"
    if "doesn't have a resource type" in problem:
        remedy = "install the KubeRay operator in the cluster, or choose another kuberay.context"
        return Finding(name=name, ok=False, found="no RayJobs there", remedy=remedy)
    if said.split()[:1] == ["yes"]:
        return Finding(name=name, ok=True, found=f"may create RayJobs in {namespace}")
    if said.split()[:1] == ["no"]:
        remedy = f"ask for a role that may create rayjobs.ray.io in {namespace}"
        return Finding(name=name, ok=False, found=f"may not in {namespace}", remedy=remedy)
    remedy = "log in, or mend kuberay.context and the cluster's address (`kubectl config view`)"
    return Finding(name=name, ok=False, found=_last_line(problem or said), remedy=remedy)


def _check_slurm(profile: Profile) -> Finding:
    """Does a controller answer?"""
    said, problem = _ask(["scontrol", "ping"])
    name = f"{profile.name}: controller"
    if " UP" in said:
        return Finding(name=name, ok=True, found=_last_line(said))
    remedy = "ask the administrators of the Slurm cluster, or mend SLURM_CONF"
    return Finding(name=name, ok=False, found=_last_line(problem or said), remedy=remedy)


def _ask(words: list[str]) -> tuple[str, str]:
    """What a program says on stdout and on stderr."""
    try:
        told = subprocess.run(
            words, capture_output=True, text=True, timeout=6 * TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return "", reason(error)
    return told.stdout, told.stderr


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no words"])[-1]


def _check_address(profile: Profile) -> list[Finding]:
    """Does a Ray dashboard answer where jobs are sent to, and does it take the token?"""
    if profile.ray is None:
        return []
    name, address = f"{profile.name}: address", profile.ray.address
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=TIMEOUT_S).close()
    except OSError as error:
        remedy = "start the cluster (`ray start --head`), or mend ray.address in the profile"
        found = f"{address}: {reason(error)}"
        return [Finding(name=name, ok=False, found=found, remedy=remedy)]
    try:
        ray_jobs.state(profile, "nobody")
    except SchedulerError as error:
        remedy = "do what it says, or mend ray.address in the profile"
        return [Finding(name=name, ok=False, found=str(error), remedy=remedy)]
    return [Finding(name=name, ok=True, found=f"{address} answers, and lets us in")]


def _check_variables(profile: Profile, environment: Mapping[str, str]) -> list[Finding]:
    """Values are not looked at: most are secrets."""
    names = tuple(profile.passed.values())
    missing = [name for name in names if not environment.get(name)]
    if not names or profile.kind == "ray":  # there the nodes hold them, see `ray_jobs`
        return []
    found = f"{', '.join(missing)}: not set" if missing else f"{', '.join(names)}: set"
    remedy = "export them before the job is submitted, or take them out of the profile"
    return [
        Finding(
            name=f"{profile.name}: environment",
            ok=not missing,
            found=found,
            remedy=remedy if missing else "",
        )
    ]


def _check_shared_memory(profile: Profile) -> list[Finding]:
    """Groups that train need room to talk in; containers start with next to none."""
    small = [
        group.name
        for group in profile.node_groups
        if group.accelerators_per_node and group.shared_memory_gib < 1
    ]
    if not small:
        return []
    remedy = (
        "give them shared_memory_gib: 2 or more: Ray's objects and gangs on one node live there"
    )
    found = f"less than 1 GiB in {', '.join(small)}"
    return [Finding(name=f"{profile.name}: memory", ok=False, found=found, remedy=remedy)]
