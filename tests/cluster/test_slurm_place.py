"""A profile's job in Slurm's words."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import launch, slurm, slurm_place
from cluster.job import JobSpec
from cluster.job_state import MAX_FAILURES, SchedulerError
from cluster.profile import Profile, load_profile

PROFILE = load_profile(str(Path(__file__).with_name("profiles") / "slurm.yaml"))


def job_at(profile: Profile) -> JobSpec:
    """A job there."""
    return JobSpec(name="ediffi-demo-1", command=("ediffi", "run"), profile=profile)


def test_the_place_reaches_the_script() -> None:
    """Nodes, devices, limits, variables: each field of the profile has its place."""
    job = slurm_place.slurm_job(job_at(PROFILE))
    assert (job.num_nodes, job.cpus_per_node, job.gpus_per_node, job.gpu_type) == (4, 32, 8, "h100")
    assert (job.partition, job.account, job.qos) == ("gpu", "vision", "normal")
    assert (job.time_limit_min, job.max_requeues) == (600, 5)
    assert job.log_dir == "/shared/work/ediffi-logs"
    assert dict(job.options) == {"reservation": "monday", "constraint": "nvlink"}
    assert dict(job.environment) == {"NCCL_DEBUG": "WARN"}
    assert job.node_group == "gpu"


def test_values_that_go_along_are_only_named() -> None:
    """sbatch takes them from the shell; the webhook gets its own name there."""
    job = slurm_place.slurm_job(job_at(PROFILE))
    assert job.pass_environment == ("AWS_PROFILE", "CHAT_ADDRESS")
    assert job.setup[0] == 'export EDIFFI_WEBHOOK_URL="$CHAT_ADDRESS"'


def test_without_slurm_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every question says that Slurm's programs are not there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("AWS_PROFILE", "CHAT_ADDRESS"):
        monkeypatch.setenv(name, "x")
    values = PROFILE.to_mapping()
    values["slurm"] |= {"directory": str(tmp_path)}
    profile = Profile.from_mapping("here", values)
    for ask in (
        lambda: slurm_place.submit(job_at(profile)),
        lambda: slurm_place.state(profile, "7"),
        lambda: slurm_place.cancel(profile, "7"),
    ):
        with pytest.raises(SchedulerError, match="PATH"):
            ask()


def test_a_controller_that_is_silent_for_a_while_ends_no_following(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither before the log is there nor after; a controller that stays silent does."""
    values = PROFILE.to_mapping()
    values["slurm"] |= {"log_directory": str(tmp_path)}
    profile = Profile.from_mapping("here", values)
    answers: list[str] = []
    log = tmp_path / "ediffi-demo-1-17.log"

    def state(number: str) -> slurm.State:
        word = answers.pop(0)
        if word == "silence":
            raise slurm.SlurmError("scontrol got no answer in 60 s")
        if word == "running":
            log.write_text("hello\n")
        return slurm.State(name=word)  # type: ignore[arg-type]

    monkeypatch.setattr(slurm, "state", state)
    monkeypatch.setattr(slurm_place, "time", SimpleNamespace(sleep=lambda _: None))
    answers[:] = ["silence", "waiting", *["silence"] * 4, "running", "silence", "finished"]
    assert "".join(slurm_place.logs(profile, "17", follow=True)) == "hello\n"
    assert answers == []
    answers[:] = ["silence"] * MAX_FAILURES
    with pytest.raises(SchedulerError, match="no answer"):
        list(slurm_place.logs(profile, "17", follow=True))
    assert answers == []


def test_a_job_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Slurm is asked for all of that name; the newest counts, and none is no error."""
    program = tmp_path / "squeue"
    program.write_text('#!/bin/sh\ncd "$(dirname "$0")"\necho "$*" >asked\ncat told\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "told").write_text("")
    assert launch.find(PROFILE, "ediffi-demo-1", "login") == ""
    assert (tmp_path / "asked").read_text().split()[-1] == "--name=ediffi-demo-1"
    (tmp_path / "told").write_text("9\n17\n")
    assert launch.find(PROFILE, "ediffi-demo-1", "login") == "17"


def test_words_lie_in_the_shared_directory(tmp_path: Path) -> None:
    """The job's log is found by its number; that there is none is told with the folder."""
    values = PROFILE.to_mapping()
    values["slurm"] |= {"log_directory": str(tmp_path)}
    profile = Profile.from_mapping("here", values)
    (tmp_path / "ediffi-demo-1-17.log").write_text("hello\n")
    (tmp_path / "ediffi-demo-1-17.ray-n1.log").write_text("Ray\n")
    with pytest.raises(SchedulerError, match="no log of Slurm job 7 in"):
        list(slurm_place.logs(profile, "7"))
    assert "".join(slurm_place.logs(profile, "17")) == "hello\n"
