"""Telling a chat or a program that a run is over: one POST of JSON to EDIFFI_WEBHOOK_URL.

`text` is what Slack and its kin show; the other fields are for programs. The address is a secret,
for whoever has it may post: it is read from the environment alone, and nothing names it.
A webhook that fails does not fail the run; the words for people say that it did.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from pipelines.masking import masker
from pipelines.stage import Json

VARIABLE = "EDIFFI_WEBHOOK_URL"
DEADLINE_S = 10.0
ATTEMPT_S = 4.0  # one answer may take so long
FIRST_PAUSE_S = 0.5  # doubled after each attempt
MAX_ERROR_CHARACTERS = 1000


def tell(
    record: Mapping[str, Json], say: Callable[[str], None], *, deadline_s: float = DEADLINE_S
) -> bool:
    """Post how a run ended, if EDIFFI_WEBHOOK_URL is set; returns whether it was taken.

    Args:
        record: of the run, as in `runs/<run_id>.json`, with its last state.
        say: given a line for people if the webhook could not be told.
    """
    url = os.environ.get(VARIABLE, "").strip()
    if not url:
        return False
    try:
        problem = _post(url, json.dumps(message(record)).encode(), deadline_s)
    except Exception as error:  # a wrong address has many ways to fail; none may name it
        problem = f"{VARIABLE} is no address that can be posted to ({type(error).__name__})"
    if problem:
        say(f"the webhook was not told: {problem}")
    return not problem


def message(record: Mapping[str, Json]) -> Json:
    """What is posted, without secrets."""
    mask = masker()
    error = mask(record["error"])[:MAX_ERROR_CHARACTERS]
    stages = [
        {name: row[name] for name in ("name", "state", "seconds", "units")}
        for row in record["stages"]
    ]
    failure = _first_failure(error) if record["state"] == "failed" else ""
    text = f"ediffi run {record['run_id']} {record['state']} after {_duration(record['seconds'])}"
    return {
        "text": f"{text}\n{error}" if error else text,
        "run_id": record["run_id"],
        "recipe": record["recipe"],
        "state": record["state"],
        "started": record["started"],
        "ended": record["ended"],
        "seconds": record["seconds"],
        "host": record["host"],
        "stages": stages,
        "first_failure": failure,
        "error": error,
    }


def _first_failure(error: str) -> str:
    """The first unit that failed, or all that is known: a report has a line a unit, indented."""
    lines = error.splitlines()
    return next(
        (line.strip() for line in lines if line.startswith("  ")), lines[0] if lines else ""
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would arrive as a GET, or at a stranger's."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


def _post(url: str, body: bytes, deadline_s: float) -> str:
    """Try until it is taken, refused, or too late; returns what went wrong, else ""."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"{VARIABLE} must be an http:// or https:// address"
    opener = urllib.request.build_opener(_NoRedirect)
    request = urllib.request.Request(
        url, data=body, headers={"Content-Type": "application/json", "User-Agent": "ediffi"}
    )
    end, pause_s = time.monotonic() + deadline_s, FIRST_PAUSE_S
    while True:
        timeout_s = min(ATTEMPT_S, max(end - time.monotonic(), 0.1))
        try:
            with opener.open(request, timeout=timeout_s):
                return ""
        except urllib.error.HTTPError as error:
            problem = f"{parts.hostname} answered {error.code}"
            if error.code < 500 and error.code != http.client.TOO_MANY_REQUESTS:
                return f"{problem}: check {VARIABLE}"
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            problem = f"{parts.hostname} could not be reached ({type(reason).__name__})"
        if time.monotonic() + pause_s >= end:
            return f"{problem}, until {deadline_s:g} s were over"
        time.sleep(pause_s)
        pause_s *= 2
