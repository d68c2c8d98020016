"""A place to run jobs in. A recipe says *what* and names no machine; a profile says *where*.

It is a YAML file. Secrets stand in it by reference only: names of variables, of Kubernetes secrets.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, is_dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

import yaml

from cluster import fields
from cluster.places import (
    LIMIT_S,
    KubeRaySettings,
    NodeGroup,
    RaySettings,
    SlurmSettings,
    freeze,
    prices,
)

PROFILE_DIRECTORY = Path(__file__).parent / "profiles"

KINDS = ("local", "ray", "kuberay", "slurm")
SETTINGS = {"ray": RaySettings, "kuberay": KubeRaySettings, "slurm": SlurmSettings}
Settings = RaySettings | KubeRaySettings | SlurmSettings
WEBHOOK_VARIABLE = "EDIFFI_WEBHOOK_URL"
# Fields that only some kinds of places can follow; elsewhere they would be taken and not be done.
_ONLY_AT: Mapping[str, tuple[str, ...]] = {
    "image": ("kuberay",),
    "queue": ("kuberay", "slurm"),
    "deadline_s": ("kuberay", "slurm"),
    "start_deadline_s": ("kuberay",),
    "max_restarts": ("kuberay", "slurm"),
}
_ONLY_IN_GROUPS_AT: Mapping[str, tuple[str, ...]] = {
    "min_nodes": ("kuberay",),
    "shared_memory_gib": ("kuberay", "ray"),
    "labels": ("kuberay", "slurm"),
    "tolerations": ("kuberay",),
}
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A place to run jobs in. Raises ValueError naming the field.

    Attributes:
        kind: which scheduler stands there; its own settings are in the section of that name.
        image: the container image of every pod (kuberay); elsewhere jobs run in the Python
            environment that is there.
        pin: what the job's environment must equal: "lock", the packages of requirements.lock,
            compared at the job's start; "image" (kuberay), which must then be named by its
            digest; "none".
        program: how `ediffi` is called there.
        store: the store of jobs that name none.
        shared_paths: directories that this machine and the place have in common.
        queue: the Kueue queue, or the Slurm partition.
        environment: variables of the job, none of them secret.
        pass_environment: names of secret variables that the job needs. Their values come from here
            and go into no file; on a Ray cluster, where they could be read, from its nodes.
        webhook: name of such a variable with the address to tell of a run's end.
        node_groups: equal nodes by the group's name. The driver runs beside the first.
        stages: stage -> the group whose nodes do its units; others run anywhere.
        prices_per_device_hour: by device, "cpu" or "gpu".
        deadline_s: how long a job may take in all (kuberay), or each of its runs (slurm).
        start_deadline_s: how long it may wait for its nodes (kuberay).
        max_restarts: how often the scheduler starts it again after it has failed (kuberay, slurm).
    """

    name: str
    kind: Literal["local", "ray", "kuberay", "slurm"]
    image: str = ""
    pin: Literal["lock", "image", "none"] = "lock"
    program: tuple[str, ...] = ("ediffi",)
    store: str = ""
    shared_paths: tuple[str, ...] = ()
    queue: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    pass_environment: tuple[str, ...] = ()
    webhook: str = ""
    node_groups: tuple[NodeGroup, ...] = ()
    stages: Mapping[str, str] = field(default_factory=dict)
    prices_per_device_hour: Mapping[str, float] = field(default_factory=dict)
    deadline_s: LIMIT_S = "none"
    start_deadline_s: LIMIT_S = "none"
    max_restarts: int = 0
    ray: RaySettings | None = None
    kuberay: KubeRaySettings | None = None
    slurm: SlurmSettings | None = None

    def __post_init__(self) -> None:
        fields.check_name("profile name", self.name)
        fields.check_choice("kind", self.kind, KINDS)
        for what in ("image", "store", "queue"):
            fields.text(what, getattr(self, what))
        for what in ("program", "shared_paths", "pass_environment"):
            freeze(self, **{what: fields.texts(what, getattr(self, what))})
        freeze(self, environment=fields.environment("environment", self.environment))
        for name in self.pass_environment:
            fields.variable_name("pass_environment", name)
        if fields.text("webhook", self.webhook):
            fields.variable_name("webhook", self.webhook)
        freeze(self, prices_per_device_hour=prices(self.prices_per_device_hour))
        for what in ("deadline_s", "start_deadline_s"):
            fields.check_limit_s(what, getattr(self, what))
        fields.check_count("max_restarts", self.max_restarts, minimum=0)
        self._check_words()
        self._check_groups()
        self._check_settings()
        self._check_kind()

    def _check_words(self) -> None:
        if not self.program:
            raise ValueError("program must have a word at least, such as [ediffi]")
        fields.check_choice("pin", self.pin, ("lock", "image", "none"))
        if self.pin == "image" and not _DIGEST.search(self.image):
            raise ValueError(
                f"image must end in @sha256:DIGEST where pin is image, got {self.image!r}: "
                "`docker inspect --format '{{index .RepoDigests 0}}' IMAGE` tells it"
            )
        for path in self.shared_paths:
            if not path.startswith("/"):
                raise ValueError(f"shared_paths must be absolute, got {path!r}")

    def _check_groups(self) -> None:
        if not isinstance(self.node_groups, tuple):
            raise ValueError("node_groups must be a tuple of groups")
        names = [group.name for group in self.node_groups]
        if len(set(names)) != len(names):
            raise ValueError(f"node_groups: a name stands twice in {', '.join(names)}")
        if not names and self.kind in ("kuberay", "slurm"):
            raise ValueError(
                f"node_groups must have a group at least: {self.kind} is asked for nodes"
            )
        if self.kind == "slurm" and len(names) > 1:
            raise ValueError(
                f"node_groups: a Slurm job has one group of nodes, got {', '.join(names)}; "
                "make a profile for each, the store joins their work"
            )
        stages = fields.text_map("stages", self.stages)
        for stage, group in stages.items():
            if group not in names:
                known = ", ".join(names) or "none"
                raise ValueError(f"stages.{stage}: no node group {group!r}; groups: {known}")
        freeze(self, stages=stages)

    def _check_settings(self) -> None:
        """Exactly the section of its own kind."""
        for kind, cls in SETTINGS.items():
            found = getattr(self, kind)
            if kind != self.kind and found is not None:
                raise ValueError(f"{kind}: belongs to profiles of kind {kind}, this is {self.kind}")
            if kind == self.kind and not isinstance(found, cls):
                raise ValueError(f"missing section {kind!r}: a profile of kind {kind} needs it")
        if self.kind == "kuberay":
            if not self.image:
                raise ValueError("image must be named: pods of kuberay are made of it")
            if self.passed:
                what = "pass_environment" if self.pass_environment else "webhook"
                raise ValueError(
                    f"{what}: values would stand in the manifest; name a secret in "
                    "kuberay.secrets or kuberay.secret_variables"
                )
        if self.kind == "local" and self.node_groups:
            raise ValueError("node_groups: this machine is what it is; leave them out")

    def _check_kind(self) -> None:
        """No field that this kind of place would not follow."""
        if self.pin == "image" and self.kind != "kuberay":
            raise ValueError(
                f"pin: image is for kind kuberay, got kind {self.kind}, where jobs run in the "
                "Python environment that is there: write pin: lock, or none"
            )
        _refuse_unfollowed("", self, _ONLY_AT, self.kind)
        for group in self.node_groups:
            _refuse_unfollowed(f"node_groups.{group.name}.", group, _ONLY_IN_GROUPS_AT, self.kind)

    @property
    def passed(self) -> Mapping[str, str]:
        """Variables of the job -> variables here whose values they get."""
        passed = {name: name for name in self.pass_environment}
        return passed | ({WEBHOOK_VARIABLE: self.webhook} if self.webhook else {})

    def prices_per_device_hour_in(self, group: str) -> Mapping[str, float]:
        """What an hour costs on that group's nodes, by device; "" is any node."""
        own = next(
            (one.prices_per_device_hour for one in self.node_groups if one.name == group), {}
        )
        return {**self.prices_per_device_hour, **own}

    def shares(self, path: str) -> bool:
        """Whether the place has this machine's file or directory under the same name."""
        if self.kind == "local":
            return True
        if self.ray is not None and self.ray.is_on_this_machine:
            return True
        return any(PurePosixPath(path).is_relative_to(one) for one in self.shared_paths)

    def to_mapping(self) -> dict[str, Any]:
        """What `from_mapping` makes this profile of: for a job's record."""
        values = _plain({key: value for key, value in vars(self).items() if key != "name"})
        groups = values["node_groups"]
        values["node_groups"] = {group.pop("name"): group for group in groups}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_mapping(cls, name: str, values: Mapping[str, Any]) -> Self:
        """Build a profile from parsed YAML. Raises ValueError naming the field."""
        values = dict(values)
        for kind, section in SETTINGS.items():
            if kind in values or values.get("kind") == kind:
                # an empty section is one without settings of its own
                values[kind] = fields.build(section, values.get(kind) or {}, kind)
        groups = values.get("node_groups") or {}
        if not isinstance(groups, Mapping):
            raise ValueError(f"node_groups must map names to groups, got {type(groups).__name__}")
        values["node_groups"] = tuple(
            fields.build(NodeGroup, group, f"node_groups.{key}", name=key)
            for key, group in groups.items()
        )
        return fields.build(cls, values, "", name=name)


def _refuse_unfollowed(
    where: str, record: Profile | NodeGroup, kinds_of: Mapping[str, tuple[str, ...]], kind: str
) -> None:
    """What is not said has its default, which asks for nothing."""
    for one in dataclass_fields(record):
        value, kinds = getattr(record, one.name), kinds_of.get(one.name, KINDS)
        made = one.default_factory
        default = one.default if made is MISSING else made()
        if kind not in kinds and value != default:
            raise ValueError(
                f"{where}{one.name}: a place of kind {kind} cannot follow it (only "
                f"{', '.join(kinds)}), got {value!r}: leave it out"
            )


def _plain(value: Any) -> Any:
    """Dataclasses and what they hold as dictionaries, lists and words."""
    if is_dataclass(value):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def profile_names(directory: Path = PROFILE_DIRECTORY) -> list[str]:
    """Return the names of the profiles in `directory`, sorted."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def load_profile(name_or_path: str, directory: Path = PROFILE_DIRECTORY) -> Profile:
    """Load a profile by its name ("laptop") or by the path of a YAML file.

    Raises:
        ValueError: naming the file, the field, what was required and what was found.
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
