"""What the chaos benchmark sees: it notices what is wrong, and its outages are outages."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.chaos import audit, outcome
from benchmarks.chaos.attack import COSTS, ON_BUCKET, ON_MACHINE, ON_NODES
from benchmarks.chaos.bucket import s3_bucket
from benchmarks.chaos.outage import Outage, outage_before
from benchmarks.chaos.outcome import Outcome
from benchmarks.chaos.witness import Witness
from pipelines.stage import Outcome as UnitOutcome
from pipelines.stage import Unit
from pipelines.store.ledger import Ledger
from tests.pipelines.fake_stages import write_run

WORDS = b"all is well" * 1000


def finished(store: Path | str, text: str = "words") -> Ledger:
    """A store with one finished stage of one unit."""
    ledger = Ledger.open(store)
    record = ledger.stage("ingest", "0123456789abcdef")
    scratch = ledger.new_scratch("one")
    (scratch / "a.txt").write_text(text)
    record.open({}, {})
    record.publish(Unit(id="a"), UnitOutcome(files=["a.txt"]), scratch, seconds=1, attempt=1)
    ledger.discard_scratch_of("one")
    record.complete("ingest", {}, {}, {}, ["a"], "run-1")
    return ledger


def test_equal_stores_have_no_problems(tmp_path: Path) -> None:
    """Two stores of the same work are told to be equal, wherever they lie."""
    calm, other = finished(tmp_path / "calm"), finished(tmp_path / "other")
    assert len(audit.digests(calm)) == 3
    assert audit.problems(other, tmp_path, audit.digests(calm)) == []


def test_every_difference_is_a_problem(tmp_path: Path) -> None:
    """Other bytes, a file that no longer fits its receipt, a stage that is absent."""
    calm, other = finished(tmp_path / "calm"), finished(tmp_path / "other", "others")
    lines = audit.problems(other, tmp_path, audit.digests(calm))
    assert {line.rpartition("/")[2] for line in lines} == {
        "a.txt",
        "manifest.json",
        "receipts.jsonl",
    }
    (tmp_path / "calm" / "ingest" / "0123456789abcdef" / "a.txt").write_text("damaged")
    assert any("does not hold" in line for line in audit.problems(calm, tmp_path, {}))
    empty = Ledger.open(tmp_path / "empty")
    lines = audit.problems(empty, tmp_path, audit.digests(calm))
    assert [line.partition(":")[0] for line in lines] == ["missing"] * 3


def test_what_a_killed_driver_leaves_is_a_problem(tmp_path: Path) -> None:
    """A run that still runs, also for MLflow; work in flight; files on their way; a held lease."""
    ledger = finished(tmp_path / "store")
    calm = audit.digests(ledger)
    store = tmp_path / "store"
    write_run(ledger, "one", state="running")
    (store / ".scratch" / "left").mkdir(parents=True)
    (store / ".scratch" / "left" / "half.tar").touch()
    (store / "ingest" / f".manifest.json.{'0' * 32}").touch()
    (tmp_path / "tmp" / "ediffi-durable-x").mkdir(parents=True)
    (tmp_path / "tmp" / "ediffi-durable-x" / "row").touch()
    lease = store / "ingest" / "0123456789abcdef" / "lease"
    lease.mkdir()
    (lease / "00000001.json").write_text(json.dumps({"released": True}))
    (lease / "00000002.json").write_text("{}")
    with sqlite3.connect(store / "mlflow.db") as database:
        database.execute("CREATE TABLE runs (name TEXT, run_uuid TEXT, status TEXT)")
        database.execute("INSERT INTO runs VALUES ('base', 'abc', 'RUNNING')")
    database.close()
    lines = audit.problems(ledger, tmp_path, calm)
    wanted = ("run one", "base (abc)", "ediffi-durable", "half.tar", ".manifest", "00000002")
    assert len(lines) == len(wanted)
    assert all(any(words in line for line in lines) for words in wanted)


def test_a_receipt_that_is_replaced_is_seen(tmp_path: Path) -> None:
    """A unit that is done again after it was proven done has a new receipt."""
    ledger = finished(tmp_path / "store")
    with Witness(ledger.store) as witness:
        witness.look()
        assert (witness.num_receipts, witness.num_commits, witness.under_way) == (1, 2, [])
        path = ledger.stage("ingest", "0123456789abcdef").directory / "receipts" / "a.json"
        text = path.read_text()
        path.unlink()
        path.write_text(text)
    assert witness.error is None
    assert witness.done_again == ["ingest/0123456789abcdef/receipts/a.json"]


@pytest.mark.slow
def test_a_bucket_is_looked_at_like_a_directory(tmp_path: Path) -> None:
    """Its stages have the same digests; a replaced receipt is seen; an outage does not reach us."""
    calm = audit.digests(finished(tmp_path / "calm"))
    with s3_bucket(random.Random(0)) as bucket:
        ledger = finished(f"{bucket.url}/store")
        with Witness(ledger.store) as witness:
            witness.look()
            bucket.outage.begin("refused")
            record = ledger.stage("ingest", "0123456789abcdef")
            path = record.directory / "receipts" / "a.json"
            path.write_text(path.read_text() + " ")
            assert ask(bucket.outage)[0] == 403
            assert audit.problems(ledger, tmp_path, calm) == []
        assert witness.error is None
        assert witness.done_again == ["ingest/0123456789abcdef/receipts/a.json"]
        assert (witness.num_receipts, witness.num_commits, witness.under_way) == (1, 2, [])


class _Store(BaseHTTPRequestHandler):
    """Says that all is well."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(WORDS)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the proxy may have hung up
            self.wfile.write(WORDS)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@pytest.fixture
def outage() -> Iterator[Outage]:
    """A proxy before a server that is always well."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Store)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    with outage_before(server.server_port, random.Random(0)) as proxy:
        yield proxy
    server.shutdown()
    server.server_close()
    thread.join()


def ask(proxy: Outage, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """One request through the proxy, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=timeout_s)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_without_an_outage_bytes_pass(outage: Outage) -> None:
    """What the server says arrives as it is."""
    assert ask(outage) == (200, WORDS)
    assert outage.num_spoilt == 0


@pytest.mark.parametrize(("kind", "status"), [("busy", 503), ("refused", 403)])
def test_answers_in_place_of_the_server(outage: Outage, kind: str, status: int) -> None:
    """A busy server and lost credentials are answers; afterwards all is as before."""
    outage.begin(kind)
    assert ask(outage)[0] == status
    outage.end()
    assert ask(outage) == (200, WORDS)


@pytest.mark.parametrize("kind", ["cut", "absent"])
def test_connections_that_end(outage: Outage, kind: str) -> None:
    """Connections are reset, or there are none; afterwards all is as before, at the same port."""
    outage.begin(kind)
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(outage)
    outage.end()
    assert ask(outage) == (200, WORDS)


def test_a_stall_holds_everything_until_it_ends(outage: Outage) -> None:
    """No byte passes; nothing is lost."""
    outage.begin("stall")
    with pytest.raises(TimeoutError):
        ask(outage, timeout_s=0.2)
    threading.Timer(0.5, outage.end).start()
    started = time.monotonic()
    assert ask(outage) == (200, WORDS)
    assert time.monotonic() - started > 0.3


def an_outcome(**values: object) -> Outcome:
    """An attack of two blows, but for what the test says."""
    usual = {
        "index": 0,
        "scenery": "machine",
        "kinds": ["driver", "told"],
        "codes": [-9, 3, 0],
        "num_files": 50,
        "num_units": 22,
        "num_begun": 25,
        "num_starting_over": 12,
        "seconds": 60.0,
    }
    return Outcome(**{**usual, **values})


def test_outcomes_are_kept_and_found_again(tmp_path: Path) -> None:
    """A line that was being written when the benchmark was ended is no outcome."""
    path = tmp_path / "outcomes.jsonl"
    assert outcome.recall(path) == []
    outcome.remember(path, an_outcome())
    with path.open("a") as stream:
        stream.write('{"index": 1, "scen')
    assert outcome.recall(path) == [an_outcome()]
    assert outcome.num_kills([an_outcome()]) == 1


def test_table_and_rows_tell_what_was_redone() -> None:
    """Three attempts too many over two blows; starting over would have cost twelve."""
    (row,) = outcome.rows([an_outcome()], "command")
    assert (row.ours, row.other, row.ratio) == (1.5, 6.0, 0.25)
    text = outcome.table([an_outcome(), an_outcome(scenery="nodes", problems=["one differs"])])
    assert "| machine | 1 | 2 | 1 | 3 | 22 | 3 | 50 | 0 |" in text
    assert "| all | 2 | 4 | 2 | 6 | 44 | 6 | 100 | 1 |" in text
    assert "- nodes 0: one differs" in text


def test_every_blow_has_its_price() -> None:
    """What a blow may cost in units is said for every kind there is."""
    assert {*ON_MACHINE, *ON_NODES, *ON_BUCKET} == COSTS.keys()
