"""Stages that Ray Jobs of their own drive (`resources.<stage>.job: own`).

On a cluster that others started such a job outlives the driver that submitted it. To a driver the
stage is then one that somebody else works on: it looks after the job and for the manifest. If it
dies, the next one finds the job by its id, and submits nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from pipelines.driver.backoff import delay_s
from pipelines.driver.ray_cluster import is_joined
from pipelines.driver.stage_state import StageState
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.jobs.stage_job import (
    END_S,
    JobClient,
    Request,
    Standing,
    Unreachable,
    how_it_ended,
    last_words,
    private_variables,
    recipe_text,
    record_of,
    stem_of,
    variables_of,
)
from pipelines.jobs.submitted import Jobs, number_of
from pipelines.recipe import CacheRecipe
from pipelines.store.ledger import Ledger

SILENT_S = 120.0  # a dashboard may be restarted by then; the job itself goes on without it
LOOK_S = 1.0  # between two looks at jobs that were told to end
# Exit codes that another attempt would give again: of ours see `errors`, then those of a shell.
_FOR_GOOD = {1, 2, 126, 127}
_STATES = {"SUCCEEDED": "finished", "FAILED": "failed", "STOPPED": "cancelled"}


@dataclass
class _Followed:
    """The job of one stage, as this run sees it.

    Attributes:
        number: of the job that is at work, or would be submitted next.
        standing: as last heard of it; None before it is known to be there.
        num_ended: jobs that ended in this run without the stage's manifest.
        is_seen_over: it has ended; the manifest is looked for once more before it is judged.
        submit_at: the next one may be submitted from then on, by our own clock.
        silent_since: while nothing can be heard.
        leaves_by: it is about to end, and waited for until then.
    """

    state: StageState
    stem: str
    number: int
    standing: Standing | None = None
    num_ended: int = 0
    is_seen_over: bool = False
    submit_at: float = 0.0
    silent_since: float | None = None
    leaves_by: float = 0.0

    @property
    def job_id(self) -> str:
        return f"{self.stem}-{self.number}"


class StageJobs:
    """Submits, finds, judges and stops the jobs of stages.

    Args:
        say: tells a person.
        connect: makes the client when it is first needed; None: the cluster takes no jobs.
        tracking_uri: where this run is tracked, and so are its jobs.
        is_driven: whether a run is under way, by its id.
    """

    def __init__(
        self,
        recipe: CacheRecipe,
        ledger: Ledger,
        *,
        run_id: str,
        say: Callable[[str], None],
        connect: Callable[[], JobClient | None] | None = None,
        tracking_uri: str = "",
        is_driven: Callable[[str], bool] = lambda run_id: False,
    ) -> None:
        self._recipe, self._ledger, self._run_id = recipe, ledger, run_id
        self._say, self._tracking_uri, self._is_driven = say, tracking_uri, is_driven
        self._connect = connect or _client_of_this_cluster
        self._jobs = Jobs(ledger)
        self._followed: dict[str, _Followed] = {}
        self._done_here: set[str] = set()

    def is_wanted(self, state: StageState) -> bool:
        """Whether a job shall drive the stage. On a Ray of the run's own it would die with it."""
        return state.resources.job == "own" and is_joined() and state.name not in self._done_here

    # -- looking ---------------------------------------------------------------------------------

    def is_at_work(self, state: StageState) -> bool:
        """Look after the stage's job; False while there is none.

        For a stage without its manifest: what was finished in between is looked for first.

        Raises:
            StageFailed, UserError: the job failed for good; the message has its last words.
            RetryableError: it ended too often, or the cluster has not answered for long.
        """
        one = self._followed_of(state)
        if time.monotonic() < one.submit_at:
            return True
        try:
            found = self._newest(one)
        except _TakesNoJobs:
            self._do_here(state)
            return False
        except Unreachable as error:
            self._be_patient(one, error)
            return True
        if found is not None and found.is_open:
            self._attach(one, found)
            return True
        if one.standing is None:
            return False
        if not one.is_seen_over:
            one.is_seen_over = True  # its manifest may have come after the last look for it
            return True
        self._judge(one, found)
        return True

    def other_run(self, state: StageState) -> str:
        """Words for the stage's job if it is another run's that is under way; else ""."""
        one = self._followed_of(state)
        run_id = one.standing.run_id if one.standing is not None else self._run_id
        if run_id == self._run_id or not self._is_driven(run_id):
            return ""
        return f"job {one.job_id} of run {run_id}"

    def _followed_of(self, state: StageState) -> _Followed:
        if state.name not in self._followed:
            stem = stem_of(state.planned, self._ledger)
            newest = next(iter(self._jobs.of_stem(stem)), None)
            number = number_of(newest.job_id) if newest is not None else 1
            self._followed[state.name] = _Followed(state, stem, number)
        return self._followed[state.name]

    def _newest(self, one: _Followed) -> Standing | None:
        """How the newest job stands; before there is one of interest, those that ended are passed.

        The record of a job is written before it is submitted. So a number of which the cluster
        knows nothing is free: its submission was cut off, or the cluster is another by now.
        """
        while True:
            found = self._client.look(one.job_id)
            if found is None or found.is_open or one.standing is not None:
                return found
            one.number += 1

    def _attach(self, one: _Followed, found: Standing) -> None:
        if one.standing is None:
            run = f", submitted by run {found.run_id}" if found.run_id else ""
            self._say(f"{one.state.name}: job {one.job_id} works on it already{run}; waits for it")
        one.standing, one.silent_since = found, None

    def _do_here(self, state: StageState) -> None:
        self._done_here.add(state.name)
        self._say(
            f"{state.name}: resources.{state.resources_name}.job is own, but this cluster takes no "
            "jobs: its head was started without a dashboard; the run drives the stage itself"
        )

    def _be_patient(self, one: _Followed, error: Unreachable) -> None:
        """Raises RetryableError once nothing has been had of the cluster for too long."""
        now = time.monotonic()
        if one.silent_since is None:
            one.silent_since = now
            self._say(f"{one.state.name}: {error}; asks again")
        elif now - one.silent_since > SILENT_S:
            raise RetryableError(
                f"stage {one.state.name}: for {SILENT_S:g} s: {error}. If job {one.job_id} "
                "is at work it goes on, and the same command waits for it; or set "
                f"resources.{one.state.resources_name}.job to run"
            ) from error

    # -- submitting ------------------------------------------------------------------------------

    def submit(self, state: StageState) -> bool:
        """Give the stage to a job; True, for it is then at work.

        Raises:
            UserError: the cluster refuses the job.
            RetryableError: it has not answered for long.
        """
        one = self._followed_of(state)
        place = self._jobs.folder(one.job_id) / "recipe.yaml"
        record = record_of(
            one.job_id, state.name, self._recipe, self._ledger, str(place), self._client.address
        )
        request = Request(
            job_id=one.job_id,
            run_id=self._run_id,
            command=record.command,
            variables=variables_of(one.job_id, self._run_id, state.resources),
            private=private_variables(os.environ, self._tracking_uri),
        )
        self._jobs.keep_again(record, recipe_text(self._recipe))
        try:
            is_ours = self._client.submit(request)
        except Unreachable as error:
            self._be_patient(one, error)
            return True
        if is_ours:  # else another run was faster, and the next look attaches to its job
            one.standing, one.silent_since = Standing(status="PENDING", run_id=self._run_id), None
            self._say(f"{state.name}: submitted as job {one.job_id}; see {self._logs_of(one)}")
        return True

    # -- judging ---------------------------------------------------------------------------------

    def _judge(self, one: _Followed, found: Standing | None) -> None:
        """A job is over and has left no manifest: another one, or the stage has failed."""
        name, resources = one.state.name, one.state.resources
        one.num_ended += 1
        self._note_end(one, found)
        story = f"job {one.job_id} {how_it_ended(found)}"
        if found is not None and (found.status == "SUCCEEDED" or found.exit_code in _FOR_GOOD):
            kind = UserError if found.exit_code == UserError.exit_code else StageFailed
            raise kind(self._report(one, found, story))
        if one.num_ended >= resources.attempts:
            raise RetryableError(self._report(one, found, story))
        pause_s = delay_s(resources.backoff_s, one.num_ended, name)
        self._say(
            f"{name}: {story}: attempt {one.num_ended} of {resources.attempts}; another job is "
            f"submitted in {pause_s:.1f} s"
        )
        one.submit_at = time.monotonic() + pause_s
        one.standing, one.is_seen_over = None, False
        one.number += found is not None  # else its number is free again

    def _report(self, one: _Followed, found: Standing | None, story: str) -> str:
        """What happened, the job's last words, and where to read more."""
        lines = last_words(found)
        if found is not None and found.status == "SUCCEEDED":
            lines = [f"but there is no manifest in {one.state.planned.record.directory}", *lines]
        said = "".join(f"\n  {line}" for line in lines)
        return f"stage {one.state.name}: {story}{said}\n  all of it: {self._logs_of(one)}"

    def _logs_of(self, one: _Followed) -> str:
        return f"`ediffi logs {one.job_id} --store {self._ledger.store}`"

    def note_done(self, state: StageState) -> None:
        """The stage has its manifest: its job only has to leave Ray and MLflow."""
        one = self._followed.get(state.name)
        if one is not None and one.standing is not None:
            self._note_end(one, Standing(status="SUCCEEDED"))
            one.standing, one.leaves_by = None, time.monotonic() + END_S

    def _note_end(self, one: _Followed, found: Standing | None) -> None:
        """Keep how it ended: its cluster may be gone when somebody asks for it."""
        if found is None:
            return
        reason = "" if found.status == "SUCCEEDED" else how_it_ended(found)
        for job in self._jobs.of_stem(one.stem):
            if job.job_id == one.job_id:
                self._jobs.write(replace(job, state=_STATES[found.status], reason=reason))

    # -- stopping --------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the jobs to save and end, but for those that another living run has submitted."""
        for one in self._followed.values():
            if one.standing is None:
                continue
            if who := self.other_run(one.state):
                self._say(f"{one.state.name}: {who} goes on")
                continue
            try:
                self._client.stop(one.job_id)
            except (Unreachable, UserError) as error:
                self._say(
                    f"{one.state.name}: job {one.job_id} could not be asked to end: {error}. It "
                    "goes on, and the same command waits for it"
                )
                continue
            deadline_s = one.state.resources.stop_deadline_s
            one.leaves_by = time.monotonic() + deadline_s + END_S
            self._say(
                f"{one.state.name}: job {one.job_id} was asked to save ({deadline_s:g} s) and end"
            )

    def await_end(self) -> None:
        """Wait for the jobs that are about to end, as long as each may take.

        The cluster may be gone once this run is over, and what a job still had to tell with it.
        """
        for one in self._followed.values():
            while one.leaves_by and self._is_ending(one):
                time.sleep(LOOK_S)

    def _is_ending(self, one: _Followed) -> bool:
        """Whether a job is still to be waited for; says what became of it if not."""
        name, stage = one.job_id, one.state.name
        try:
            found = self._client.look(name)
        except (Unreachable, UserError) as error:
            self._say(f"{stage}: whether job {name} has ended cannot be seen: {error}")
            return False
        if found is None or not found.is_open:
            self._note_end(one, found)
            self._say(f"{stage}: job {name} has ended")
            return False
        if time.monotonic() < one.leaves_by:
            return True
        self._say(f"{stage}: job {name} has not ended in time; it is not waited for any longer")
        return False

    @cached_property
    def _client(self) -> JobClient:
        client = self._connect()
        if client is None:
            raise _TakesNoJobs
        return client


class _TakesNoJobs(Exception):
    """The cluster is one without a Jobs API."""


def _client_of_this_cluster() -> JobClient | None:
    from pipelines.jobs.job_client import (
        client_of_this_cluster,  # costs time that most runs need not
    )

    return client_of_this_cluster()
