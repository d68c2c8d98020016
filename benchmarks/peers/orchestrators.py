"""The orchestrators that ours stands beside: how each is installed, kept quiet and started.

Every measurement is a whole process, from its start to its end, in an empty folder of its own.
The toys are no-ops that write one line into `$TOY_LOG` when they are really done, so that a
benchmark can tell what was done from what was only said.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import ROOT, PeerError, environment, version_of

FILES = Path(__file__).parent / "toys"  # what users would write, beside one another
PATIENCE_S = 900.0
LOG, OUTPUT, SAID = "log.txt", "output.txt", "said.txt"  # steps done, stdout, stderr
# Would lead a run elsewhere, or tell others of it.
_FOREIGN = (
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "MLFLOW_TRACKING_URI",
    "PREFECT_API_URL",
    "DAGSTER_HOME",
)


@dataclass(frozen=True, kw_only=True)
class Orchestrator:
    """One side of a comparison.

    Args:
        name: in tables and of its folder below .bench/.
        requirements: pinned; none for what our own environment has.
        package: whose version is told.
        variables: of its processes, given the folder that holds all it keeps.
    """

    name: str
    package: str
    requirements: tuple[str, ...] = ()
    variables: Callable[[Path], Mapping[str, str]] = lambda folder: {}

    def python(self) -> Path:
        """Its interpreter, installed if it is not there yet."""
        if not self.requirements:
            return Path(sys.executable)
        return environment(self.name, self.requirements, alone=True)

    def version(self) -> str:
        return version_of(self.python(), self.package)

    def run(self, folder: Path, *words: str, more: Mapping[str, str] | None = None) -> float:
        """Run its interpreter on `words` in `folder`; the seconds that it took.

        Raises:
            PeerError: it failed, or took longer than anybody would wait.
        """
        folder.mkdir(parents=True, exist_ok=True)
        variables = {**self.variables(folder), "TOY_LOG": str(folder / LOG), **(more or {})}
        return timed([str(self.python()), *words], folder, variables)


def timed(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> float:
    """Seconds from a process's start to its end. Raises PeerError if it fails."""
    kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    with (folder / OUTPUT).open("wb") as output, (folder / SAID).open("wb") as said:
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**kept, "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=said,
        )
        try:
            code = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise PeerError(f"{' '.join(command)} took more than {PATIENCE_S:.0f} s") from None
        seconds = time.monotonic() - start
    if code:
        tail = [(folder / name).read_text(errors="replace")[-2000:] for name in (OUTPUT, SAID)]
        raise PeerError(f"{' '.join(command)} ended with {code} in {folder}:\n{''.join(tail)}")
    return seconds


def done(folder: Path) -> list[str]:
    """What was really done in a folder since the last call."""
    log = folder / LOG
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


# -- the sides ------------------------------------------------------------------------------------


def _ours(folder: Path) -> dict[str, str]:
    return {
        "PYTHONPATH": str(ROOT),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "HF_HUB_OFFLINE": "1",
    }


def _metaflow(folder: Path) -> dict[str, str]:
    return {
        "HOME": str(folder),
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder),
        "METAFLOW_DEFAULT_DATASTORE": "local",
        "METAFLOW_DEFAULT_METADATA": "local",
        "METAFLOW_DEFAULT_EVENT_LOGGER": "nullSidecarLogger",
        "METAFLOW_DEFAULT_MONITOR": "nullSidecarMonitor",
        "METAFLOW_USER": "benchmark",
    }


def _dagster(folder: Path) -> dict[str, str]:
    home = folder / "dagster"
    home.mkdir(exist_ok=True)
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    return {"DAGSTER_HOME": str(home), "DAGSTER_DISABLE_TELEMETRY": "true"}


def _prefect(folder: Path) -> dict[str, str]:
    home = folder / "prefect"
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "storage"),
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
    }


OURS = Orchestrator(name="ediffi", package="ediffi", variables=_ours)
RAY = Orchestrator(name="bare Ray", package="ray", variables=_ours)
METAFLOW = Orchestrator(
    name="metaflow",
    package="metaflow",
    requirements=("metaflow==2.19.39",),
    variables=_metaflow,
)
DAGSTER = Orchestrator(
    name="dagster", package="dagster", requirements=("dagster==1.13.29",), variables=_dagster
)
PREFECT = Orchestrator(
    name="prefect",
    package="prefect",
    # with newer ones its server does not start
    requirements=("prefect==3.8.8", "fastapi<0.141", "starlette<1.4"),
    variables=_prefect,
)
