"""Where a job runs: its specification, the profiles of the machines, and a look at the machine.

This package knows a command, an image, nodes, accelerators and an environment. It never knows what
the command does: no torch, no ray, nothing of `ediffi` or `pipelines` (enforced by import-linter).
"""

from cluster.job import JobSpec, Profile, load_profile, profile_names

__all__ = ["JobSpec", "Profile", "load_profile", "profile_names"]
