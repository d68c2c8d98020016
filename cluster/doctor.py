"""What `ediffi doctor` asks of a machine before a run does: one function, one question.

Every check returns a `Finding`, also when the answer is no, and tells the remedy. Nothing here
imports what it asks about: versions come from package metadata, accelerators from nvidia-smi,
weights from the file system, so that a doctor's visit takes no longer than the slowest time-out.
"""

import importlib.util
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

_GIB = 1024**3
_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer to one question. `remedy` is empty exactly when the machine is fine."""

    name: str
    ok: bool
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.ok != bool(self.remedy), f"{self.name}: a remedy belongs to what is wrong"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run needs of the machine it starts on.

    `weights` maps a name for people ("t5") to where an encoder's weights are, as `check_weights`
    reads it. `lock_path` is the requirements.lock to compare the installed packages with.
    """

    store_path: Path
    lock_path: Path
    tracking_uri: str
    weights: Mapping[str, str] = field(default_factory=dict)
    free_disk_gib: float = 10.0
    memory_gib: float = 4.0
    shared_memory_gib: float = 1.0
    num_cpus: int = 2
    num_accelerators: int = 0


def examine(needs: Needs) -> list[Finding]:
    """Ask every question; the findings come in the order in which to mend them."""
    return [
        check_python(),
        check_standard_library(),
        check_packages(needs.lock_path),
        check_cpus(needs.num_cpus),
        check_memory(needs.memory_gib),
        check_shared_memory(needs.shared_memory_gib),
        check_accelerators(needs.num_accelerators),
        check_store(needs.store_path),
        check_free_disk(needs.store_path, needs.free_disk_gib),
        check_tracking(needs.tracking_uri),
        *(check_weights(name, location) for name, location in needs.weights.items()),
    ]


def check_python(found: tuple[int, int, int] = sys.version_info[:3]) -> Finding:
    """Is this Python new enough?"""
    ok = found >= (3, 11)
    remedy = "" if ok else "make the environment with Python 3.11 or newer"
    return Finding(name="python", ok=ok, found=".".join(map(str, found)), remedy=remedy)


def check_standard_library() -> Finding:
    """Does `dataclasses` come from the standard library?

    img2dataset requires an obsolete backport of it, which takes over as soon as site-packages
    stands on PYTHONPATH.
    """
    spec = importlib.util.find_spec("dataclasses")
    origin = Path(spec.origin if spec and spec.origin else "")
    ok = "site-packages" not in origin.parts
    remedy = "" if ok else "take site-packages off PYTHONPATH: its dataclasses.py is a backport"
    return Finding(name="standard library", ok=ok, found=f"dataclasses at {origin}", remedy=remedy)


def check_packages(lock_path: Path) -> Finding:
    """Are the installed packages the ones that were tested?"""
    try:
        lines = lock_path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        remedy = "run from a checkout, or name the requirements.lock of this release"
        return Finding(name="packages", ok=False, found=_reason(error), remedy=remedy)
    locked = [match.groups() for line in lines if (match := _LOCK_LINE.match(line))]
    wrong = []
    for package, expected, marker in locked:
        installed = _installed_version(package)
        # A package with a marker may be absent: it is for another platform.
        if installed != expected and not (marker and not installed):
            wrong.append(f"{package} {installed or 'missing'} (locked {expected})")
    found = f"{len(locked) - len(wrong)} of {len(locked)} as in {lock_path.name}"
    if not wrong:
        return Finding(name="packages", ok=True, found=found)
    shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    remedy = f"{sys.executable} -m pip install -r {lock_path}"
    return Finding(name="packages", ok=False, found=f"{found}; {shown}", remedy=remedy)


_LOCK_LINE = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)\s*(;.*)?$")


def _installed_version(package: str) -> str:
    """Return the version without its local part ("2.14.1+cu130" is release 2.14.1), or ""."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""


def check_cpus(required: int) -> Finding:
    """May this process use enough cores? Affinity and the container's quota count."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    num_cpus = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    quota = _read_words(Path("/sys/fs/cgroup/cpu.max"))
    if len(quota) == 2 and quota[0] != "max":
        num_cpus = min(num_cpus, int(quota[0]) / int(quota[1]))
    ok = num_cpus >= required
    remedy = "" if ok else f"give the job {required} cores, or ask for fewer in the recipe"
    return Finding(name="cpus", ok=ok, found=f"{num_cpus:g}", remedy=remedy)


def check_memory(required_gib: float) -> Finding:
    """Is there enough memory within the container's limit?"""
    words = _read_words(Path("/proc/meminfo"))
    if "MemTotal:" not in words:
        return Finding(name="memory", ok=True, found="unknown: no /proc/meminfo here")
    memory_gib = int(words[words.index("MemTotal:") + 1]) * 1024 / _GIB
    limit = _read_words(Path("/sys/fs/cgroup/memory.max"))
    if limit and limit[0] != "max":
        memory_gib = min(memory_gib, int(limit[0]) / _GIB)
    ok = memory_gib >= required_gib
    remedy = "" if ok else f"give the job {required_gib:g} GiB of memory"
    return Finding(name="memory", ok=ok, found=f"{memory_gib:.1f} GiB", remedy=remedy)


def check_shared_memory(required_gib: float, path: Path = Path("/dev/shm")) -> Finding:
    """Has Ray's object store room in shared memory? Containers start with 64 MiB of it."""
    if not path.is_dir():
        return Finding(name="shared memory", ok=True, found=f"no {path} here: Ray uses /tmp")
    free_gib = shutil.disk_usage(path).free / _GIB
    ok = free_gib >= required_gib
    remedy = (
        ""
        if ok
        else f"start the container with --shm-size={required_gib:g}g; in Kubernetes mount an "
        f"emptyDir of medium Memory at {path}"
    )
    return Finding(name="shared memory", ok=ok, found=f"{free_gib:.1f} GiB free", remedy=remedy)


def check_accelerators(required: int) -> Finding:
    """Does nvidia-smi list enough accelerators?"""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        listing = subprocess.run(
            query, capture_output=True, text=True, timeout=4 * _TIMEOUT_S, check=True
        ).stdout
        devices, reason = [line.strip() for line in listing.splitlines() if line.strip()], ""
    except (OSError, subprocess.SubprocessError) as error:
        devices, reason = [], "" if isinstance(error, FileNotFoundError) else f" ({error})"
    found = "; ".join(devices) or f"none{reason}"
    ok = len(devices) >= required
    remedy = "" if ok else f"{required} wanted: check the driver, or run on the CPU with 0"
    return Finding(name="accelerators", ok=ok, found=found, remedy=remedy)


def check_store(path: Path) -> Finding:
    """Does the store let exactly one of two creators win? The ledger's leases stand on that."""
    name = "store"
    directory = _nearest_directory(path)
    probe = directory / f".doctor-{uuid.uuid4().hex}"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError as error:
        remedy = "name a directory that this user may write to"
        return Finding(name=name, ok=False, found=_reason(error), remedy=remedy)
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return Finding(name=name, ok=True, found=f"{directory}: exclusive create holds")
    except OSError as error:
        remedy = "the file system fails a second exclusive create oddly: use another for the store"
        return Finding(name=name, ok=False, found=_reason(error), remedy=remedy)
    finally:
        probe.unlink(missing_ok=True)
    remedy = "this file system ignores O_EXCL: use another for the store"
    return Finding(name=name, ok=False, found=f"{directory}: two creators won", remedy=remedy)


def check_free_disk(path: Path, required_gib: float) -> Finding:
    """Is there room where the store is or will be?"""
    directory = _nearest_directory(path)
    free_gib = shutil.disk_usage(directory).free / _GIB
    ok = free_gib >= required_gib
    remedy = "" if ok else f"free {required_gib - free_gib:.1f} GiB there, or move the store"
    found = f"{free_gib:.1f} GiB at {directory}"
    return Finding(name="free disk", ok=ok, found=found, remedy=remedy)


def check_tracking(uri: str, timeout_s: float = _TIMEOUT_S) -> Finding:
    """Can runs be logged at this MLflow tracking URI? Passwords in it are never shown."""
    scheme = urlsplit(uri).scheme
    if scheme == "sqlite":
        return _check_sqlite(Path(uri.removeprefix("sqlite:///").partition("?")[0]))
    if scheme in ("http", "https"):
        return _check_server(uri, timeout_s)
    if scheme in ("postgresql", "mysql", "mssql") or "+" in scheme:
        return Finding(name="tracking", ok=True, found=f"{scheme} database, not probed")
    remedy = "use sqlite:///PATH, http(s)://HOST or a database URI: MLflow refuses plain folders"
    return Finding(name="tracking", ok=False, found=f"{scheme or 'no'} scheme", remedy=remedy)


def _check_sqlite(path: Path) -> Finding:
    """Take the database's write lock and let it go; of a new one, only its folder is tried."""
    try:
        if path.exists():
            connection = sqlite3.connect(path, timeout=_TIMEOUT_S, isolation_level=None)
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            finally:
                connection.close()
        else:
            probe = _nearest_directory(path.parent) / f".doctor-{uuid.uuid4().hex}"
            probe.touch(exist_ok=False)
            probe.unlink()
    except (OSError, sqlite3.Error) as error:
        remedy = "name a database file that this user may write to, on a local disk"
        return Finding(name="tracking", ok=False, found=f"{path}: {_reason(error)}", remedy=remedy)
    return Finding(name="tracking", ok=True, found=f"{path}: writable")


def _check_server(uri: str, timeout_s: float) -> Finding:
    """Ask the tracking server's /health, which needs no password."""
    parts = urlsplit(uri)
    server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=timeout_s) as answer:
            found = f"{server}: {answer.status}"
        return Finding(name="tracking", ok=True, found=found)
    except (OSError, ValueError, urllib.error.URLError) as error:
        remedy = (
            "start it (`mlflow server --backend-store-uri sqlite:///mlflow.db`) or mend the URI"
        )
        found = f"{server}: {_reason(error)}"
        return Finding(name="tracking", ok=False, found=found, remedy=remedy)


def check_weights(name: str, location: str) -> Finding:
    """Are an encoder's weights on this machine?

    `location` is a file or directory, "package:MODULE" for weights inside an installed package, or
    a name on the Hugging Face hub ("t5-small", "google/t5-v1_1-xxl"), looked for in its cache.
    """
    title = f"weights of {name}"
    if location.startswith("package:"):
        module = location.removeprefix("package:").partition(".")[0]
        ok = bool(module) and importlib.util.find_spec(module) is not None
        remedy = "" if ok else f"install the package that holds the module {module!r}"
        return Finding(name=title, ok=ok, found=location if ok else "no such module", remedy=remedy)
    path = Path(location).expanduser()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        return Finding(name=title, ok=True, found=str(path))
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", location) and not location.startswith("."):
        cached = _hub_cache() / f"models--{location.replace('/', '--')}" / "snapshots"
        if cached.is_dir() and any(cached.iterdir()):
            return Finding(name=title, ok=True, found=f"{location} in {_hub_cache()}")
        remedy = f"fetch them where there is a network (`hf download {location}`) or name a folder"
        return Finding(name=title, ok=False, found=f"{location}: not cached", remedy=remedy)
    remedy = "name a file or a folder that exists"
    return Finding(name=title, ok=False, found=f"{path}: missing or empty", remedy=remedy)


def _hub_cache() -> Path:
    """Return the hub's cache directory by the rules of huggingface_hub."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _nearest_directory(path: Path) -> Path:
    """Return `path`, or its nearest parent that exists: a check leaves no new folders behind."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


def _reason(error: Exception) -> str:
    """Return an error in one line, with its kind when it says nothing else."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
