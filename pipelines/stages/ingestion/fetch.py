"""Fetching pictures by their addresses, with img2dataset.

Each row ends as the path of the bytes, untouched, or as a `Rejection`. What fails for a reason
that passes is asked for again after a pause; what is dead, absent or refused is not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelines.errors import RetryableError
from pipelines.stages.ingestion.address_guard import REFUSED
from pipelines.stages.ingestion.guarded_http import RETRY_AFTER, TOO_LARGE
from pipelines.stages.ingestion.picture_files import Fetched, find_pictures
from pipelines.stages.ingestion.rejects import Rejection
from pipelines.stages.ingestion.source_list import Row
from pipelines.store.fingerprint import file_sha256
from pipelines.store.location import Location

START_S = 120  # for imports on a busy machine, beside the time for the downloads
PICTURE_TIMEOUTS = 6  # one picture may take so many times `timeout_s`, however it trickles in
PAUSE_S, MAX_PAUSE_S = 1, 60  # before the first retry; the pause doubles; servers may ask for more
LOG_TAIL_CHARACTERS = 2000
MIN_ROWS_OF_OUTAGE = 10  # fewer dead addresses may just be dead

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_URL_CHARACTERS = "%/:?#[]@!$&'()*+,;=~"  # stay as they are: the address may be quoted already
_RETRY_AFTER = re.compile(re.escape(RETRY_AFTER) + r"([^>]*)")
_REASONS = (  # img2dataset keeps urllib's words; the first pattern found in them decides
    (re.compile(rf"{REFUSED}|unknown url type|Redirection to url"), "address_refused"),
    (re.compile(TOO_LARGE), "image_too_large"),
    (re.compile(r"HTTP Error (\d{3})"), r"http_\1"),
    (re.compile(r"timed out"), "timeout"),
    (
        re.compile(
            r"Connection refused|Name or service not known|name resolution|getaddrinfo failed"
            r"|No address associated|No route to host|Network is unreachable"
        ),
        "dead_host",
    ),
    (
        re.compile(
            r"Connection reset|Connection aborted|Remote end closed|IncompleteRead|Broken pipe"
            r"|UNEXPECTED_EOF|EOF occurred"
        ),
        "connection_lost",
    ),
    (re.compile(r"X-Robots-Tag"), "robots_disallowed"),
)
_RETRIED = re.compile(r"timeout|connection_lost|http_(429|5\d\d)")  # at once
_OUTAGE = re.compile(rf"dead_host|{_RETRIED.pattern}")
# Later: what may have been the network's fault, or that of a setting outside the fingerprint.
PASSING_REASONS = re.compile(rf"{_OUTAGE.pattern}|download_failed|address_refused")


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    """How pictures are fetched: the fields of `data`, and where relative addresses lead."""

    prefix: str  # put before addresses without a scheme; "" makes them files in `folder`
    folder: Location
    allow_addresses: tuple[str, ...]
    timeout_s: int
    retries: int
    threads: int
    max_bytes: int


@dataclass(frozen=True, kw_only=True)
class Download:
    """Every row's file or rejection, and what it took."""

    pictures: Fetched
    timings: Mapping[str, float]


def fetch(rows: Sequence[Row], settings: FetchSettings, scratch: Path) -> Download:
    """Get one unit's pictures.

    Args:
        rows: their addresses are non-empty text.
        scratch: an empty directory for the downloads.

    Raises:
        RetryableError: img2dataset's process failed or contradicts itself.
    """
    pictures: dict[int, Path | Rejection] = {}
    urls: dict[int, str] = {}
    files: list[Row] = []
    for row in rows:
        url = resolve_address(str(row.address), settings.prefix)
        if not url:
            files.append(row)
        elif isinstance(url, Rejection):
            pictures[row.index] = url
        else:
            urls[row.index] = url
    pictures |= find_pictures(files, settings.folder, max_bytes=settings.max_bytes, scratch=scratch)
    if not urls:
        return Download(pictures=pictures, timings={})
    downloaded, timings = _download(urls, settings, scratch)
    return Download(pictures=pictures | downloaded, timings=timings)


def resolve_address(address: str, prefix: str) -> str | Rejection:
    """The URL to fetch: with its scheme as it is, else behind `prefix`; "" for a file."""
    scheme = _SCHEME.match(address)
    if not scheme and not prefix:
        return ""
    if scheme and scheme[1].lower() not in {"http", "https"}:
        problem = f"{REFUSED}: {scheme[0]} is not fetched, only http:// and https:// are"
        return Rejection(reason="address_refused", message=problem)
    return quote(address if scheme else prefix + address, safe=_URL_CHARACTERS)


def check_outage(pictures: Fetched) -> None:
    """Refuse to write an outage down as the fault of the list.

    Raises:
        RetryableError: all of a fair number of rows failed for reasons that pass.
    """
    failures = [result for result in pictures.values() if isinstance(result, Rejection)]
    passing = [failure for failure in failures if _OUTAGE.fullmatch(failure.reason)]
    if len(passing) == len(pictures) >= MIN_ROWS_OF_OUTAGE:
        raise RetryableError(
            f"none of {len(pictures)} addresses could be reached ({passing[0].message}); "
            "check the network, data.address_prefix and the server, then run again"
        )


def classify(words: str) -> Rejection:
    """Turn the words of a failed download into a reason."""
    message = _RETRY_AFTER.sub("", words)
    for pattern, reason in _REASONS:
        if match := pattern.search(message):
            return Rejection(reason=match.expand(reason), message=message)
    return Rejection(reason="download_failed", message=message)


# -- rounds ---------------------------------------------------------------------------------------


def _download(
    urls: Mapping[int, str], settings: FetchSettings, scratch: Path
) -> tuple[dict[int, Path | Rejection], dict[str, float]]:
    """Download in rounds: every one after the first asks again for what failed but may pass."""
    results: dict[int, Path | Rejection] = {}
    failed_first: dict[int, str] = {}  # row -> reason, of rows that are asked for again
    counts: Counter[str] = Counter()
    left, pause_s, start_s = urls, float(PAUSE_S), time.monotonic()
    for round_index in range(settings.retries + 1):
        folder = scratch / f"round-{round_index}"
        folder.mkdir()
        _run_round(left, settings, folder)
        said = _results(left, folder)
        found = {
            row: classify(word) if isinstance(word, str) else word for row, word in said.items()
        }
        results |= found
        again = {
            row: result.reason
            for row, result in found.items()
            if isinstance(result, Rejection) and _RETRIED.fullmatch(result.reason)
        }
        if not again or round_index == settings.retries:
            break
        counts.update(f"num_retries_{reason}" for reason in again.values())
        failed_first = {**again, **failed_first}
        left = {row: urls[row] for row in again}
        time.sleep(min(max(pause_s, _asked_pause_s(said)), MAX_PAUSE_S))
        pause_s *= 2
    counts.update(
        f"num_recovered_{reason}"
        for row, reason in failed_first.items()
        if isinstance(results[row], Path)
    )
    return results, {"download_s": round(time.monotonic() - start_s, 3), **counts}


def _asked_pause_s(said: Mapping[int, Path | str]) -> float:
    """The longest time that a server asked to be left alone for; dates are not read."""
    asked = [_RETRY_AFTER.search(words) for words in said.values() if isinstance(words, str)]
    return max((int(match[1]) for match in asked if match and match[1].isdigit()), default=0)


def _run_round(urls: Mapping[int, str], settings: FetchSettings, scratch: Path) -> None:
    """Run img2dataset over `urls`; its output goes to `scratch/pictures`, its words to a log."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    list_path, log_path = scratch / "addresses.parquet", scratch / "fetch.log"
    pq.write_table(pa.table({"url": list(urls.values()), "row": list(urls)}), list_path)
    max_s = settings.timeout_s * PICTURE_TIMEOUTS
    download = {
        "url_list": str(list_path),
        "input_format": "parquet",
        "url_col": "url",
        "save_additional_columns": ["row"],
        "output_folder": str(scratch / "pictures"),
        "output_format": "files",
        "number_sample_per_shard": len(urls),
        "disable_all_reencoding": True,  # the bytes as they were served
        "resize_mode": "no",
        "extract_exif": False,
        "compute_hash": "sha256",
        "thread_count": min(settings.threads, len(urls)),
        "timeout": settings.timeout_s,
        "retries": 0,  # it would ask a dead host again, and at once
        "enable_wandb": False,
    }
    arguments = {
        "download": download,
        "allow_addresses": settings.allow_addresses,
        "max_bytes": settings.max_bytes,
        "max_s": max_s,
    }
    # One wait for the connection, then the picture.
    patience_s = START_S + -(-len(urls) // settings.threads) * (settings.timeout_s + max_s)
    try:
        _run(arguments, log_path, patience_s)
    except subprocess.SubprocessError as error:
        tail = log_path.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:].strip()
        problem = (
            f"exit code {error.returncode}"
            if isinstance(error, subprocess.CalledProcessError)
            else f"no end after {patience_s} s"
        )
        raise RetryableError(f"img2dataset: {problem}; it said:\n{tail}") from error


def _run(arguments: Mapping[str, Any], log_path: Path, patience_s: int) -> None:
    # -P keeps the folder of the script, with our modules' plain names, out of its import path. A
    # session of its own keeps Ctrl-C for us; whatever ends this call kills the process.
    script = Path(__file__).with_name("fetch_process.py")
    with log_path.open("wb") as log:
        subprocess.run(
            [sys.executable, "-P", str(script), str(os.getpid())],
            input=json.dumps(arguments).encode(),
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"},
            start_new_session=True,
            timeout=patience_s,
            check=True,
        )


def _results(urls: Mapping[int, str], scratch: Path) -> dict[int, Path | str]:
    """What became of each address, by img2dataset's own account, checked against itself.

    Returns:
        The picture's file, or the words of the failure.

    Raises:
        RetryableError: rows or bytes are missing.
    """
    import pyarrow.parquet as pq

    output = scratch / "pictures"
    stats = json.loads((output / "00000_stats.json").read_text())
    names = ["row", "key", "status", "error_message", "sha256"]
    results: dict[int, Path | str] = {}
    num_whole = 0
    for record in pq.read_table(output / "00000.parquet", columns=names).to_pylist():
        if record["status"] == "success":
            path = output / "00000" / f"{record['key']}.jpg"
            num_whole += file_sha256(path) == record["sha256"]
            results[record["row"]] = path
        else:
            results[record["row"]] = record["error_message"] or record["status"]
    if results.keys() != urls.keys() or num_whole != stats["successes"]:
        raise RetryableError(
            f"img2dataset lost rows: {len(urls)} asked for, {len(results)} accounted for, "
            f"{num_whole} whole against {stats['successes']} in its statistics; is the disk full?"
        )
    return results
