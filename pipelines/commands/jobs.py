"""`ediffi logs`, `cancel`, `list` and `status`: what became of jobs and runs.

The store is asked first and always answers; then the scheduler of the job.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, field

from pipelines.commands import schedulers
from pipelines.errors import RetryableError, UserError
from pipelines.jobs.submitted import Job, Jobs
from pipelines.stage import Json
from pipelines.store.ledger import Ledger
from pipelines.store.processes import Owner
from pipelines.store.stage_record import StageRecord

POLL_S = 1.0


@dataclass
class Found:
    """What a name stands for: a job with its runs, or a run with its job, if it has one."""

    job: Job | None
    runs: list[Json] = field(default_factory=list)  # newest first


def status(options: Namespace) -> None:
    """Print a job or run with its stages: the store's knowledge, then the scheduler's."""
    ledger = Ledger.checked(options.store)
    found = find(ledger, options.name)
    problem = None
    if found.job is not None:
        try:
            found.job = schedulers.heard(Jobs(ledger), found.job)
        except (UserError, RetryableError) as error:
            problem = error
    if options.json:
        job = vars(found.job) if found.job is not None else None
        newest = _seen(found.runs[0], ledger) if found.runs else {}
        print(json.dumps(newest | {"job": job} if options.name and job else newest))
    else:
        _print_status(found, ledger, is_heard=problem is None)
    if problem is not None:
        raise problem


def _print_status(found: Found, ledger: Ledger, *, is_heard: bool) -> None:
    if (job := found.job) is not None:
        state = job.state if is_heard else f"{job.state} when last heard of"
        print(f"{job.job_id}  {state}  submitted {job.submitted} to {job.profile_name}")
        if job.reason:
            print(f"  {job.reason}")
        if not found.runs:
            print("  no run of it has begun")
    if found.runs:
        record = _seen(found.runs[0], ledger)
        print(f"{record['run_id']}  {record['state']}  started {record['started']}")
        for name, fingerprint in record.get("planned", {}).items():
            print(f"{name:<18} {_progress(ledger.stage(name, fingerprint))}")
        if record.get("error"):
            print(record["error"])


def _seen(record: Json, ledger: Ledger) -> Json:
    """A run's record, told apart from one whose driver is gone."""
    from pipelines.run_record import RunRecord, is_dead

    return record | {"state": "killed"} if is_dead(ledger, RunRecord.read(record)) else record


def _progress(stage: StageRecord) -> str:
    """How far a stage is, by the store alone: nothing is planned anew."""
    if stage.is_complete:
        return "complete"
    num_done = len(stage.done_units())
    return f"{num_done} units are done" if num_done else "not begun, or none of its units is done"


def list_all(options: Namespace) -> None:
    """What the store knows, newest first; then the jobs whose schedulers must be asked."""
    ledger = Ledger.checked(options.store)
    jobs = Jobs(ledger)
    found = _jobs_in(jobs)
    over = [job for job in found if schedulers.is_over(job)]
    rows = [_row_of_job(job, job.state) for job in over]
    rows += [_row_of_run(record, ledger) for record in ledger.runs()]
    for row in sorted(rows, key=lambda row: str(row["began"]), reverse=True):
        _print_row(row, options)
    problems: dict[str, UserError | RetryableError] = {}  # by place: nobody waits for one twice
    for job in found:
        if job in over:
            continue
        state = f"{job.state}?"
        if (place := schedulers.place_of(job)) not in problems:
            try:
                state = schedulers.heard(jobs, job).state
            except RetryableError as error:
                problems[place] = error
            except UserError as error:
                problems[job.job_id] = error
        _print_row(_row_of_job(job, state), options)
    if problems:  # what the store knows has been told
        first = next(iter(problems.values()))
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise type(first)(f"{first}{more}")


def _row_of_job(job: Job, state: str) -> Json:
    return {
        "kind": "job",
        "id": job.job_id,
        "state": state,
        "began": job.submitted,
        "recipe": job.recipe,
        "where": f"{job.profile_name} ({job.kind})",
    }


def _row_of_run(record: Json, ledger: Ledger) -> Json:
    return {
        "kind": "run",
        "id": record["run_id"],
        "state": _seen(record, ledger)["state"],
        "began": record["started"],
        "recipe": record["recipe"],
        "where": record.get("job") or record["host"],
    }


def _print_row(row: Json, options: Namespace) -> None:
    line = "{id:<46} {kind:<4} {state:<10} {began:<26} {where}".format(**row)
    print(json.dumps(row) if options.json else line, flush=True)


def _jobs_in(jobs: Jobs, name: str = "") -> list[Job]:
    """Every job, newest first; of those whose records cannot be read stderr tells.

    Raises:
        UserError: that record is the one of the job with this name.
    """
    found, unreadable = jobs.all_and_unreadable()
    for job_id, error in unreadable.items():
        if name and job_id.startswith(name) and not any(one.job_id == name for one in found):
            raise error
        print(f"ediffi: left out: {error}", file=sys.stderr)
    return found


def logs(options: Namespace) -> None:
    """What the driver of a job said, or what units of a run said."""
    ledger = Ledger.checked(options.store)
    found = find(ledger, options.name)
    if options.unit or found.job is None:
        _unit_logs(ledger, found, options)
        return
    for text in schedulers.words_of(found.job, follow=options.follow):
        sys.stdout.write(text)
        sys.stdout.flush()


def _unit_logs(ledger: Ledger, found: Found, options: Namespace) -> None:
    """The logs that units keep in the store; with --follow, as they grow."""
    from pipelines.worker.unit_log import paths

    if not found.runs:
        raise UserError(f"no run of {options.name} has begun: its units have said nothing yet")
    run_id = found.runs[0]["run_id"]
    shown: dict[str, int] = {}
    while True:
        # asked first: what was said before the end is then in what is read after it
        is_over = _seen(ledger.record_of(run_id), ledger)["state"] != "running"
        chosen = [one for one in paths(ledger, run_id) if _is_chosen(one.stage, one.unit, options)]
        for one in chosen:
            start = shown.setdefault(str(one.place), 0)
            with one.place.open("rb") as stream:
                stream.seek(start)
                new = stream.read()
            if start == 0 and new:
                rank = f", rank {one.rank}" if one.rank else ""
                print(f"== {one.stage}/{one.unit}, attempt {one.attempt}{rank}")
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()
            shown[str(one.place)] = start + len(new)
        if is_over or not options.follow:
            break
        time.sleep(POLL_S)
    if not shown:
        what = options.unit or "any unit"
        raise UserError(f"run {run_id} has no log of {what}; `ediffi status {run_id}` lists stages")


def _is_chosen(stage: str, unit: str, options: Namespace) -> bool:
    name = f"{stage}/{unit}"
    return not options.unit or name == options.unit or name.startswith(options.unit + "/")


def cancel(options: Namespace) -> None:
    """Ask a job or run to save and end; the same submission or command goes on from there."""
    from pipelines.run_record import RunRecord

    ledger = Ledger.checked(options.store)
    found, jobs = find(ledger, options.name), Jobs(ledger)
    if found.job is not None:
        job = schedulers.heard(jobs, found.job)
        if not schedulers.is_open(job):
            raise UserError(f"job {job.job_id} is over ({job.state}): nothing to cancel")
        schedulers.cancel(jobs, job)
        print(f"job {job.job_id} was asked to save and end", file=sys.stderr)
        return
    record = _seen(found.runs[0], ledger)
    run_id = record["run_id"]
    if record["state"] != "running":
        raise UserError(f"run {run_id} is over ({record['state']}): nothing to cancel")
    _tell_driver(RunRecord.read(record).owner)
    print(f"run {run_id} was asked to save and end", file=sys.stderr)


def _tell_driver(owner: Owner) -> None:
    """SIGTERM to a run's driver, if that very process can be seen from here."""
    if not owner.is_here:
        raise UserError(
            f"run {owner.run_id} has its driver on {owner.host} as process {owner.pid}, and no "
            "scheduler to ask: send it SIGTERM there"
        )
    try:
        os.kill(owner.pid, signal.SIGTERM)
    except OSError as error:
        problem = f"run {owner.run_id}: its driver, process {owner.pid}, cannot be told: {error}"
        raise UserError(problem) from error


def find(ledger: Ledger, name: str) -> Found:
    """The job or run that a name, or the beginning of one, stands for; "" is the newest run.

    Raises:
        UserError: none or several begin so; some that do exist are named.
    """
    runs, jobs = ledger.runs(), _jobs_in(Jobs(ledger), name)
    if not name:
        if runs:
            return Found(_job_of(runs[0], jobs), [runs[0]])
        if jobs:
            return Found(jobs[0])
        raise UserError(f"no runs in {ledger.store}: start one with `ediffi run RECIPE`")
    found_jobs = [job for job in jobs if job.job_id.startswith(name)]
    found_runs = [run for run in runs if run["run_id"].startswith(name)]
    exact = [job for job in found_jobs if job.job_id == name]
    if exact or (len(found_jobs) == 1 and not found_runs):
        job = (exact or found_jobs)[0]
        return Found(job, [run for run in runs if run.get("job") == job.job_id])
    if len(found_runs) == 1 and not found_jobs:
        return Found(_job_of(found_runs[0], jobs), found_runs)
    known = [*(job.job_id for job in jobs[:3]), *(run["run_id"] for run in runs[:5])]
    number = len(found_jobs) + len(found_runs)
    problem = f"{number} jobs and runs" if number else "no job and no run"
    raise UserError(
        f"{problem} in {ledger.store} named {name!r}; newest: {', '.join(known) or 'none'}"
    )


def _job_of(run: Json, jobs: list[Job]) -> Job | None:
    return next((job for job in jobs if job.job_id == run.get("job")), None)
