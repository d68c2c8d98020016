"""A job: one command at one place. From it comes, purely, the text that a scheduler takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cluster import fields
from cluster.profile import Profile

# KubeRay makes names of pods and services by adding to a job's: it takes no longer ones.
MAX_NAME_LENGTH = 47


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """A command on the nodes of a profile. Raises ValueError for what no scheduler could run.

    Attributes:
        name: what every scheduler calls it; the same recipe at the same place has the same name.
        command: words of the driver, which runs once, beside Ray's head.
        environment: variables that the submission adds to those of the profile.
    """

    name: str
    command: tuple[str, ...]
    profile: Profile
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields.check_name("job name", self.name)
        if len(self.name) > MAX_NAME_LENGTH or not self.name[0].isalpha():
            raise ValueError(
                f"job name must begin with a letter and have at most {MAX_NAME_LENGTH}, "
                f"got {self.name!r} of {len(self.name)}"
            )
        if isinstance(self.command, str) or not self.command:
            raise ValueError(
                f"command must be a non-empty sequence of words, got {self.command!r}: "
                "split a shell line into its words"
            )
        words = fields.texts("command", self.command)
        object.__setattr__(self, "command", words)
        added = fields.environment("environment", self.environment)
        object.__setattr__(self, "environment", added)

    @property
    def variables(self) -> Mapping[str, str]:
        """All variables whose values may be written down, sorted by name."""
        both = {**self.profile.environment, **self.environment}
        return MappingProxyType(dict(sorted(both.items())))
