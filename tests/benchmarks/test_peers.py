"""A peer is a process that answers one line for each request, in an environment of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.peers import Peer, PeerError, environment


def test_peer_answers_requests_in_turn(tmp_path: Path, monkeypatch) -> None:
    """Requests are keyword arguments; what a peer prints does not disturb its answers."""
    script = "\n".join(
        [
            f"import sys; sys.path.insert(0, {str(peers.ROOT)!r})",
            "from benchmarks.peers import serve",
            "def add(a, b):",
            "    print('noise')",
            "    return {'sum': a + b}",
            "serve(add)",
        ]
    )
    (tmp_path / "adder.py").write_text(script)
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    with Peer("adder", Path(sys.executable)) as peer:
        assert [peer.ask(a=1, b=2), peer.ask(a="x", b="y")] == [{"sum": 3}, {"sum": "xy"}]
        with pytest.raises(PeerError, match="adder ended with exit code 1"):
            peer.ask(a=1)


def test_environment_is_made_once(tmp_path: Path, monkeypatch) -> None:
    """Installing happens when the requirements are new or changed, and not again."""
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    commands: list[list[str]] = []

    def run(command: list[str]) -> str:
        commands.append(command)
        if "venv" in command:
            (tmp_path / "x" / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
        return ""

    monkeypatch.setattr(peers, "_run", run)
    for _ in range(2):
        assert environment("x", ["a==1"]) == tmp_path / "x" / "bin" / "python"
    assert len(commands) == 2
    assert commands[1][-1] == "a==1"
    (path_file,) = tmp_path.glob("x/lib/*/site-packages/ours.pth")
    assert path_file.read_text().strip().endswith("site-packages")


def test_environment_alone_sees_nothing_of_ours(tmp_path: Path, monkeypatch) -> None:
    """Real environments: one behind which ours stands, and one that stands alone."""
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(peers, "_run", _without_pip)
    code = "import importlib.util; print(importlib.util.find_spec('pydantic') is not None)"
    for alone in (False, True):
        python = environment(f"alone-{alone}", [], alone=alone)
        found = subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout
        assert found.strip() == str(not alone)


def _without_pip(command: list[str]) -> str:
    if "pip" in command:
        return ""
    return subprocess.run(
        [*command, "--without-pip"], check=True, capture_output=True
    ).stdout.decode()


def test_failed_installation_is_told(tmp_path: Path, monkeypatch) -> None:
    """What the failing command said is in the error."""
    with pytest.raises(PeerError, match="nonsense"):
        peers._run([sys.executable, "-c", "import sys; sys.exit('nonsense')"])
