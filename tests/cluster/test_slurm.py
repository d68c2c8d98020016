"""The script for Slurm, as a pure function of the job; what Slurm itself makes of it is tested in
tests/integration/test_slurm.py."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster import slurm
from cluster.slurm import SlurmError, SlurmJob
from cluster.slurm_commands import native_state

GOLDEN = Path(__file__).with_name("golden") / "slurm-script.sbatch"

PLACE: dict[str, Any] = {"log_dir": "/shared/logs", "directory": "/shared/project"}
COMMAND = ("/shared/venv/bin/ediffi", "run", "/shared/jobs/a b/recipe.yaml", "--store", "/shared/s")
FULL: dict[str, Any] = {
    **PLACE,
    "name": "emoji-5f3a",
    "command": COMMAND,
    "num_nodes": 4,
    "cpus_per_node": 32,
    "memory_per_node_gib": 240.5,
    "gpus_per_node": 8,
    "gpu_type": "h100",
    "node_group": "gpu",
    "partition": "batch",
    "account": "vision",
    "qos": "normal",
    "time_limit_min": 240,
    "save_s": 300,
    "max_requeues": 5,
    "object_store_gib": 20,
    "python": "/shared/venv/bin/python",
    "scratch_dir": "/local",
    "setup": ("module load cuda/13", "ulimit -n 65536"),
    "environment": {"NCCL_DEBUG": "WARN", "GREETING": "it's $HOME"},
    "pass_environment": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "options": {"reservation": "monday", "constraint": "ib&ssd"},
}


def test_script_of_a_full_job() -> None:
    """Every field stands where it belongs, word for word as in the golden file."""
    script = slurm.render(SlurmJob(**FULL))
    if os.environ.get("EDIFFI_REWRITE_GOLDEN"):
        GOLDEN.write_text(script)
    assert script == GOLDEN.read_text()


def test_what_is_not_asked_for_is_not_said() -> None:
    """A job of the least has no line about partitions, GPUs or labels, and takes whole nodes."""
    lines = slurm.render(SlurmJob(name="j", command=("true",), **PLACE)).splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    said = {option.split("--")[1].split("=")[0] for option in options}
    assert said == {
        *("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "time", "signal"),
        *("chdir", "output", "open-mode", "export", "requeue"),
    }
    assert "#SBATCH --mem=0" in options
    assert "ray_options=(--num-cpus=1 --num-gpus=0)" in lines


def test_script_is_a_sound_program() -> None:
    """The shell parses it; and the words of command and environment arrive as they were given."""
    script = slurm.render(SlurmJob(**FULL))
    bash = shutil.which("bash")
    assert bash is not None
    checked = subprocess.run([bash, "-n"], input=script, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    head, _, _ = script.partition("# -- from here on")
    told = subprocess.run(
        [bash, "-s"],
        input=head + '\nprintf "%s\\n" "$GREETING" "${command[@]}"',
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.splitlines() == ["it's $HOME", *COMMAND]


@pytest.mark.parametrize(
    ("lines", "code", "words"),
    [
        ((), 0, ""),
        (("true # a comment", 'X="$NOBODY_HAS_SET_THIS"', "false || true"), 0, ""),
        (("echo no such module >&2; false # cuda", "true"), 1, "setup failed with exit code 1"),
        (("(exit 3)",), 1, "setup failed with exit code 3"),  # 3 would mean: once more
    ],
)
def test_setup_is_done_or_ends_the_job(lines: tuple[str, ...], code: int, words: str) -> None:
    """A variable that is not set is no fault, as conda has it; a line that fails is one."""
    script = slurm.render(SlurmJob(name="j", command=("true",), setup=lines, **PLACE))
    start = script.index("set +u")
    asked = script[start : script.index("set -u", start)] + "set -u\n"
    head, _, _ = script.partition("# -- from here on")
    said = subprocess.run(
        ["bash", "-s"],
        input=f'{head}\nset -uo pipefail\nsay() {{ echo "$*"; }}\n{asked}',
        capture_output=True,
        text=True,
    )
    assert (said.returncode, words in said.stdout) == (code, True), said.stdout + said.stderr


def test_no_value_of_a_secret_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of variables to pass on are in the script, what they hold is not."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-value")
    script = slurm.render(SlurmJob(**FULL))
    assert "AWS_SECRET_ACCESS_KEY" in script
    assert "hidden-value" not in script


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "Job"}, "name must be 1 to 63 lower-case"),
        ({"command": "ediffi run"}, "command must be a sequence of words"),
        ({"command": ()}, "command must be a sequence of words"),
        ({"log_dir": "logs"}, "log_dir must be an absolute path"),
        ({"directory": "/a b"}, "directory must be an absolute path without spaces"),
        ({"log_dir": "/logs/%j"}, "log_dir must be an absolute path without"),
        ({"scratch_dir": "/scratch/of/all/the/users"}, "scratch_dir must have at most 20"),
        ({"partition": "a\n#SBATCH --uid=0"}, "partition must be one word"),
        ({"partition": 3}, "partition must be one word"),
        ({"options": {"comment": "two words"}}, "options.comment must be one word"),
        ({"options": {"export": "ALL"}}, "'export' is not for here"),
        ({"options": {"--mem": "1"}}, "'--mem' is not for here"),
        ({"num_nodes": 0}, "num_nodes must be a whole number of at least 1"),
        ({"num_nodes": True}, "num_nodes must be a whole number"),
        ({"node_loss_s": 1}, "node_loss_s must be a whole number of at least 4"),
        ({"memory_per_node_gib": "24Gi"}, "write 24, not 24Gi"),
        ({"gpu_type": "h100"}, "gpus_per_node is 0: say how many"),
        ({"time_limit_min": 3, "save_s": 180}, "save_s must be shorter than time_limit_min"),
        ({"environment": {"a b": "x"}}, "'a b' is no name of an environment variable"),
        ({"environment": {"A": 1}}, "environment.A must be text, got 1"),
        ({"pass_environment": ("A=b",)}, "'A=b' is no name of an environment variable"),
        ({"setup": ("a\nb",)}, "setup must be single lines of shell"),
    ],
)
def test_fields_are_checked(values: dict[str, Any], words: str) -> None:
    """What could not run, or would say something else in the script, is refused by its name."""
    with pytest.raises(ValueError, match=words):
        SlurmJob(**{"name": "j", "command": ("true",), **PLACE, **values})


def test_job_cannot_be_changed() -> None:
    """Neither the caller's mapping nor the job's own changes a job afterwards."""
    environment = {"A": "1"}
    job = SlurmJob(name="j", command=("true",), environment=environment, **PLACE)
    environment["A"] = "2"
    assert job.environment == {"A": "1"}
    with pytest.raises(TypeError):
        job.environment["A"] = "3"  # type: ignore[index]


def test_log_is_where_the_script_writes_it() -> None:
    """`log_path` is what Slurm makes of the script's pattern."""
    job = SlurmJob(**FULL)
    pattern = "#SBATCH --output=/shared/logs/%x-%j.log"
    assert pattern in slurm.render(job).splitlines()
    assert slurm.log_path(job, "7") == Path("/shared/logs/emoji-5f3a-7.log")


@pytest.mark.parametrize(
    ("native", "name"),
    [
        ("PENDING", "waiting"),
        ("REQUEUED", "waiting"),
        ("RUNNING", "running"),
        ("COMPLETING", "running"),
        ("COMPLETED", "finished"),
        ("NODE_FAIL", "failed"),
        ("TIMEOUT", "failed"),
        ("CANCELLED", "cancelled"),
        ("SOMETHING_NEW", "unknown"),
    ],
)
def test_slurms_words(native: str, name: str) -> None:
    """Slurm's many states are few of ours; one that nobody knows is not guessed."""
    assert native_state(native) == name


def test_machine_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Slurm's commands are absent, the error says where to go."""
    monkeypatch.setenv("PATH", str(tmp_path))
    job = SlurmJob(name="j", command=("true",), log_dir=str(tmp_path), directory="/")
    for call in (lambda: slurm.submit(job), lambda: slurm.state("1"), lambda: slurm.cancel("1")):
        with pytest.raises(SlurmError, match="is not on PATH: run this on a login node"):
            call()
