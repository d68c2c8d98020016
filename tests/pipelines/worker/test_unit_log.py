"""Tests of worker.unit_log: what a process says while it does a unit, in a file of the store.

Each worker is a process of its own, as a real one: stdout and stderr of the tests are not its own.
"""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipelines.store.ledger import Ledger
from pipelines.store.processes import process_table
from pipelines.worker.unit_log import UnitLog, paths

ROOT = Path(__file__).parents[3]
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")
HEAD = """
import logging, os, subprocess, sys, time, warnings
from pipelines.worker.execute import Task
from pipelines.stage import Unit
from pipelines.worker.unit_log import unit_log
from tests.pipelines.fake_stages import FakeStage

def task(unit="a", attempt=1, run_id="run-1", stage="embed/t5"):
    return Task(store=sys.argv[1], stage=FakeStage(name=stage), fingerprint="f", inputs={},
                unit=Unit(id=unit), attempt=attempt, run_id=run_id)

"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files, of this test's workers alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def start(store: str | Path, code: str) -> subprocess.Popen[str]:
    """A worker that does what `code` says."""
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(code), str(store)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def work(store: str | Path, code: str) -> tuple[str, str]:
    """stdout and stderr of a worker that ended well."""
    process = start(store, code)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def lines(log: UnitLog) -> list[str]:
    """What a log says, without the times that stand before each line."""
    found = log.place.read_text().splitlines()
    return [STAMP.sub("", line, count=1) for line in found]


def test_everything_that_is_said_is_kept(ledger: Ledger, temporary: Path) -> None:
    """Prints, warnings, log records, other processes and native code, each with a time."""
    out, err = work(
        ledger.store,
        """
        print("before")
        with unit_log(task("train-00000", attempt=2)):
            print("a print")
            subprocess.run(["sh", "-c", "echo of another process; echo and an error >&2"])
            os.write(2, b"bytes of native code\\n")
            logging.getLogger("ediffi.train").warning("a %s", "warning")
            warnings.warn("odd")
            print("10%\\r 50%\\r100%")
            print("no end of line", end="")
        print("after")
        """,
    )
    (log,) = paths(ledger, "run-1")
    assert (log.stage, log.unit, log.attempt, log.rank) == ("embed/t5", "train-00000", 2, 0)
    assert log.place == ledger.store / "logs" / "run-1" / "embed" / "t5" / "train-00000.2.log"
    head, *said, last = lines(log)
    assert head.startswith("# run run-1  embed/t5/train-00000  attempt 2  rank 0  host ")
    assert re.fullmatch(r"# done after \d+\.\d s", last)
    text = "\n".join(said)
    for words in ("of another process", "and an error", "bytes of native code", "UserWarning: odd"):
        assert words in said or words in text
    assert "WARNING ediffi.train: a warning" in said
    assert "100%" in said
    assert "no end of line" in said
    assert all(STAMP.match(line) for line in log.place.read_text().splitlines())
    assert out == "before\nafter\n"  # stdout is the worker's own again
    assert "bytes of native code" in err  # and its own log has it too
    assert list(temporary.iterdir()) == []


def test_an_error_stands_in_the_log(ledger: Ledger, temporary: Path) -> None:
    """With its traceback, and the last line says how the attempt ended."""
    work(
        ledger.store,
        """
        try:
            with unit_log(task()):
                raise ValueError("a wrong input")
        except ValueError as error:
            assert str(error) == "a wrong input"
        else:
            raise SystemExit("the error was lost")
        """,
    )
    (log,) = paths(ledger, "run-1")
    said = lines(log)
    assert "ValueError: a wrong input" in said
    assert said[-1].startswith("# ended by ValueError after ")


def test_secrets_are_not_kept(
    ledger: Ledger, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the log nor in what goes on to the worker's own stderr."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2hunter2")
    _, err = work(
        ledger.store,
        """
        with unit_log(task()):
            print("the token", os.environ["RAY_AUTH_TOKEN"])
            print("at s3://me:opensesame@host/")
        """,
    )
    (log,) = paths(ledger, "run-1")
    text = log.place.read_text()
    assert "the token ***" in text
    assert "hunter2" not in text + err
    assert "opensesame" not in text + err


def test_a_long_log_is_cut_and_says_so(ledger: Ledger, temporary: Path) -> None:
    """Beginning and end stay: at the end stands why it went wrong."""
    work(
        ledger.store,
        """
        with unit_log(task(), max_bytes=20_000):
            for number in range(20_000):
                print("line", number)
            time.sleep(0.5)
            print("the last word")
        """,
    )
    (log,) = paths(ledger, "run-1")
    said = log.place.read_text()
    assert len(said) < 20_000 + 70_000
    assert "line 0\n" in said
    assert re.search(r"\.\.\. [\d,]+ lines left out here", said)
    assert "the last word" in said


def test_several_attempts_and_ranks_have_logs_of_their_own(ledger: Ledger, temporary: Path) -> None:
    """They are listed in order; another run's are not."""
    work(
        ledger.store,
        """
        for attempt in (2, 10):
            with unit_log(task("low", attempt, stage="experts")):
                print("x")
        with unit_log(task("low", 10, stage="experts"), rank=1):
            print("y")
        with unit_log(task("base", stage="base", run_id="run-2")):
            print("z")
        """,
    )
    found = [(log.stage, log.unit, log.attempt, log.rank) for log in paths(ledger, "run-1")]
    expected = [("experts", "low", 2, 0), ("experts", "low", 10, 0), ("experts", "low", 10, 1)]
    assert found == expected
    assert paths(ledger, "no-such-run") == []


def test_a_second_unit_at_the_same_time_speaks_in_the_log_of_the_first(
    ledger: Ledger, temporary: Path
) -> None:
    """A process has one stdout; nothing is lost and nothing waits."""
    work(
        ledger.store,
        """
        with unit_log(task("a")):
            with unit_log(task("b")):
                print("from b")
            print("from a")
        """,
    )
    (log,) = paths(ledger, "run-1")
    assert log.unit == "a"
    assert lines(log)[1:3] == ["from b", "from a"]


def test_a_task_of_no_run_has_no_log(ledger: Ledger, temporary: Path) -> None:
    """What a probe tries is said where its own words go."""
    out, _ = work(ledger.store, 'with unit_log(task(run_id="")):\n    print("here")')
    assert out == "here\n"
    assert not (ledger.store / "logs").exists()


def test_the_last_words_of_a_killed_worker_are_kept(ledger: Ledger, temporary: Path) -> None:
    """The next unit on the machine writes down what the dead one had said and nobody had read."""
    process = start(
        ledger.store,
        """
        with unit_log(task("a"), poll_s=0.05):
            print("read in time", flush=True)
            while "read in time" not in open(sys.argv[1] + "/logs/run-1/embed/t5/a.1.log").read():
                time.sleep(0.01)
            print("go", flush=True)
            time.sleep(60)
        """,
    )
    _wait_for(ledger.store / "logs/run-1/embed/t5/a.1.log", "go")
    process.send_signal(signal.SIGSTOP)  # its thread reads no more
    (raw,) = temporary.glob("*.raw")
    with raw.open("ab") as stream:
        stream.write(b"Fatal: the last words\n")
    process.kill()
    process.communicate()
    work(ledger.store, 'with unit_log(task("b")):\n    print("b")')
    first, second = paths(ledger, "run-1")
    assert lines(first)[1:] == [
        "read in time",
        "go",
        "Fatal: the last words",
        "# the worker ended here without a word",
    ]
    assert "b" in lines(second)
    assert list(temporary.iterdir()) == []


def test_the_log_of_a_living_worker_is_left_alone(ledger: Ledger, temporary: Path) -> None:
    """Two workers of one machine do not take each other for dead."""
    process = start(
        ledger.store,
        """
        with unit_log(task("a"), poll_s=0.05):
            print("first", flush=True)
            while not os.path.exists(sys.argv[1] + "/go"):
                time.sleep(0.01)
            print("second")
        """,
    )
    _wait_for(ledger.store / "logs/run-1/embed/t5/a.1.log", "first")
    work(ledger.store, 'with unit_log(task("b")):\n    print("b")')
    (ledger.store / "go").touch()
    process.communicate(timeout=60)
    first, _ = paths(ledger, "run-1")
    assert lines(first)[1:3] == ["first", "second"]
    assert lines(first)[-1].startswith("# done after")


def left_by_the_dead(temporary: Path, place: str | Path) -> Path:
    """What a worker said that was killed before anybody read it."""
    owner = {"process_table": process_table(), "pid": 2**22 + 1, "process_started": 1.0}
    head = json.dumps({**owner, "place": str(place), "local": str(place)}).encode() + b"\n"
    raw = temporary / "ediffi-unit-x.raw"
    raw.write_bytes(head + b"%016d\nlast words\n" % (len(head) + 17))
    return raw


def test_the_logs_of_another_store_are_its_own_business(ledger: Ledger, temporary: Path) -> None:
    """A killed worker of a bucket that nobody can reach holds up no unit elsewhere."""
    raw = left_by_the_dead(temporary, "s3://gone/store/logs/run-0/base/base.1.log")
    _, err = work(ledger.store, 'with unit_log(task()):\n    print("here")')
    assert "here" in err
    assert "gone" not in err
    assert raw.exists()


def test_a_log_that_cannot_be_finished_fails_no_unit(ledger: Ledger, temporary: Path) -> None:
    """It is said, and what the dead worker had to say is kept for the next try."""
    place = ledger.store / "logs" / "run-0" / "base" / "base.1.log"
    place.mkdir(parents=True)  # nothing can be written there
    raw = left_by_the_dead(temporary, place)
    _, err = work(ledger.store, 'with unit_log(task()):\n    print("here")')
    assert "here" in err
    assert "base.1.log of a killed worker is incomplete" in err
    place.rmdir()
    work(ledger.store, 'with unit_log(task("b")):\n    print("b")')
    assert "last words" in place.read_text()
    assert not raw.exists()


def test_a_log_that_cannot_be_written_fails_no_unit(ledger: Ledger, temporary: Path) -> None:
    """It is said on the worker's stderr, and the unit goes on."""
    (ledger.store / "logs").write_text("a file where a folder should be")
    out, err = work(ledger.store, 'with unit_log(task()):\n    print("done all the same")')
    assert "no log can be kept" in err
    assert "done all the same" in out


def _wait_for(path: Path, words: str) -> None:
    end = time.monotonic() + 30
    while not (path.exists() and words in path.read_text()):
        assert time.monotonic() < end, f"{path} never said {words}"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_log_reaches_a_bucket(s3_store: str, temporary: Path) -> None:
    """While it grows and at its end; nothing is left on the machine."""
    code = """
    import pipelines.worker.unit_log_file
    pipelines.worker.unit_log_file.FIRST_SEND_S = 0.1
    with unit_log(task(), poll_s=0.05):
        print("while it grows", flush=True)
        from pipelines.worker.unit_log import paths
        from pipelines.store.ledger import Ledger
        end = time.monotonic() + 30
        while time.monotonic() < end:
            found = paths(Ledger.at(sys.argv[1]), "run-1")
            if found and "while it grows" in found[0].place.read_text():
                break
            time.sleep(0.05)
        else:
            raise SystemExit("it never came")
        print("the end")
    """
    work(s3_store, code)
    (log,) = paths(Ledger.at(s3_store), "run-1")
    assert (log.stage, log.unit) == ("embed/t5", "a")
    assert "the end" in lines(log)
    assert [path for path in temporary.iterdir() if path.name.startswith("ediffi-unit")] == []


def test_the_head_of_the_raw_file_tells_whose_it_is(ledger: Ledger, temporary: Path) -> None:
    """None but its user may read it: secrets stand in it."""
    work(
        ledger.store,
        """
        with unit_log(task()):
            import glob, stat
            (raw,) = glob.glob(os.environ["TMPDIR"] + "/*.raw")
            assert stat.S_IMODE(os.stat(raw).st_mode) == 0o600
        """,
    )
    assert os.listdir(temporary) == []


@pytest.mark.slow
def test_a_ray_worker_keeps_what_its_units_say(ray_cluster: None, ledger: Ledger) -> None:
    """Ray leads a worker's stdout and stderr elsewhere by itself; the unit's log comes before."""
    import ray

    from pipelines.stage import Unit
    from pipelines.worker.execute import Task, execute
    from tests.pipelines.fake_stages import FakeStage

    stage = FakeStage(name="ingest", behaviour={"a": "warns", "b": "fails"})
    run = ray.remote(num_cpus=1, max_retries=0)(execute)
    for unit in ("a", "b"):
        task = Task(
            store=str(ledger.store),
            stage=stage,
            fingerprint="f",
            inputs={},
            unit=Unit(id=unit, key="k"),
            run_id="run-1",
        )
        reference = run.remote(task)
        if unit == "b":
            with pytest.raises(RuntimeError, match="b is broken"):
                ray.get(reference)
        else:
            ray.get(reference)
    first, second = paths(ledger, "run-1")
    assert "WARNING ediffi.train.checkpoint: one is damaged" in lines(first)
    assert lines(first)[-1].startswith("# done after")
    assert "RuntimeError: b is broken" in lines(second)
    assert lines(second)[-1].startswith("# ended by RuntimeError")
