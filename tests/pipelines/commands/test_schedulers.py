"""What commands make of jobs whose schedulers answer late, not at all, or never heard of them."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import kubectl, launch, local_job
from cluster.job_state import JobState, SchedulerError
from cluster.profile import Profile
from pipelines.commands.schedulers import SENDING_S
from pipelines.jobs.submitted import Job, Jobs
from pipelines.store.ledger import Ledger

Call = Callable[..., tuple[int, str, str]]

KUBERAY = {
    "kind": "kuberay",
    "image": "x:1",
    "pin": "none",
    "store": "s3://bucket/store",
    "node_groups": {"gpu": {"cpus_per_node": 8, "memory_per_node_gib": 32}},
    "kuberay": {},
}


def job_of(ledger: Ledger, profile: dict[str, Any], **values: Any) -> Job:
    """A job that was submitted, in the store."""
    given = {
        "job_id": "ediffi-demo-01234567-1",
        "recipe": "demo",
        "profile": profile,
        "profile_name": "far",
        "kind": profile["kind"],
        "store": str(ledger.store),
        "stages": (),
        "command": ("ediffi", "run"),
        "environment": "",
    }
    job = Job(**(given | values))
    Jobs(ledger).write(job)
    return job


def ago(seconds: float) -> str:
    """A time in a record."""
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A profile of this machine, whose program waits until the test is over."""
    monkeypatch.setenv("EDIFFI_CACHE", str(tmp_path / "cache"))
    gate = tmp_path / "gate"
    driver = (
        f"import pathlib, time\nwhile not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.1)"
    )
    (tmp_path / "driver.py").write_text(driver)
    values = {
        "kind": "local",
        "pin": "none",
        "program": [sys.executable, str(tmp_path / "driver.py")],
    }
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(values))
    yield str(tmp_path / "here.yaml")
    gate.touch()


def test_a_job_that_is_being_sent_is_not_sent_again(
    ediffi: Call, ledger: Ledger, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second submission that comes before the scheduler has answered the first says so."""
    second: list[tuple[int, str, str]] = []
    send = local_job.submit

    def submit(job: Any) -> str:
        second.append(ediffi("submit", "demo", "--cluster", place))
        return send(job)

    monkeypatch.setattr(local_job, "submit", submit)
    job_id = ediffi("submit", "demo", "--cluster", place)[1].strip()
    code, out, err = second[0]
    assert (code, out.strip()) == (0, job_id)
    assert "is being submitted just now: nothing was sent" in err
    assert len(second) == 1
    assert [job.job_id for job in Jobs(ledger).all()] == [job_id]


def test_a_job_whose_submitter_was_killed_is_found_by_its_name(
    ediffi: Call, ledger: Ledger, place: str
) -> None:
    """It runs although nobody noted it: it is not sent again, and can be asked and cancelled."""
    job_id = ediffi("submit", "demo", "--cluster", place)[1].strip()
    record = Jobs(ledger).all()[0]
    Jobs(ledger).write(Job(**(vars(record) | {"native_id": "", "submitted": ago(2 * SENDING_S)})))
    assert ediffi("logs", job_id)[0] == 0
    code, out, err = ediffi("submit", "demo", "--cluster", place)
    assert (code, out.strip()) == (0, job_id)
    assert "is there already" in err
    assert Jobs(ledger).all()[0].native_id == f"{socket.gethostname()}/{job_id}"
    assert ediffi("cancel", job_id)[0] == 0


def test_a_submission_that_never_arrived_is_told(
    ediffi: Call, ledger: Ledger, place: str, tmp_path: Path
) -> None:
    """Young, it may yet arrive; old, it was interrupted, and another is sent."""
    profile = yaml.safe_load(Path(place).read_text())
    job = job_of(ledger, profile)
    told = json.loads(ediffi("status", job.job_id, "--json")[1])["job"]
    assert (told["state"], told["reason"]) == ("waiting", "it is being submitted")
    job_of(ledger, profile, submitted=ago(2 * SENDING_S))
    told = json.loads(ediffi("status", job.job_id, "--json")[1])["job"]
    assert told["state"] == "unknown"
    assert "was interrupted, and the scheduler knows no job of that name" in told["reason"]
    code, _, err = ediffi("logs", job.job_id)
    assert (code, "was interrupted" in err) == (2, True)


def test_a_cancelled_rayjob_stays_cancelled(
    ediffi: Call, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes forgets what was deleted; the store does not."""
    there = [JobState(name="running"), JobState(name="unknown", reason="was it deleted?")]
    monkeypatch.setattr(kubectl, "state", lambda profile, native_id: there.pop(0))
    monkeypatch.setattr(kubectl, "cancel", lambda profile, native_id: None)
    job = job_of(ledger, KUBERAY, native_id="ediffi-demo-01234567-1")
    assert ediffi("cancel", job.job_id)[0] == 0
    assert ediffi("status", job.job_id)[1].startswith(f"{job.job_id}  cancelled")
    assert "cancelled" in ediffi("list")[1]
    assert len(there) == 1


def test_a_silent_cluster_is_waited_for_once(
    ediffi: Call,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the store knows stands there before anybody is asked; then each place is asked once."""
    asked: list[str] = []

    def state(profile: Profile, native_id: str) -> JobState:
        asked.append(native_id)
        told.append(capsys.readouterr().out)
        raise SchedulerError("no Ray dashboard there", may_pass=True)

    told: list[str] = []
    monkeypatch.setattr(launch, "state", state)
    for number in range(1, 5):
        address = f"http://10.0.0.{5 + number // 4}:8265"
        name = f"ediffi-demo-01234567-{number}"
        profile = {"kind": "ray", "ray": {"address": address}}
        job_of(ledger, profile, job_id=name, native_id=name, submitted=ago(100 - number))
    job_of(ledger, KUBERAY, job_id="ediffi-old-01234567-1", state="finished", submitted=ago(999))
    code, out, err = ediffi("list")
    assert code == 3
    assert asked == ["ediffi-demo-01234567-4", "ediffi-demo-01234567-3"]
    assert told[0].startswith("ediffi-old-01234567-1")
    assert (told[1] + out).count("waiting?") == 4
    assert "no Ray dashboard there (and 1 more)" in err


def test_an_unreadable_record_hides_no_other(ediffi: Call, ledger: Ledger) -> None:
    """The others are listed, with a word about it; whoever names that job gets the error."""
    sound = job_of(ledger, KUBERAY, state="finished")
    folder = ledger.store / "jobs" / "ediffi-newer-01234567-1"
    folder.mkdir()
    for text in ("{", "[1]", '{"job_id": 1}', json.dumps(vars(sound)), '{"novel": "field"}'):
        (folder / "job.json").write_text(text)
        code, out, err = ediffi("list", "--json")
        assert (code, json.loads(out)["id"]) == (0, sound.job_id)
        assert f"ediffi: left out: {folder}/job.json" in err
        assert ediffi("status", sound.job_id)[0] == 0
        for verb in ("status", "logs", "cancel"):
            code, _, err = ediffi(verb, "ediffi-newer")
            assert (code, f"{folder}/job.json" in err, "remove its folder" in err) == (
                2,
                True,
                True,
            )


def test_secrets_do_not_travel_to_ray(ediffi: Call, tmp_path: Path) -> None:
    """The driver is told which variables it must find; no value is asked for here or shown."""
    profile = tmp_path / "far.yaml"
    profile.write_text(
        "kind: ray\nstore: s3://bucket/store\npin: none\npass_environment: [OUR_KEY]\n"
        "webhook: OUR_CHAT\nray: {address: 'http://10.0.0.5:8265'}\n"
    )
    code, out, _ = ediffi(
        "submit", "demo", "--cluster", str(profile), "--store", "ediffi-store", "--dry-run"
    )
    assert code == 0
    assert "--require-environment OUR_KEY --require-environment OUR_CHAT" in out
    assert json.loads(out.partition("\n")[2])["runtime_env"]["env_vars"].keys() == {
        "EDIFFI_JOB_ID",
        "RAY_JOB_STOP_WAIT_TIME_S",
    }
