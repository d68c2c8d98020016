"""`ediffi submit`: a recipe on its way to a cluster."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.commands.options import STORE
from pipelines.commands.schedulers import heard, is_open, scheduler_errors
from pipelines.commands.store_outages import from_store
from pipelines.errors import UserError
from pipelines.jobs.package_pin import digest, lock_of_checkout
from pipelines.jobs.submitted import (
    JOB_VARIABLE,
    Job,
    Jobs,
    as_yaml,
    number_of,
    stem_of,
    travelling,
)
from pipelines.recipe_file import load_any_recipe
from pipelines.store.ledger import Ledger

if TYPE_CHECKING:
    from cluster.job import JobSpec
    from cluster.profile import Profile
    from pipelines.recipe import CacheRecipe


def submit(options: Namespace) -> None:
    """Send a recipe to a cluster; if it is on its way there already, say so."""
    profile = _profile(options.cluster)
    options.store = _store(options.store, profile)
    from_store(lambda chosen: _submit(chosen, profile))(options)


def _submit(options: Namespace, profile: Profile) -> None:
    store = options.store
    recipe = load_any_recipe(options.recipe, [*placement(profile), *options.overrides])
    _check_stages(recipe, options.stages)
    document = travelling(recipe.model_dump(mode="json", by_alias=True), profile.shares)
    lock = lock_of_checkout() if profile.pin == "lock" else ""
    stem = stem_of(recipe.name, (document, options.stages, store, profile.to_mapping()))
    if options.dry_run:  # asks nobody, so that it also works far from store and cluster
        spec = _specification(f"{stem}-1", options.stages, store, profile, lock)
        sent = _rendered(spec)
        print(json.dumps({"job_id": spec.name, "sent": sent}) if options.json else sent.rstrip())
        return
    jobs = Jobs(Ledger.open(store))
    before = next(iter(jobs.of_stem(stem)), None)
    if before is not None:
        before = heard(jobs, before)
        if is_open(before):
            where = "is there already" if before.native_id else "is being submitted just now"
            _tell(before, options, f"{where}: nothing was sent")
            return
    job_id = f"{stem}-{number_of(before.job_id) + 1 if before is not None else 1}"
    spec = _specification(job_id, options.stages, store, profile, lock)
    _rendered(spec)  # refuses what could not be sent before anything is written
    job = Job(
        job_id=job_id,
        recipe=recipe.name,
        profile=profile.to_mapping(),
        profile_name=profile.name,
        kind=profile.kind,
        store=store,
        stages=tuple(options.stages),
        command=spec.command,
        environment=_environment(profile, lock),
    )
    if not job.environment and profile.pin != "none":
        print(
            f"ediffi: nothing says which packages {profile.name} must have: this installation has "
            "no requirements.lock beside it",
            file=sys.stderr,
        )
    _send(jobs, job, spec, as_yaml(document), lock, options)


def _send(jobs: Jobs, job: Job, spec: JobSpec, recipe: str, lock: str, options: Namespace) -> None:
    """Keep what the job reads, send it, keep what its scheduler calls it."""
    from cluster import launch
    from cluster.job_state import AlreadyThereError

    if not jobs.keep(job, recipe, lock):
        _tell(job, options, "was submitted by somebody else at the same time: nothing was sent")
        return
    try:
        with scheduler_errors():
            native_id = launch.submit(spec)
    except AlreadyThereError as error:
        raise UserError(f"{error}; it is of another store, or was submitted by hand") from error
    except BaseException:
        _forget_unless_taken(jobs, job, spec)
        raise
    job = replace(job, native_id=native_id)
    jobs.write(job)
    _tell(job, options, f"was submitted to {job.profile_name}")


def _forget_unless_taken(jobs: Jobs, job: Job, spec: JobSpec) -> None:
    """Keep a job that was sent although its answer did not come; it reads its recipe from here."""
    from cluster import launch
    from cluster.job_state import SchedulerError

    native_id = ""
    with suppress(SchedulerError):
        native_id = launch.find(spec.profile, job.job_id, job.host)
    if native_id:
        jobs.write(replace(job, native_id=native_id))
    else:
        jobs.forget(job.job_id)


def _tell(job: Job, options: Namespace, what: str) -> None:
    if options.json:
        print(json.dumps(vars(job)))
        return
    print(f"ediffi: job {job.job_id} {what}; follow it with", file=sys.stderr)
    print(f"  ediffi logs {job.job_id} --follow --store {job.store}", file=sys.stderr)
    print(job.job_id)


def _profile(name: str) -> Profile:
    from cluster.profile import load_profile

    try:
        return load_profile(name)
    except ValueError as error:
        raise UserError(f"--cluster: {error}") from error


def _store(named: str, profile: Profile) -> str:
    """The job's store: the one that was named, else the profile's.

    Raises:
        UserError: the place does not share it.
    """
    chosen = profile.store if profile.store and named == STORE else named
    place = Ledger.at(chosen).store
    if "://" not in chosen and not profile.shares(str(place)):
        shared = ", ".join(profile.shared_paths) or "none"
        raise UserError(
            f"--store: {place} is on this machine, which profile {profile.name} does not share "
            f"(shared_paths: {shared}); name a URL such as s3://bucket/store, or a directory that "
            "both have and list it in the profile's shared_paths"
        )
    return chosen if "://" in chosen else str(place)


def _check_stages(recipe: CacheRecipe, chosen: list[str]) -> None:
    """Raise UserError for a stage that this recipe has not; no class of a custom one is needed."""
    from pipelines.stage_graph import build_stages

    ours = build_stages(recipe.model_copy(update={"custom_stages": {}})) if chosen else []
    names = [*(stage.name for stage in ours), *recipe.custom_stages]
    for choice in chosen:
        if not any(choice in (name, name.split("/")[0]) for name in names):
            raise UserError(f"no stage {choice!r} in this recipe; it has: {', '.join(names)}")


def placement(profile: Profile) -> list[str]:
    """The profile's node groups as changes of a recipe; what the user sets comes after them."""
    return [f"resources.{stage}.node_group={group}" for stage, group in profile.stages.items()]


def _specification(
    job_id: str, stages: list[str], store: str, profile: Profile, lock: str
) -> JobSpec:
    """The driver's command: a plain `ediffi run` of the recipe in the store."""
    from cluster.job import JobSpec

    program = profile.program
    variables = {JOB_VARIABLE: job_id}
    if profile.kind == "local" and program == ("ediffi",):
        # this very program, wherever it was installed
        program = (sys.executable, "-m", "pipelines.cli")
    folder = Jobs(Ledger.at(store)).folder(job_id)
    pin = ("--expect-environment", digest(lock)) if lock else ()
    # Ray tells the values of a job's variables to whoever asks, so its nodes must hold them
    needed = profile.passed.values() if profile.kind == "ray" else ()
    words = (*pin, *(word for name in needed for word in ("--require-environment", name)))
    command = (*program, "run", str(folder / "recipe.yaml"), *stages, "--store", store, *words)
    try:
        return JobSpec(name=job_id, command=command, profile=profile, environment=variables)
    except ValueError as error:
        raise UserError(str(error)) from error


def _environment(profile: Profile, lock: str) -> str:
    if profile.pin == "image":
        return profile.image
    return digest(lock) if lock else ""


def _rendered(spec: JobSpec) -> str:
    from cluster import launch

    try:
        return launch.render(spec)
    except ValueError as error:
        raise UserError(str(error)) from error
