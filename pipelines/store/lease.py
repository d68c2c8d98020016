"""Who works on a stage: one driver at a time, and nothing late from those it took over from.

<stage folder>/lease/<token>.json                 one file a holder; the highest number holds
                    /fences/<unit>/<token>-<attempt>   attempts before this one may not publish

A file is made by an exclusive create, so of any number of drivers one gets each number. That is
the fencing token: whoever publishes looks whether a higher one is there. The holder rewrites its
own file as a heartbeat. Clocks of hosts are never compared: a holder on another host counts as gone
once its file has not changed for `ttl_s` by the clock of the one who looks.

What a lease cannot do: between a look and the write after it, a process may be stopped for any
time. See `StageRecord.publish` for what is left of that and what closes it.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Self

from pipelines.errors import RetryableError
from pipelines.store.heartbeat import Heart
from pipelines.store.location import (
    Location,
    clear_asides,
    create_exclusively,
    names_in,
    read_text,
    write_atomically,
)
from pipelines.store.processes import Owner

_log = logging.getLogger(__name__)

LEASE_FOLDER = "lease"
LEASE_TTL_S = 60.0  # a holder that was silent for so long is taken over from
_BEATS_PER_TTL = 3
_SEEN: dict[str, tuple[str, float]] = {}  # lease file -> its text, and since when it is so


class Fenced(RetryableError):
    """Somebody else works here now; what this process made is not published."""


# -- holding --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Somebody else has the lease.

    Attributes:
        since: when it was taken, by the holder's clock, for people.
        silent_s: for how long its heartbeat has stood still before our eyes.
    """

    owner: Owner
    token: int
    since: str
    silent_s: float

    def __str__(self) -> str:
        return f"{self.owner} (pid {self.owner.pid}) since {self.since or 'an unknown time'}"


class Lease:
    """A held lease. As a context manager it is released at the end.

    Attributes:
        token: for those who publish in its name.
        lost: whether somebody has taken it over, as far as the heartbeat has seen.
    """

    def __init__(self, directory: Location, token: int, document: Mapping[str, Any]) -> None:
        self.token, self.lost = token, False
        self._directory, self._document = directory, dict(document)
        self._path = _path(directory, token)
        self._lock = threading.Lock()
        self._is_released = False

    @property
    def interval_s(self) -> float:
        """Seconds between heartbeats."""
        return float(self._document["ttl_s"]) / _BEATS_PER_TTL

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let it go, so that the next driver need not wait. Doing so twice does no harm."""
        _HEART.remove(self)
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
            try:
                if _highest(self._directory) == self.token:
                    self._write({"released": True})
            except Exception as error:  # each store has its own
                _log.warning(
                    "the lease on %s could not be let go (%s); others take it over once it was "
                    "silent for %g s",
                    self._directory,
                    error,
                    self._document["ttl_s"],
                )

    def beat(self) -> None:
        """Show that the holder lives; called by the heartbeat thread when it is time."""
        with self._lock:
            if self._is_released or self.lost:
                return
            if _highest(self._directory) != self.token:  # lower: somebody removed the folder
                self.lost = True
                _HEART.remove(self)
                return
            self._write({"beats": self._document["beats"] + 1})

    def _write(self, change: Mapping[str, Any]) -> None:
        self._document.update(change)
        write_atomically(self._path, json.dumps(self._document))


_HEART = Heart("lease")


def acquire(directory: Location, owner: Owner, *, ttl_s: float = LEASE_TTL_S) -> Lease | Held:
    """Take the lease on a stage's folder if nobody alive holds it; never waits.

    Call it again every few seconds while it is held: how long a holder has been silent can only be
    seen by looking more than once.

    Args:
        ttl_s: seconds of silence after which others may take it over from us.

    Raises:
        UserError: the store cannot hold leases.
    """
    while True:
        highest = _highest(directory)
        if highest:
            held = _holder(directory, highest, ttl_s)
            if held is not None:
                return held
        token = highest + 1
        document = {
            **asdict(owner),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "ttl_s": ttl_s,
            "beats": 0,
            "released": False,
            "nonce": secrets.token_hex(
                8
            ),  # tells our own file, if an answer got lost, from others'
        }
        path = _path(directory, token)
        if not create_exclusively(path, json.dumps(document)):
            continue
        if _highest(directory) > token:  # our look was old: numbers below the highest are reused
            path.unlink(missing_ok=True)
            continue
        _clear_below(directory, token)
        lease = Lease(directory, token, document)
        _HEART.add(lease)
        return lease


def take(directory: Location, owner: Owner) -> Lease:
    """As `acquire`, for work that does not wait.

    Raises:
        RetryableError: somebody else holds it.
    """
    found = acquire(directory, owner)
    if isinstance(found, Held):
        raise RetryableError(
            f"{directory}: {found} works there; run the same command once it ended"
        )
    return found


def let_go_of(directory: Location, run_id: str) -> None:
    """Let a stage go that a killed driver held, and remove what it was writing there."""
    if not (highest := _highest(directory)):
        return
    path = _path(directory, highest)
    document = _parse(_text(path))
    if document.get("run_id") != run_id or document.get("released"):
        return
    clear_asides(directory)
    clear_asides(path.parent)
    write_atomically(path, json.dumps({**document, "released": True}))


def _holder(directory: Location, token: int, ttl_s: float) -> Held | None:
    """Who holds a token; None if it was let go, or its owner is gone or silent for too long."""
    path = _path(directory, token)
    try:
        text = read_text(path)
    except FileNotFoundError:
        return None  # cleared: a higher one is there, and creating the next one will show it
    document = _parse(text)
    owner = Owner(
        str(document.get("run_id", "")),
        str(document.get("host", "")),
        int(document.get("pid", 0)),
        float(document.get("process_started", 0.0)),
        str(document.get("process_table", "")),
    )
    if document.get("released") or (owner.host and owner.is_gone):
        return None
    if str(path) not in _SEEN or _SEEN[str(path)][0] != text:
        _SEEN[str(path)] = (text, time.monotonic())
    silent_s = time.monotonic() - _SEEN[str(path)][1]
    if silent_s >= float(document.get("ttl_s", ttl_s)):
        del _SEEN[str(path)]
        return None
    return Held(owner, token, str(document.get("since", "")), silent_s)


def _parse(text: str) -> dict[str, Any]:
    """What a lease file says; nothing if it is damaged, so that only its silence counts."""
    try:
        document = json.loads(text)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


# -- publishing -----------------------------------------------------------------------------------


def check(directory: Location, token: int, unit_id: str = "", attempt: int = 0) -> None:
    """Make sure that work done in a lease's name may still be published.

    Args:
        token: of the lease; 0 is work that nobody guards.
        unit_id: with `attempt`, also looks whether the unit was given out again since.

    Raises:
        Fenced: it may not; the message says who works there now.
    """
    if not token:
        return
    if (highest := _highest(directory)) != token:
        document = _parse(_text(_path(directory, highest)))
        who = f"run {document.get('run_id', 'unknown')} on host {document.get('host', 'unknown')}"
        problem = f"{who} has taken the stage over" if highest > token else "its lease is gone"
        raise Fenced(
            f"publish refused: {problem} ({directory}, token {token}); nothing was changed. "
            "Run the same command: it waits for that run, or goes on if that has ended"
        )
    later = _fences(directory, unit_id) if attempt else []
    if later and max(later) > (token, attempt):
        raise Fenced(
            f"publish refused: unit {unit_id} was given out again after attempt {attempt} was "
            f"taken for lost ({directory}); nothing was changed"
        )


def fence(directory: Location, unit_id: str, attempt: int, *, token: int) -> None:
    """From now on attempts at a unit below this one may not publish.

    For the holder of the lease, when it gives a unit out again whose worker was lost: a worker that
    was only cut off goes on working until it meets this.
    """
    place = _fence_folder(directory, unit_id) / f"{token:08d}-{attempt:06d}"
    create_exclusively(place, json.dumps({"unit": unit_id, "attempt": attempt}))


def _fences(directory: Location, unit_id: str) -> list[tuple[int, int]]:
    names = names_in(_fence_folder(directory, unit_id))
    parts = [name.split("-") for name in names]
    found = [one for one in parts if len(one) == 2 and all(word.isdecimal() for word in one)]
    return [(int(token), int(attempt)) for token, attempt in found]


def _fence_folder(directory: Location, unit_id: str) -> Location:
    return directory / LEASE_FOLDER / "fences" / unit_id


def _highest(directory: Location) -> int:
    """The token in force; 0 before the first."""
    names = names_in(directory / LEASE_FOLDER)
    tokens = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    return max((int(token) for token in tokens if token.isdecimal()), default=0)


def _clear_below(directory: Location, token: int) -> None:
    """Remove the files of earlier holders, and their fences: our token is higher than theirs."""
    fences = directory / LEASE_FOLDER / "fences"
    for unit_id in names_in(fences):
        for name in names_in(fences / unit_id):
            holder = name.partition("-")[0]
            if holder.isdecimal() and int(holder) < token:
                (fences / unit_id / name).unlink(missing_ok=True)
    for name in names_in(directory / LEASE_FOLDER):
        number = name.removesuffix(".json")
        if number.isdecimal() and int(number) < token:
            _path(directory, int(number)).unlink(missing_ok=True)


def newest_file(directory: Location) -> Location | None:
    """The file of who holds the lease, or was the last to; None if nobody ever did."""
    highest = _highest(directory)
    return _path(directory, highest) if highest else None


def _path(directory: Location, token: int) -> Location:
    return directory / LEASE_FOLDER / f"{token:08d}.json"


def _text(place: Location) -> str:
    try:
        return read_text(place)
    except FileNotFoundError:
        return ""
