"""What is asked of kubectl and made of its answers, with a stand-in for the program itself."""

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cluster import kubectl
from cluster.job import JobSpec
from cluster.job_state import MAX_FAILURES, AlreadyThereError, SchedulerError
from cluster.profile import load_profile

PROFILE = load_profile(str(Path(__file__).with_name("profiles") / "kuberay.yaml"))
JOB = JobSpec(name="ediffi-demo-1", command=("ediffi", "run"), profile=PROFILE)


class Answers:
    """A program called kubectl that notes what it is asked and answers as told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        script = folder / "kubectl"
        script.write_text(
            "#!/bin/sh\n"
            f'cd "{folder}"\n'
            'echo "$*" >>asked\n'
            "case $3 in create) cat >stdin;; esac\n"
            "[ ! -e $3.out ] || cat $3.out\n"
            "[ ! -e $3.err ] || { cat $3.err >&2; exit 1; }\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def give(self, verb: str, *, out: str = "", error: str = "") -> None:
        (self._folder / f"{verb}.out").write_text(out)
        (self._folder / f"{verb}.err").unlink(missing_ok=True)
        if error:
            (self._folder / f"{verb}.err").write_text(error)

    def asked(self) -> list[str]:
        return (self._folder / "asked").read_text().splitlines()

    def stdin(self) -> str:
        return (self._folder / "stdin").read_text()


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """A kubectl of ours, first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Answers(tmp_path)


def test_a_job_is_created_in_its_namespace(answers: Answers) -> None:
    """The manifest goes in by stdin; the context and the namespace are the profile's."""
    assert kubectl.submit(JOB) == "ediffi-demo-1"
    assert answers.asked() == ["--context=cluster-a --namespace=research create --filename=-"]
    assert yaml.safe_load(answers.stdin())["kind"] == "RayJob"


@pytest.mark.parametrize(
    ("stderr", "kind", "words"),
    [
        (
            'Error from server (AlreadyExists): rayjobs.ray.io "x" already exists',
            AlreadyThereError,
            "already exists",
        ),
        (
            'error: no matches for kind "RayJob" in version "ray.io/v1"',
            SchedulerError,
            "the KubeRay operator is not installed there",
        ),
        (
            "The connection to the server 10.0.0.1:6443 was refused - did you specify the right "
            "host or port?",
            SchedulerError,
            "is it up, and the context the right one",
        ),
        (
            'Error from server (Forbidden): rayjobs.ray.io is forbidden: User "me" cannot create',
            SchedulerError,
            "kubectl create in namespace research .*Forbidden",
        ),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(
    answers: Answers, stderr: str, kind: type[SchedulerError], words: str
) -> None:
    """With the namespace, the profile and what to do about it."""
    answers.give("create", error=stderr)
    with pytest.raises(kind, match=words):
        kubectl.submit(JOB)


def test_without_kubectl_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What to install, or where to go; what --dry-run prints has no recipe beside it to run."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for ask in (lambda: kubectl.submit(JOB), lambda: list(kubectl.logs(PROFILE, "x"))):
        with pytest.raises(SchedulerError, match=r"needs kubectl, .*run this command") as caught:
            ask()
        assert "dry-run" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "name", "reason"),
    [
        ({}, "waiting", "in the queue"),
        ({"jobDeploymentStatus": "Suspended"}, "waiting", "in the queue"),
        ({"jobDeploymentStatus": "Initializing"}, "waiting", "in the queue"),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, "running", ""),
        ({"jobDeploymentStatus": "Retrying"}, "waiting", "in the queue"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "finished", ""),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "cancelled", ""),
        (
            {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "too\nlong"},
            "failed",
            "too",
        ),
        ({"jobDeploymentStatus": "ValidationFailed", "reason": "Bad"}, "failed", "Bad"),
    ],
)
def test_the_operators_words_become_ours(
    answers: Answers, status: dict[str, Any], name: str, reason: str
) -> None:
    """Whatever state the operator reports; the reason is one line."""
    answers.give("get", out=json.dumps({"spec": {"suspend": True}, "status": status}))
    state = kubectl.state(PROFILE, "ediffi-demo-1")
    assert (state.name, state.reason) == (name, reason)


def test_a_job_that_was_deleted_is_unknown(answers: Answers) -> None:
    """kubectl says nothing, and that is no error."""
    answers.give("get")
    assert kubectl.state(PROFILE, "ediffi-demo-1").name == "unknown"
    with pytest.raises(SchedulerError, match="nothing to cancel"):
        kubectl.cancel(PROFILE, "ediffi-demo-1")


def test_words_are_those_of_the_submitter(answers: Answers) -> None:
    """Its pod passes on what the driver says; with follow kubectl follows."""
    answers.give("logs", out="one\ntwo\n")
    assert "".join(kubectl.logs(PROFILE, "ediffi-demo-1", follow=True)) == "one\ntwo\n"
    assert answers.asked()[-1].endswith("logs job/ediffi-demo-1 --follow")
    answers.give("logs", error='Error from server (NotFound): jobs.batch "x" not found')
    with pytest.raises(SchedulerError, match="NotFound"):
        list(kubectl.logs(PROFILE, "ediffi-demo-1"))


def test_words_are_awaited_while_the_job_waits(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With follow: as long as Kueue holds it, and until its submitter's pod runs."""
    stages = iter(
        [
            {"get": ("Suspended", ""), "logs": ("", 'Error (NotFound): jobs.batch "x" not found')},
            {"get": ("Running", ""), "logs": ("", 'Error (NotFound): jobs.batch "x" not found')},
            {"get": ("Running", ""), "logs": ("", "is waiting to start: ContainerCreating")},
            {"get": ("Running", ""), "logs": ("one\n", "")},
        ]
    )

    def go_on(_: float = 0.0) -> None:
        for verb, (word, error) in next(stages).items():
            status = json.dumps({"status": {"jobDeploymentStatus": word}})
            answers.give(verb, out=status if verb == "get" else word, error=error)

    monkeypatch.setattr(kubectl, "time", SimpleNamespace(sleep=go_on))
    go_on()
    assert "".join(kubectl.logs(PROFILE, "ediffi-demo-1", follow=True)) == "one\n"
    assert sum("logs job" in words for words in answers.asked()) == 3
    assert next(stages, None) is None


def test_words_that_never_come_are_given_up(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is over, or was deleted, and has no pod: after some attempts the error is told."""
    monkeypatch.setattr(kubectl, "time", SimpleNamespace(sleep=lambda _: None))
    answers.give("get")
    answers.give("logs", error='Error from server (NotFound): jobs.batch "x" not found')
    with pytest.raises(SchedulerError, match="NotFound"):
        list(kubectl.logs(PROFILE, "ediffi-demo-1", follow=True))
    assert sum("logs job" in words for words in answers.asked()) == MAX_FAILURES


def test_a_running_driver_may_save_before_its_cluster_goes(answers: Answers) -> None:
    """Ray on the head is asked to stop it, and then the job is deleted; even if that failed."""
    status = {"jobDeploymentStatus": "Running", "rayClusterName": "c", "jobId": "s"}
    answers.give("get", out=json.dumps({"status": status}))
    kubectl.cancel(PROFILE, "ediffi-demo-1")
    assert any(words.endswith("ray job stop s") for words in answers.asked())
    assert "delete rayjob/ediffi-demo-1" in answers.asked()[-1]
    answers.give("exec", error="pods are gone")
    with pytest.raises(SchedulerError, match="pods are gone"):
        kubectl.cancel(PROFILE, "ediffi-demo-1")
    assert "delete rayjob/ediffi-demo-1" in answers.asked()[-1]
