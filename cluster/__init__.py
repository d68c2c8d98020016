"""Where a job runs: its specification, the profiles of the machines, and a look at the machine.

This package knows a command, an image, nodes, accelerators and an environment. It never knows what
the command does: no torch, no ray, nothing of `ediffi` or `pipelines` (enforced by import-linter).
"""

from cluster.job import JobSpec
from cluster.places import KubeRaySettings, NodeGroup, RaySettings, SlurmSettings, Volume
from cluster.profile import Profile, load_profile, profile_names

__all__ = [
    "JobSpec",
    "KubeRaySettings",
    "NodeGroup",
    "Profile",
    "RaySettings",
    "SlurmSettings",
    "Volume",
    "load_profile",
    "profile_names",
]
