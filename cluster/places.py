"""The parts of a profile: groups of equal nodes, and what only one kind of place has.

Everything here is where and never what: no stage's setting, no value of a secret.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from cluster import fields

LIMIT_S = int | Literal["none"]


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Equal nodes. Raises ValueError for what no scheduler could give.

    Attributes:
        min_nodes: below `num_nodes`, the place starts so many and adds others as they are needed;
            "all" starts all at once.
        accelerator: the product's name as the scheduler spells it ("H100"); "" is any.
        shared_memory_gib: room in /dev/shm, where Ray keeps objects and gangs talk.
        labels: what a node must bear: a nodeSelector in Kubernetes, a constraint in Slurm (keys
            alone count there).
        tolerations: taints that are put up with (Kubernetes).
        prices_per_device_hour: of these nodes, by device ("cpu", "gpu"), before the profile's.
    """

    name: str
    cpus_per_node: int
    memory_per_node_gib: float
    num_nodes: int = 1
    min_nodes: int | Literal["all"] = "all"
    accelerators_per_node: int = 0
    accelerator: str = ""
    shared_memory_gib: float = 2.0
    labels: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[str, ...] = ()
    prices_per_device_hour: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields.check_name("the group's name", self.name)
        fields.check_count("num_nodes", self.num_nodes, minimum=1)
        if self.min_nodes != "all":
            fields.check_count("min_nodes", self.min_nodes, minimum=0)
            if self.min_nodes > self.num_nodes:
                raise ValueError(
                    f"min_nodes must be at most num_nodes ({self.num_nodes}), got {self.min_nodes}"
                )
        fields.check_count("cpus_per_node", self.cpus_per_node, minimum=1)
        fields.check_amount("memory_per_node_gib", self.memory_per_node_gib, "of GiB")
        fields.check_amount("shared_memory_gib", self.shared_memory_gib, "of GiB")
        if self.shared_memory_gib >= self.memory_per_node_gib:
            raise ValueError(
                f"shared_memory_gib must be below memory_per_node_gib "
                f"({self.memory_per_node_gib:g}), of which it is taken, got "
                f"{self.shared_memory_gib:g}"
            )
        fields.check_count("accelerators_per_node", self.accelerators_per_node, minimum=0)
        if fields.text("accelerator", self.accelerator) and self.accelerators_per_node == 0:
            raise ValueError(
                f"accelerator is {self.accelerator!r} but accelerators_per_node is 0: "
                "say how many, or leave accelerator out"
            )
        freeze(self, labels=fields.text_map("labels", self.labels))
        freeze(self, tolerations=fields.texts("tolerations", self.tolerations))
        freeze(self, prices_per_device_hour=prices(self.prices_per_device_hour))


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """A Ray cluster that is up.

    Attributes:
        address: of its dashboard, where jobs are submitted, such as "http://10.0.0.5:8265".
        num_cpus: kept for the driver on the head node.
    """

    address: str
    num_cpus: float = 0.0

    def __post_init__(self) -> None:
        address = fields.text("address", self.address)
        if not address.startswith(("http://", "https://")) or "@" in address:
            raise ValueError(
                "address must be the dashboard's, http(s)://HOST:PORT, without a password: the "
                "token comes from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            )
        freeze(self, address=address.rstrip("/"))
        fields.check_amount("num_cpus", self.num_cpus, "of cores", zero=True)

    @property
    def is_on_this_machine(self) -> bool:
        host = urlsplit(self.address).hostname or ""
        return host == "localhost" or host == "::1" or host.startswith("127.")


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Something mounted on every pod: a claim, or a secret's keys as files.

    Attributes:
        claim: name of a persistent volume claim.
        secret: name of a secret instead.
    """

    name: str
    mount_path: str
    claim: str = ""
    secret: str = ""
    read_only: bool = False

    def __post_init__(self) -> None:
        fields.check_name("the volume's name", self.name)
        if not fields.text("mount_path", self.mount_path).startswith("/"):
            raise ValueError(f"mount_path must be an absolute path, got {self.mount_path!r}")
        if bool(fields.text("claim", self.claim)) == bool(fields.text("secret", self.secret)):
            raise ValueError("a volume is either a claim or a secret: state exactly one of them")
        fields.check_flag("read_only", self.read_only)


@dataclass(frozen=True, kw_only=True)
class KubeRaySettings:
    """How a RayJob is made on Kubernetes with the KubeRay operator.

    Attributes:
        context: of kubectl; "" is the current one.
        secrets: names of secrets of which every key becomes a variable.
        secret_variables: variable -> "SECRET/KEY".
        token_secret: name of the secret with Ray's token under the key auth_token; "" lets the
            operator make one.
        keep_s: how long the cluster stays after the job has ended, for a look at it.
        accelerator_resource: what nodes call their accelerators.
        run_as_user: the image's user, who is not root.
    """

    namespace: str = "default"
    context: str = ""
    service_account: str = ""
    image_pull_secrets: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    secret_variables: Mapping[str, str] = field(default_factory=dict)
    token_secret: str = ""
    volumes: tuple[Volume, ...] = ()
    head_cpus: int = 2
    head_memory_gib: float = 8.0
    keep_s: int = 300
    accelerator_resource: str = "nvidia.com/gpu"
    ray_version: str = "2.60.0"
    run_as_user: int = 1000

    def __post_init__(self) -> None:
        fields.check_name("namespace", self.namespace)
        for what in ("context", "service_account", "token_secret", "accelerator_resource"):
            fields.text(what, getattr(self, what))
        for what in ("image_pull_secrets", "secrets"):
            freeze(self, **{what: fields.texts(what, getattr(self, what))})
        references = fields.text_map("secret_variables", self.secret_variables)
        for name, reference in references.items():
            fields.variable_name("secret_variables", name)
            secret, slash, key = reference.partition("/")
            if not (secret and slash and key) or "/" in key:
                raise ValueError(
                    f"secret_variables.{name} must be SECRET/KEY, a secret's name and a key in it"
                )
        freeze(self, secret_variables=references)
        volumes = self.volumes
        if not isinstance(volumes, list | tuple):
            raise ValueError(
                "volumes must be a list of volumes, each with name and mount_path, got "
                f"{volumes!r}: leave the field out if there are none"
            )
        freeze(
            self,
            volumes=tuple(
                one if isinstance(one, Volume) else fields.build(Volume, one, f"volumes[{i}]")
                for i, one in enumerate(volumes)
            ),
        )
        fields.check_count("head_cpus", self.head_cpus, minimum=1)
        fields.check_amount("head_memory_gib", self.head_memory_gib, "of GiB")
        fields.check_count("keep_s", self.keep_s, minimum=0)
        fields.check_count("run_as_user", self.run_as_user, minimum=1)
        if not fields.text("ray_version", self.ray_version).replace(".", "").isdecimal():
            raise ValueError(f"ray_version must be text such as 2.60.0, got {self.ray_version!r}")


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """How a batch job is asked for. The partition is the profile's `queue`.

    Attributes:
        directory: reached by every node under the same name; relative paths count from it.
        log_directory: for the job's words; "" is `ediffi-logs` in `directory`.
        python: the interpreter with Ray on every node.
        scratch_directory: a short path on each node's own disk, for Ray's files.
        setup: shell lines before anything else, such as "module load cuda".
        save_s: so long before its end the job is told to save and leave.
        node_loss_s: after how long a node that does not answer is given up.
        options: further options of sbatch by their long names, such as {reservation: monday}.
    """

    directory: str
    log_directory: str = ""
    account: str = ""
    quality_of_service: str = ""
    python: str = "python3"
    scratch_directory: str = "/tmp"
    setup: tuple[str, ...] = ()
    save_s: int = 180
    node_loss_s: int = 20
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what in ("directory", "log_directory", "scratch_directory"):
            path = fields.text(what, getattr(self, what))
            if not path.startswith("/") and (path or what != "log_directory"):
                raise ValueError(f"{what} must be an absolute path, got {path!r}")
        for what in ("account", "quality_of_service", "python"):
            fields.text(what, getattr(self, what))
        freeze(self, setup=fields.texts("setup", self.setup))
        freeze(self, options=fields.text_map("options", self.options))
        fields.check_count("save_s", self.save_s, minimum=1)
        fields.check_count("node_loss_s", self.node_loss_s, minimum=4)


def prices(value: object) -> Mapping[str, float]:
    """Prices of a device for an hour, by device."""
    if not isinstance(value, Mapping):
        raise ValueError(f"prices_per_device_hour must map devices to prices, got {value!r}")
    for device, price in value.items():
        fields.check_choice("prices_per_device_hour", device, ("cpu", "gpu"))
        fields.check_amount(f"prices_per_device_hour.{device}", price, "for an hour", zero=True)
    return dict(value)


def freeze(record: object, **values: object) -> None:
    """Set fields of a frozen dataclass while it is being made."""
    for name, value in values.items():
        object.__setattr__(record, name, value)
