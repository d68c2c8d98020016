"""How a worker that trains on CPUs runs fastest; it changes no result.

It has one thread for each of its CPUs: Ray sets OMP_NUM_THREADS by itself, unless the user has. It
has another memory allocator than glibc's, which gives the pages of large tensors back to the
kernel and takes them anew at every step: a seventh of a small network's time. And it stays on
cores of its own.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipelines.recipe import Resources

_CLAIMS = Path(tempfile.gettempdir()) / "ediffi-cores"
_CGROUP = Path("/sys/fs/cgroup")
_free_cores: set[int] = set()  # where this process may run; empty while it is not pinned


def training_environment(resources: Resources) -> dict[str, str]:
    """Variables for the processes of a unit that trains; none with GPUs.

    The allocator is the jemalloc that Ray brings along, told to keep what it has: else it would
    give memory back every ten seconds. Where the user preloads something, or Ray has no jemalloc,
    as on macOS, nothing is set; a node without that file goes on with its own allocator.
    """
    import ray

    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if resources.gpus or "LD_PRELOAD" in os.environ or not library.exists():
        return {}
    return {
        "LD_PRELOAD": str(library),
        "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1",
    }


def num_pinned(resources: Resources) -> int:
    """Cores that a training worker has to itself: its CPUs, if they are whole and all it uses."""
    return int(resources.cpus) if resources.cpus.is_integer() and not resources.gpus else 0


@contextmanager
def pinned(num_cores: int, claims: Path = _CLAIMS) -> Iterator[frozenset[int]]:
    """Keep this thread, and threads it starts, on cores that no other such worker here has.

    Processes that it forks, such as those that read data, may run everywhere. Where other
    containers may sit on the same cores, or too few are free, nothing is pinned.

    Args:
        num_cores: 0 pins nothing.
        claims: a folder of this machine, with a locked file a core; death frees it.

    Yields:
        The cores; empty if nothing was pinned.
    """
    with ExitStack() as stack:
        before = _own_cores()
        cores = _claim(sorted(before), num_cores, claims, stack) if num_cores else frozenset()
        if cores:
            _free_cores.update(before)
            os.sched_setaffinity(0, cores)
            stack.callback(_unpin)
        yield cores


def _claim(candidates: list[int], num_cores: int, claims: Path, stack: ExitStack) -> frozenset[int]:
    if not candidates:
        return frozenset()
    claims.mkdir(parents=True, exist_ok=True)
    claimed: set[int] = set()
    for core in candidates:
        if len(claimed) == num_cores:
            break
        try:
            stream = stack.enter_context((claims / f"core-{core}").open("w"))
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # a worker has it, maybe another user's
            continue
        claimed.add(core)
    if len(claimed) < num_cores:
        stack.close()  # others may have the few that are left
        return frozenset()
    return frozenset(claimed)


def _own_cores() -> set[int]:
    """Cores that this process may use and no other container does; empty if that is unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    cores = os.sched_getaffinity(0)
    is_shared = _has_quota() or "KUBERNETES_SERVICE_HOST" in os.environ
    return set() if is_shared and len(cores) == os.cpu_count() else cores


def _has_quota() -> bool:
    """Whether a control group gives this process time on all cores instead of cores."""
    for path in (_CGROUP / "cpu.max", _CGROUP / "cpu" / "cpu.cfs_quota_us"):
        try:
            return path.read_text().split()[0] not in {"max", "-1"}
        except FileNotFoundError:
            continue
    return False


def _unpin() -> None:
    if _free_cores:
        os.sched_setaffinity(0, _free_cores)
        _free_cores.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unpin)
