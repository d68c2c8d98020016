"""Tests of cluster.doctor.place: what a profile asks of the machine that submits."""

import stat
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster.doctor.place import check_place
from cluster.profile import Profile

SLURM = {
    "kind": "slurm",
    "slurm": {"directory": "/shared"},
    "node_groups": {"cpu": {"cpus_per_node": 2, "memory_per_node_gib": 4}},
}


KUBERAY = {
    "kind": "kuberay",
    "image": "x:1",
    "kuberay": {"namespace": "research", "context": "there"},
    "node_groups": {"cpu": {"cpus_per_node": 2, "memory_per_node_gib": 4}},
}


def a_program(path: Path, words: str = "") -> Path:
    """A program of a few words of shell."""
    path.write_text(f"#!/bin/sh\n{words}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def profile(**values: object) -> Profile:
    return Profile.from_mapping("mine", {"kind": "local", **values})


def test_this_machine_asks_for_nothing() -> None:
    """A local profile has no programs and no variables."""
    assert check_place(profile(), {}) == []


def test_the_scheduler_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch on PATH is fine, if a controller answers; else it is told where they are."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = check_place(profile(**SLURM), {})
    assert not finding.ok
    assert "login node" in finding.remedy
    program = a_program(tmp_path / "sbatch")
    a_program(tmp_path / "scontrol", "echo 'Slurmctld(primary) at head is UP'")
    finding, controller = check_place(profile(**SLURM), {})
    assert (finding.ok, finding.found) == (True, str(program))
    assert (controller.ok, controller.found) == (True, "Slurmctld(primary) at head is UP")
    a_program(tmp_path / "scontrol", "echo 'Slurmctld(primary) at head is DOWN'; exit 1")
    _, controller = check_place(profile(**SLURM), {})
    assert not controller.ok
    assert "is DOWN" in controller.found


@pytest.mark.parametrize(
    ("says", "found", "remedy"),
    [
        ("echo yes", "may create RayJobs in research", ""),
        ("echo no; exit 1", "may not in research", "ask for a role"),
        (
            "echo \"the server doesn't have a resource type 'x'\" >&2; echo yes",
            "no RayJ",
            "install",
        ),
        ("echo 'Unable to connect' >&2; exit 1", "Unable to connect", "log in"),
    ],
)
def test_kubernetes_must_let_us_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, found: str, remedy: str
) -> None:
    """In the profile's context and namespace, with RayJobs known there."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    a_program(tmp_path / "kubectl", f'echo "$@" > {tmp_path}/asked; {says}')
    asks = profile(**KUBERAY)
    _, permission = check_place(asks, {})
    assert (permission.ok, found in permission.found) == (not remedy, True), permission.found
    assert permission.remedy.startswith(remedy)
    asked = (tmp_path / "asked").read_text()
    assert "--namespace=research --context=there" in asked
    assert "auth can-i create rayjobs.ray.io" in asked


def test_variables_that_go_along_must_be_set() -> None:
    """Those that are missing are told by name; values never are."""
    asks = profile(pass_environment=["HF_TOKEN"], webhook="CHAT_URL")
    (finding,) = check_place(asks, {"HF_TOKEN": "hunter2"})
    assert not finding.ok
    assert finding.found == "CHAT_URL: not set"
    both = {"HF_TOKEN": "hunter2", "CHAT_URL": "https://chat/x"}
    (finding,) = check_place(asks, both)
    assert finding.ok
    assert "hunter2" not in repr(finding)


def test_training_nodes_need_shared_memory() -> None:
    """A group with accelerators and no room to talk in is named."""
    group = {
        "cpus_per_node": 8,
        "memory_per_node_gib": 64,
        "accelerators_per_node": 8,
        "shared_memory_gib": 0.0625,
    }
    ray = {"address": "http://127.0.0.1:1"}
    _, finding = check_place(profile(kind="ray", ray=ray, node_groups={"gpu": group}), {})
    assert not finding.ok
    assert finding.found == "less than 1 GiB in gpu"


def test_the_cluster_must_answer_and_let_us_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dashboard that takes the token is fine; one that does not, and nobody, are told."""

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers["Authorization"] == "Bearer sesame"
            self.send_response(404 if is_known else 403)
            self.end_headers()
            self.wfile.write(b"Job nobody does not exist")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Dashboard) as dashboard:
        thread = threading.Thread(target=dashboard.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        asks = profile(kind="ray", ray={"address": f"http://127.0.0.1:{dashboard.server_port}"})
        monkeypatch.setenv("RAY_AUTH_TOKEN", "sesame")
        (finding,) = check_place(asks, {})
        assert finding.ok, finding.found
        monkeypatch.setenv("RAY_AUTH_TOKEN", "a-wrong-one")
        (finding,) = check_place(asks, {})
        assert not finding.ok
        assert "refuses the token" in finding.found
        assert "a-wrong-one" not in repr(finding)
        dashboard.shutdown()
        thread.join()
    (finding,) = check_place(asks, {})
    assert not finding.ok
    assert "ray start --head" in finding.remedy
