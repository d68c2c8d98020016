"""Fetching pictures: img2dataset for addresses, plain files for paths.

Either way each row ends as the path of the bytes, untouched, or as a `Rejection`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelines.errors import RetryableError
from pipelines.fingerprint import file_sha256
from pipelines.stages.rejects import Rejection
from pipelines.stages.source_list import Row

NUM_RETRIES = 2  # of each address
START_S = 120  # for imports on a busy machine, beside the time for the downloads
LOG_TAIL_CHARACTERS = 2000
MIN_ROWS_OF_OUTAGE = 10  # fewer dead addresses may just be dead

Fetched = Mapping[int, Path | Rejection]  # by row index

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_URL_CHARACTERS = "%/:?#[]@!$&'()*+,;=~"  # stay as they are: the address may be quoted already
_REASONS = (  # img2dataset keeps urllib's words; the first pattern found in them decides
    (re.compile(r"HTTP Error (\d{3})"), r"http_\1"),
    (re.compile(r"timed out"), "timeout"),
    (
        re.compile(
            r"Connection refused|Name or service not known|name resolution|getaddrinfo failed"
            r"|No address associated|No route to host|Network is unreachable"
        ),
        "dead_host",
    ),
    (re.compile(r"No such file or directory"), "file_missing"),
    (re.compile(r"X-Robots-Tag"), "robots_disallowed"),
)
_OUTAGE = re.compile(r"timeout|dead_host|http_(429|5\d\d)")


def local_path(folder: Path, address: str) -> Path | Rejection:
    """The file that a relative path names, if it lies inside `folder`, links resolved."""
    unsafe = Rejection(reason="path_unsafe", message=f"{address!r} leads out of {folder}")
    if Path(address).is_absolute() or ".." in Path(address).parts:
        return unsafe
    try:
        path = (folder / address).resolve()
    except (OSError, RuntimeError):  # a loop of links
        return unsafe
    if not path.is_relative_to(folder.resolve()):
        return unsafe
    if not path.is_file():
        return Rejection(reason="file_missing", message=f"no file at {folder / address}")
    return path


def resolve_address(address: str, prefix: str, folder: Path) -> str | Rejection:
    """The URL to fetch: with its scheme as it is, else behind `prefix`, else a file in `folder`."""
    if _SCHEME.match(address) or prefix:
        url = address if _SCHEME.match(address) else prefix + address
        return quote(url, safe=_URL_CHARACTERS)
    path = local_path(folder, address)
    return path if isinstance(path, Rejection) else path.as_uri()


def fetch(
    rows: Sequence[Row], *, prefix: str, folder: Path, timeout_s: int, threads: int, scratch: Path
) -> Fetched:
    """Download one unit's pictures with img2dataset, in one process of its own.

    Args:
        rows: their addresses are non-empty text.
        prefix: put before addresses without a scheme; "" makes them files in `folder`.
        scratch: an empty directory for the downloads.

    Raises:
        RetryableError: the process failed or contradicts itself, or nothing at all could be
            reached, which is an outage rather than a bad list.
    """
    results: dict[int, Path | Rejection] = {}
    urls: dict[int, str] = {}
    for row in rows:
        url = resolve_address(str(row.address), prefix, folder)
        if isinstance(url, Rejection):
            results[row.index] = url
        else:
            urls[row.index] = url
    if urls:
        _download(urls, timeout_s=timeout_s, threads=threads, scratch=scratch)
        results |= _results(urls, scratch)
        _check_outage([results[index] for index in urls])
    return results


def _download(urls: Mapping[int, str], *, timeout_s: int, threads: int, scratch: Path) -> None:
    """Run img2dataset over `urls`; its output goes to `scratch/pictures`, its words to a log."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    list_path, log_path = scratch / "addresses.parquet", scratch / "fetch.log"
    pq.write_table(pa.table({"url": list(urls.values()), "row": list(urls)}), list_path)
    arguments = {
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
        "thread_count": min(threads, len(urls)),
        "timeout": timeout_s,
        "retries": NUM_RETRIES,
        "enable_wandb": False,
    }
    patience_s = START_S + -(-len(urls) // threads) * timeout_s * (1 + NUM_RETRIES)
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


def _results(urls: Mapping[int, str], scratch: Path) -> dict[int, Path | Rejection]:
    """What became of each address, by img2dataset's own account, checked against itself."""
    import pyarrow.parquet as pq

    output = scratch / "pictures"
    stats = json.loads((output / "00000_stats.json").read_text())
    names = ["row", "key", "status", "error_message", "sha256"]
    results: dict[int, Path | Rejection] = {}
    num_whole = 0
    for record in pq.read_table(output / "00000.parquet", columns=names).to_pylist():
        if record["status"] == "success":
            path = output / "00000" / f"{record['key']}.jpg"
            num_whole += file_sha256(path) == record["sha256"]
            results[record["row"]] = path
        else:
            results[record["row"]] = classify(record["error_message"] or record["status"])
    if results.keys() != urls.keys() or num_whole != stats["successes"]:
        raise RetryableError(
            f"img2dataset lost rows: {len(urls)} asked for, {len(results)} accounted for, "
            f"{num_whole} whole against {stats['successes']} in its statistics; is the disk full?"
        )
    return results


def classify(message: str) -> Rejection:
    """Turn the words of a failed download into a reason."""
    for pattern, reason in _REASONS:
        if match := pattern.search(message):
            return Rejection(reason=match.expand(reason), message=message)
    return Rejection(reason="download_failed", message=message)


def _check_outage(results: Sequence[Path | Rejection]) -> None:
    """Refuse to write an outage down as the fault of the list.

    Raises:
        RetryableError: all of a fair number of rows failed for reasons that pass.
    """
    failures = [result for result in results if isinstance(result, Rejection)]
    passing = [failure for failure in failures if _OUTAGE.fullmatch(failure.reason)]
    if len(passing) == len(results) >= MIN_ROWS_OF_OUTAGE:
        raise RetryableError(
            f"none of {len(results)} addresses could be reached ({passing[0].message}); "
            "check the network, data.address_prefix and the server, then run again"
        )
