"""What the runs of a store say of the stages they made, for predictions."""

from __future__ import annotations

from pipelines.caches.lookup import recipe_of_run
from pipelines.errors import UserError
from pipelines.recipe import CacheRecipe
from pipelines.stage import Json, Manifest
from pipelines.store.ledger import Ledger


class EarlierRuns:
    """Records of runs, read once when they are first asked for."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._records: dict[str, Json] | None = None
        self._recipes: dict[str, CacheRecipe | None] = {}

    def recipe(self, run_id: str) -> CacheRecipe | None:
        """The recipe of a run; None if its record is gone, or this version cannot read it."""
        if run_id not in self._recipes:
            record = self._all().get(run_id)
            try:
                self._recipes[run_id] = recipe_of_run(record) if record is not None else None
            except UserError:
                self._recipes[run_id] = None
        return self._recipes[run_id]

    def num_at_once(self, manifest: Manifest) -> float:
        """Units of the stage that its run did side by side, on average; 0 if that is not known."""
        recipe, record = self.recipe(manifest.run_id), self._all().get(manifest.run_id)
        if recipe is None or record is None:
            return 0.0
        for row in record["stages"]:
            is_same = (row["name"], row["fingerprint"]) == (manifest.stage, manifest.fingerprint)
            if is_same and row["seconds"] and row.get("worker_seconds"):
                num_workers = recipe.resources_of(manifest.stage).num_workers
                return max(float(row["worker_seconds"]) / row["seconds"] / num_workers, 1.0)
        return 0.0

    def _all(self) -> dict[str, Json]:
        if self._records is None:
            self._records = {record["run_id"]: record for record in self.ledger.runs()}
        return self._records
