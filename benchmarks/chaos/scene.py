"""What is run: a tiny pipeline with its data, as a command that can be given again and again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHORT = Path(__file__).with_name("short.yaml")
WHOLE = ROOT / "tests" / "integration" / "tiny.yaml"
NUM_TRAIN = 96
MAX_UNITS_AT_ONCE = 4  # of any stage, on the cores and nodes that the attacks use

# One thread a process, no hub, no telemetry: as the tests run.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
# Left out of what the command inherits: it must find the cluster and the store of its own attack.
_FOREIGN = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "EDIFFI_WEBHOOK_URL", "AWS_PROFILE")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A recipe, its data and the words of the command.

    Attributes:
        folder: holds the data.
        recipe: a YAML file.
        stages: chosen ones; () for all.
        overrides: settings of the recipe.
    """

    folder: Path
    recipe: Path
    stages: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)

    def command(self, store: str) -> list[str]:
        """The one command, of which only the store differs from attack to attack."""
        settings = [f"--set={name}={value}" for name, value in self.overrides.items()]
        words = ["run", str(self.recipe), *self.stages, *settings, "--store", store]
        return [sys.executable, "-m", "pipelines.cli", *words]

    def start(
        self, store: str, place: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Begin a run in a session of its own, so that nothing that hits it hits us.

        Args:
            place: its working directory; what it says is appended to `said.txt` there.
            environment: beside what every run is given.
        """
        inherited = {name: text for name, text in os.environ.items() if name not in _FOREIGN}
        temporary = place / "tmp"  # what a killed worker forgets shows up here
        temporary.mkdir(parents=True, exist_ok=True)
        ours = {"TMPDIR": str(temporary), "RAY_TMPDIR": "/tmp", "PYTHONPATH": str(ROOT)}
        with (place / "said.txt").open("ab") as said:
            return subprocess.Popen(
                self.command(store),
                cwd=place,
                env={**inherited, **ENVIRONMENT, **ours, **(environment or {})},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def run(self, store: str, place: Path, environment: Mapping[str, str] | None = None) -> None:
        """Run undisturbed, to the end.

        Raises:
            RuntimeError: the command failed; with the end of what it said.
        """
        code = self.start(store, place, environment).wait()
        if code:
            raise RuntimeError(f"the command ended with {code}:\n{last_words(place)}")


@contextmanager
def short_scene(folder: Path) -> Iterator[Scene]:
    """Pictures in a folder, one encoder, a base."""
    _draw(folder)
    data = folder / "data"
    overrides = {"data.folder": str(data), "data.list": str(data / "captions.parquet")}
    yield Scene(folder=folder, recipe=SHORT, stages=("base",), overrides=overrides)


@contextmanager
def whole_scene(folder: Path) -> Iterator[Scene]:
    """Every stage there is, with pictures from a server; it must last as long as the scene."""
    from pipelines.demo.server import serve_directory

    _draw(folder)
    with serve_directory(folder / "data") as address:
        overrides = {
            "data.list": str(folder / "data" / "captions.parquet"),
            "data.address_prefix": f"{address}/",
            "data.shard_images": "16",
            "data.timeout_s": "10",
            "base.total_images": "2560",
            "experts.train.total_images": "512",
        }
        yield Scene(folder=folder, recipe=WHOLE, overrides=overrides)


def _draw(folder: Path) -> None:
    """The pictures and their list, unless they are there: a scene may be gone back to."""
    from pipelines.demo.shapes import write_data_set

    if not (folder / "data" / "captions.parquet").exists():
        write_data_set(folder / "data", num_train=NUM_TRAIN, num_per_held_out=1)


def last_words(place: Path, num_lines: int = 40) -> str:
    """The end of what the runs of an attack said."""
    lines = (place / "said.txt").read_text(errors="replace").splitlines()
    return "\n".join(lines[-num_lines:])
