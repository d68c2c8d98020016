"""Is this machine fit: Python, packages, cores, memory, accelerators, disk?"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.doctor.finding import GIB, TIMEOUT_S, Finding, nearest_directory, reason


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
        return Finding(name="packages", ok=False, found=reason(error), remedy=remedy)
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
    memory_gib = int(words[words.index("MemTotal:") + 1]) * 1024 / GIB
    limit = _read_words(Path("/sys/fs/cgroup/memory.max"))
    if limit and limit[0] != "max":
        memory_gib = min(memory_gib, int(limit[0]) / GIB)
    ok = memory_gib >= required_gib
    remedy = "" if ok else f"give the job {required_gib:g} GiB of memory"
    return Finding(name="memory", ok=ok, found=f"{memory_gib:.1f} GiB", remedy=remedy)


def check_shared_memory(required_gib: float, path: Path = Path("/dev/shm")) -> Finding:
    """Has Ray's object store room in shared memory? Containers start with 64 MiB of it."""
    if not path.is_dir():
        return Finding(name="shared memory", ok=True, found=f"no {path} here: Ray uses /tmp")
    free_gib = shutil.disk_usage(path).free / GIB
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
            query, capture_output=True, text=True, timeout=4 * TIMEOUT_S, check=True
        ).stdout
        devices, reason = [line.strip() for line in listing.splitlines() if line.strip()], ""
    except (OSError, subprocess.SubprocessError) as error:
        devices, reason = [], "" if isinstance(error, FileNotFoundError) else f" ({error})"
    found = "; ".join(devices) or f"none{reason}"
    ok = len(devices) >= required
    remedy = "" if ok else f"{required} wanted: check the driver, or run on the CPU with 0"
    return Finding(name="accelerators", ok=ok, found=found, remedy=remedy)


def check_free_disk(path: Path, required_gib: float, why: str = "") -> Finding:
    """Is there room where the store is or will be?

    Args:
        why: where the requirement comes from, such as "about 3 GiB to come".
    """
    directory = nearest_directory(path)
    free_gib = shutil.disk_usage(directory).free / GIB
    ok = free_gib >= required_gib
    remedy = "" if ok else f"free {required_gib - free_gib:.1f} GiB there, or move the store"
    found = f"{free_gib:.1f} GiB at {directory}{f'; {why}' if why else ''}"
    return Finding(name="free disk", ok=ok, found=found, remedy=remedy)


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
