"""What `ediffi cache` does: list, verify, repair, retry and clear what a store holds.

With `--json` each prints an object a line, a stage or a finding each.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping

from pipelines.caches.lookup import Found, RecipeFinder, recipe_of_run, stages_of
from pipelines.commands.plan import human_bytes
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.recipe import CacheRecipe
from pipelines.recipe_file import load_any_recipe
from pipelines.stage import Json, Totals
from pipelines.store.ledger import Ledger

NUM_SHOWN = 20  # units or samples a command tells people of; programs get all


def ls(options: Namespace) -> int:
    """List what the store holds: finished stages, and how far the others are."""
    ledger = Ledger.checked(options.store)
    for found in _stages(ledger, options.stage):
        row = _listed(found)
        if options.json:
            print(json.dumps(row))
            continue
        size = f"{row['samples']:>11,} samples  {human_bytes(row['bytes']):>10}"
        told = size if row["state"] == "complete" else row["state"]
        print(
            f"{row['stage']:<18} {row['fingerprint']}  {row['units']:>7,} units  {told}  "
            f"{row['created'][:19]}".rstrip()
        )
    return 0


def _stages(ledger: Ledger, text: str) -> list[Found]:
    """As `stages_of`; that the store is empty is told on stderr, and is no error."""
    found = stages_of(ledger, text)
    if not found:
        print(f"nothing under {ledger.store}", file=sys.stderr)
    return found


def _listed(found: Found) -> dict[str, Json]:
    row: dict[str, Json] = {"stage": found.name, "fingerprint": found.fingerprint}
    try:
        manifest = found.manifest()
    except ValueError as error:
        return {**row, **_EMPTY, "state": f"damaged: {error}"}
    if manifest is None:
        num_done = len(found.record.done_units())
        return {**row, **_EMPTY, "units": num_done, "state": "unfinished"}
    totals: Totals = manifest.totals
    return {
        **row,
        "state": "complete",
        "units": totals.num_units,
        "samples": totals.num_out,
        "bytes": totals.num_bytes,
        "rejects": dict(totals.rejects),
        "created": manifest.created,
        "run_id": manifest.run_id,
    }


_EMPTY: Mapping[str, Json] = {
    "units": 0,
    "samples": 0,
    "bytes": 0,
    "rejects": {},
    "created": "",
    "run_id": "",
}


def verify(options: Namespace) -> int:
    """Check every byte against its receipts; exit code 1 if something is missing or changed."""
    from pipelines.caches.verification import verify as check

    num_unsound = 0
    for found in _stages(Ledger.checked(options.store), options.stage):
        checked = check(found)
        num_unsound += not checked.is_sound
        if options.json:
            row = {
                "stage": found.name,
                "fingerprint": found.fingerprint,
                "units": checked.num_units,
                "files": checked.num_files,
                "bytes": checked.num_bytes,
                "sound": checked.is_sound,
                "problems": [vars(problem) for problem in checked.problems],
            }
            print(json.dumps(row))
            continue
        verdict = "ok " if checked.is_sound else "BAD"
        size = f"{checked.num_files:,} files  {human_bytes(checked.num_bytes)}"
        print(
            f"{verdict} {found.name:<18} {found.fingerprint}  {checked.num_units:,} units  {size}"
        )
        for problem in checked.problems:
            print(f"      {problem}")
    return 1 if num_unsound else 0


def repair(options: Namespace) -> int:
    """Make broken units again and say whether the bytes came out as before.

    Exit code 1 if a stage stays broken.
    """
    from pipelines.caches import repair as repairing

    ledger = Ledger.checked(options.store)
    broken = repairing.find_broken(_stages(ledger, options.stage))
    if options.dry_run:
        for one in broken:
            _tell_repair(options, one.found, {"to_do": one.units}, [str(p) for p in one.problems])
        return 1 if broken else 0
    repairing.drop_lost_manifests(broken)
    finder = RecipeFinder(ledger)
    num_left = 0
    for one in broken:
        problems = [str(problem) for problem in one.problems]
        try:
            mended = repairing.repair(ledger, one, finder)
        except (UserError, StageFailed) as error:
            num_left += 1
            _tell_repair(options, one.found, {"left": one.units}, [*problems, str(error)])
        else:
            units = {"equal": list(mended.equal), "different": list(mended.different)}
            _tell_repair(options, one.found, units, problems)
    if not broken:
        print("nothing is broken", file=sys.stderr)
    return 1 if num_left else 0


_REPAIRED = {
    "to_do": "would be made again",
    "left": "could not be made again",
    "equal": "made again, the bytes as before",
    "different": "made again, with other bytes: later stages redo the units that depend on them",
}


def _tell_repair(
    options: Namespace, found: Found, units: Mapping[str, list[str]], problems: list[str]
) -> None:
    if options.json:
        row = {"stage": found.name, "fingerprint": found.fingerprint, "problems": problems}
        print(json.dumps({**row, **units}))
        return
    print(found.address)
    for line in problems:
        print(f"  {line}")
    for state, names in units.items():
        if names:
            print(f"  {_shown(names)}: {_REPAIRED[state]}")


def retry(options: Namespace) -> int:
    """Ask again for samples that failed in passing, and do units that failed."""
    from pipelines.caches.repair import Retry, prepare_retry

    ledger = Ledger.checked(options.store)
    recipe = _recipe(options, ledger)
    retries = prepare_retry(ledger, options.stage, recipe, only_failed=options.only_failed)

    def tell(one: Retry) -> None:
        _tell_retry(options, one.found, [vars(change) for change in one.changes()])

    for one in retries:
        try:
            one.run()
        except StageFailed:
            tell(one)  # what did go well stays done
            raise
        tell(one)
    return 0


def _recipe(options: Namespace, ledger: Ledger) -> CacheRecipe:
    """The recipe that was named, else that of the newest run."""
    if options.recipe:
        return load_any_recipe(options.recipe, options.overrides)
    runs = ledger.runs()
    if not runs:
        raise UserError(
            f"no runs in {ledger.store}, so no recipe to go by: name one with --recipe FILE"
        )
    if options.overrides:
        raise UserError("--set changes a recipe that --recipe names; a run's is taken as it was")
    print(f"ediffi: by the recipe of run {runs[0]['run_id']}", file=sys.stderr)
    return recipe_of_run(runs[0])


def _tell_retry(options: Namespace, found: Found, changes: list[dict[str, Json]]) -> None:
    if options.json:
        row = {"stage": found.name, "fingerprint": found.fingerprint, "units": changes}
        print(json.dumps(row))
        return
    gained = sum(change["num_after"] - change["num_before"] for change in changes)
    print(f"{found.address}: {len(changes)} units asked again, {gained:+,} samples")
    for change in changes[:NUM_SHOWN]:
        before, after = _reasons(change["rejects_before"]), _reasons(change["rejects_after"])
        print(
            f"  {change['unit']}: {change['num_before']:,} -> {change['num_after']:,} samples; "
            f"{before} -> {after}"
        )
    if len(changes) > NUM_SHOWN:
        print(f"  ... and {len(changes) - NUM_SHOWN} more")
    if gained:
        print("  the next run redoes, in later stages, the units that depend on these")


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "no rejects"


def gc(options: Namespace) -> int:
    """Show, or with --delete remove, what no kept run or recipe needs.

    Exit code 1 if something could not be removed, or somebody works there.
    """
    from pipelines.caches import garbage

    ledger = Ledger.checked(options.store)
    recipes = [load_any_recipe(source) for source in options.keep]
    _ask_schedulers(ledger)
    kept = garbage.find_kept(ledger, recipes, garbage.parse_age(options.older_than))
    sweep = garbage.Sweep(ledger, kept)
    num_bytes = num_left = 0
    for one in list(garbage.find_garbage(ledger, kept)):
        left = sweep.remove(one) if options.delete else ""
        num_bytes += 0 if left else one.num_bytes
        num_left += bool(left)
        if options.json:
            row = {"path": str(one.place), "bytes": one.num_bytes, "why": one.why}
            print(json.dumps({**row, "deleted": options.delete and not left, "left": left}))
        else:
            stays = f"; stays: {left}" if left else ""
            print(f"{human_bytes(one.num_bytes):>10}  {one.place}  ({one.why}{stays})")
    if not options.json:
        done = "removed" if options.delete else "to remove; --delete does it"
        print(f"{human_bytes(num_bytes):>10}  {done}")
    return 1 if num_left else 0


def _ask_schedulers(ledger: Ledger) -> None:
    """Hear what became of jobs; of those whose scheduler does not answer, all is kept."""
    from pipelines.commands.schedulers import heard, is_open
    from pipelines.jobs.submitted import Jobs

    jobs = Jobs(ledger)
    for job in jobs.all():
        try:
            if is_open(job):
                heard(jobs, job)
        except (UserError, RetryableError) as error:
            print(
                f"ediffi: job {job.job_id} is taken for {job.state}, as last heard: {error}",
                file=sys.stderr,
            )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:NUM_SHOWN]) + ", ..." * (len(names) > NUM_SHOWN)
