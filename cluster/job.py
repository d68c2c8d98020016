"""A job and the place it runs in: `JobSpec` is a command on so many nodes, `Profile` the place.

A recipe says *what* to run and never names a machine; a profile says *where* and never names a
stage. `Profile.job(name, command)` brings the two together, purely: the same profile and command
give the same specification, so that a dry run shows exactly what a submission would send.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import yaml

PROFILE_DIRECTORY = Path(__file__).parent / "profiles"

# A label of the domain name system: what Kubernetes, Slurm and Ray all accept as a name.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One command on `num_nodes` equal nodes. Raises ValueError for what no scheduler could run.

    `image` is a container image; empty means the Python environment that is already on the nodes.
    `accelerator` is the product's name as the scheduler spells it ("H100"); empty means any.
    """

    name: str
    command: tuple[str, ...]
    image: str = ""
    num_nodes: int = 1
    cpus_per_node: int = 1
    memory_per_node_gib: float = 4.0
    accelerators_per_node: int = 0
    accelerator: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("job name", self.name)
        if isinstance(self.command, str) or not self.command:
            raise ValueError(
                f"command must be a non-empty sequence of words, got {self.command!r}: "
                "split a shell line into its words"
            )
        object.__setattr__(self, "command", tuple(_string("command", w) for w in self.command))
        _check_place(self)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A place to run jobs in: the shape of its nodes and the environment they need.

    Fields mean what they mean in `JobSpec`. Raises ValueError naming the field.
    """

    name: str
    cpus_per_node: int
    memory_per_node_gib: float
    image: str = ""
    num_nodes: int = 1
    accelerators_per_node: int = 0
    accelerator: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("profile name", self.name)
        _check_place(self)

    def job(self, name: str, command: Sequence[str]) -> JobSpec:
        """Return the specification of `command` on every node of this place."""
        place = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return JobSpec(name=name, command=tuple(command), **place)

    @classmethod
    def from_mapping(cls, name: str, values: Mapping[str, Any]) -> Self:
        """Build a profile from parsed YAML. Raises ValueError for unknown or missing fields."""
        known = {f.name: f for f in fields(cls) if f.name != "name"}
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(known)}"
                raise ValueError(f"unknown field {key!r}: {hint}")
        required = {
            key for key, f in known.items() if f.default is MISSING and f.default_factory is MISSING
        }
        if missing := sorted(required - values.keys()):
            raise ValueError(f"missing field {missing[0]!r}: every profile must state it")
        return cls(name=name, **values)


def profile_names(directory: Path = PROFILE_DIRECTORY) -> list[str]:
    """Return the names of the profiles in `directory`, sorted."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def load_profile(name_or_path: str, directory: Path = PROFILE_DIRECTORY) -> Profile:
    """Load a profile by its name ("laptop") or by the path of a YAML file.

    Raises ValueError naming the file, the field, what was required and what was found.
    """
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path)
    else:
        path = directory / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ValueError(
            f"no profile {name_or_path!r}: give one of {', '.join(profile_names(directory))}, "
            "or the path of a YAML file"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a mapping of fields, got {type(values).__name__}")
    try:
        return Profile.from_mapping(path.stem, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_place(place: JobSpec | Profile) -> None:
    """Check the fields that a job and a profile share; freeze the environment."""
    _check_count("num_nodes", place.num_nodes, minimum=1)
    _check_count("cpus_per_node", place.cpus_per_node, minimum=1)
    _check_count("accelerators_per_node", place.accelerators_per_node, minimum=0)
    memory = place.memory_per_node_gib
    if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not 0 < memory < 1e6:
        raise ValueError(
            f"memory_per_node_gib must be a positive number of GiB, got {memory!r}: "
            "write 24, not 24Gi"
        )
    _string("image", place.image)
    if _string("accelerator", place.accelerator) and place.accelerators_per_node == 0:
        raise ValueError(
            f"accelerator is {place.accelerator!r} but accelerators_per_node is 0: "
            "say how many, or leave accelerator out"
        )
    object.__setattr__(place, "environment", _frozen_environment(place.environment))


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} must be 1 to 63 lower-case letters, digits and inner hyphens, got {name!r}"
        )


def _check_count(what: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{what} must be a whole number of at least {minimum}, got {value!r}")


def _string(what: str, value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{what} must be text without NUL, got {value!r}")
    return value


def _frozen_environment(environment: object) -> Mapping[str, str]:
    """Return a read-only copy. YAML reads `off` as False and `1` as a number: ask for quotes."""
    if not isinstance(environment, Mapping):
        raise ValueError(f"environment must map variable names to text, got {environment!r}")
    for key, value in environment.items():
        if not isinstance(key, str) or not _VARIABLE.fullmatch(key):
            raise ValueError(f"environment: {key!r} is no name of an environment variable")
        if not isinstance(value, str):
            raise ValueError(
                f'environment.{key} must be text, got {value!r}: write {key}: "..." with quotes'
            )
        _string(f"environment.{key}", value)
    return MappingProxyType(dict(environment))
