"""Jobs in a store: what those need that may still run, and which of the others can go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime

from pipelines.caches.lookup import planned_by
from pipelines.errors import UserError
from pipelines.jobs.submitted import Job, Jobs, number_of
from pipelines.planning import plan
from pipelines.recipe_file import load_any_recipe
from pipelines.stage import Json
from pipelines.store.ledger import Ledger
from pipelines.store.location import Location, local_copy, names_in


@dataclass(frozen=True)
class JobsSince:
    """The jobs of a store, as seen at one moment.

    Attributes:
        since: what was submitted after that is recent.
    """

    ledger: Ledger
    since: datetime
    jobs: tuple[Job, ...]
    newest_runs: Mapping[str, Json]  # job id -> record

    @classmethod
    def of(cls, ledger: Ledger, since: datetime) -> JobsSince:
        """Raises UserError if a record cannot be read: the job may be one that waits."""
        jobs, unreadable = Jobs(ledger).all_and_unreadable()
        for error in unreadable.values():
            raise error
        runs = {record.get("job", ""): record for record in reversed(ledger.runs())}
        return cls(ledger, since, tuple(jobs), runs)

    def needed(self) -> Iterator[Mapping[str, str]]:
        """Fingerprints by stage, of each job that waits or runs.

        Raises:
            UserError: a recipe cannot be planned here, so that nobody can say what it needs.
        """
        for job in self.jobs:
            place = self._folder(job.job_id) / "recipe.yaml"
            if not self._is_open(job):
                continue
            if job.job_id in self.newest_runs:
                yield planned_by(self.newest_runs[job.job_id])
            elif place.exists():
                yield self._planned(job, place)

    def _planned(self, job: Job, place: Location) -> Mapping[str, str]:
        try:
            with local_copy(place) as path:
                recipe = load_any_recipe(str(path))
            return {one.name: one.fingerprint for one in plan(recipe, self.ledger)}
        except UserError as error:
            raise UserError(
                f"job {job.job_id} was {job.state} when last heard of, and what its recipe needs "
                f"cannot be told here: {error}; `ediffi status {job.job_id}` asks its scheduler "
                "again, `ediffi cancel` ends it"
            ) from error

    def ended(self, recent: AbstractSet[str]) -> Iterator[tuple[Location, str]]:
        """Folders that can go, and why; the newest of a recipe stays: numbers go on from its own.

        Args:
            recent: ids of runs whose jobs stay.
        """
        for name in sorted(names_in(self.ledger.store / "jobs")):
            if not (self._folder(name) / "job.json").exists():
                yield self._folder(name), "a submission that never came to be"
        highest: dict[str, int] = {}
        for job in self.jobs:
            stem, number = _stem(job), number_of(job.job_id)
            highest[stem] = max(highest.get(stem, 0), number)
        for job in self.jobs:
            run = self.newest_runs.get(job.job_id)
            is_needed = self._is_recent(job) or (run is not None and run["run_id"] in recent)
            is_highest = number_of(job.job_id) == highest[_stem(job)]
            if not (is_needed or is_highest or self._is_open(job)):
                yield self._folder(job.job_id), "a job of long ago"

    def _is_open(self, job: Job) -> bool:
        """Whether it waits or runs, as last heard; its scheduler may start it again.

        Of one that was cut off while it was sent nobody will ever hear.
        """
        run = self.newest_runs.get(job.job_id)
        if job.state not in ("waiting", "running"):
            return False
        if run is not None and run["state"] in ("finished", "failed"):
            return False
        return bool(job.native_id) or run is not None or self._is_recent(job)

    def _is_recent(self, job: Job) -> bool:
        return datetime.fromisoformat(job.submitted) >= self.since

    def _folder(self, job_id: str) -> Location:
        return Jobs(self.ledger).folder(job_id)


def _stem(job: Job) -> str:
    return job.job_id.rpartition("-")[0]
