"""Tests of pipelines.cli: exit codes, misspelt commands, and what an error looks like."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli
from pipelines.cli import COMMANDS, build_parser, main, parse
from pipelines.commands.options import CACHE_ACTIONS, recipe_options
from pipelines.errors import RetryableError, StageFailed, UserError


def raising(error: BaseException) -> Any:
    def command(options: Any) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("base.lrr: unknown field"), 2, "ediffi: base.lrr: unknown field\n"),
        (StageFailed("2 of 3 units failed"), 1, "ediffi: 2 of 3 units failed\n"),
        (RetryableError("told to end"), 3, "ediffi: told to end\n"),
        (StageFailed("at http://me:s3cr3t@h"), 1, "ediffi: at http://me:***@h\n"),
        (KeyboardInterrupt(), 130, "ediffi: stopped; run the same command to go on\n"),
    ],
)
def test_exit_code_and_message_tell_what_to_do(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every known way to fail is one line on stderr, none on stdout, and its own code."""
    monkeypatch.setitem(COMMANDS, "plan", (raising(error), "help", recipe_options))
    assert main(["plan", "demo"]) == code
    assert capsys.readouterr() == ("", message)


def test_an_unknown_error_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours keeps its traceback."""
    monkeypatch.setitem(COMMANDS, "plan", (raising(KeyError("x")), "", recipe_options))
    with pytest.raises(KeyError):
        main(["plan", "demo"])


def test_a_bad_recipe_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the file to the exit code: the field is named, nothing is created."""
    store = tmp_path / "store"
    assert main(["run", "demo", "--store", str(store), "--set", "base.lrr=1"]) == 2
    assert "base.lrr: unknown field; did you mean 'lr'?" in capsys.readouterr().err
    assert not store.exists()


def test_a_store_of_an_unknown_kind_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Commands that only look refuse it as a run does."""
    for words in (["plan", "demo"], ["status"], ["cache", "ls"], ["run", "demo"]):
        assert main(["--store", "gopherr://bucket/x", *words]) == 2
        assert "must be a directory or a URL such as s3://" in capsys.readouterr().err


def test_status_without_runs_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty store is answered with how to fill it."""
    assert main(["status", "--store", str(tmp_path)]) == 2
    assert "start one with `ediffi run RECIPE`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["plann", "demo"], "did you mean 'plan'?"),
        (["--store", "x", "stauts"], "did you mean 'status'?"),
        (["cache", "repiar"], "did you mean 'repair'?"),
        (["zzz"], "'doctor')\n"),  # nothing is like it: the list of commands must do
    ],
)
def test_a_misspelt_command_is_answered_with_the_likely_one(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it stands on the line."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err


def test_a_missing_argument_gets_no_hint(capsys: pytest.CaptureFixture[str]) -> None:
    """The command is right; what it lacks is named."""
    with pytest.raises(SystemExit) as caught:
        main(["plan"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "ediffi plan: the following arguments are required: recipe\n"
    )


def test_the_store_may_stand_before_or_after_the_command() -> None:
    """Either way it is the same store, and without it the default."""
    parse = build_parser().parse_args
    assert parse(["--store", "x", "status"]).store == "x"
    assert parse(["status", "--store", "x"]).store == "x"
    assert parse(["status"]).store == cli.STORE


def test_commands_of_the_command_line() -> None:
    """The surface that scripts depend on: a new or a lost command is a decision."""
    assert list(COMMANDS) == [
        *("demo", "plan", "network", "run", "submit", "embed", "status", "logs", "cancel", "list"),
        *("cost", "sample", "compare", "ema", "cache", "encoders", "doctor"),
    ]
    assert list(CACHE_ACTIONS) == ["ls", "verify", "repair", "retry", "gc", "diff"]


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """--help works for each and says what it does."""
    commands = {(name,): help_text for name, (_, help_text, _) in COMMANDS.items()}
    actions = {("cache", name): help_text for name, (_, help_text, _) in CACHE_ACTIONS.items()}
    for words, help_text in {**commands, **actions}.items():
        with pytest.raises(SystemExit) as caught:
            main([*words, "--help"])
        assert caught.value.code == 0
        assert help_text.split(";")[0] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "words", [["plan", "demo", "--probe", "-5"], ["cache", "diff", "a", "b", "--samples", "x"]]
)
def test_a_number_of_things_is_a_whole_number(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Anything else is refused with the option's name."""
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "must be a whole number such as 200" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    """`ediffi cache ls | head` ends quietly when head has seen enough."""
    code = (
        "import sys; from pipelines.cli import COMMANDS, main\n"
        "def flood(options):\n"
        "    for _ in range(100_000): print('x' * 100)\n"
        "COMMANDS['status'] = (flood, '', lambda verb: None)\n"
        "sys.exit(main(['status']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(cli.__file__).parents[1],
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_lists_may_follow_options() -> None:
    """Stages or shards after an option are what they are; anything else unknown is refused."""
    assert parse(["embed", "--encoder", "a=b:c", "x/*.tar"]).shards == ["x/*.tar"]
    assert parse(["embed", "x/*.tar", "--encoder", "a=b:c"]).shards == ["x/*.tar"]
    options = parse(["run", "demo", "--set", "seed=1", "ingest", "embed"])
    assert options.stages == ["ingest", "embed"]
    assert options.overrides == ["seed=1"]
    with pytest.raises(SystemExit, match="2"):
        parse(["run", "demo", "--jsn"])
    with pytest.raises(SystemExit, match="2"):
        parse(["plan", "demo", "--json", "ingest"])
