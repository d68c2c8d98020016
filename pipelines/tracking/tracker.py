"""MLflow: parent run = one `ediffi run`, child = stage, grandchild = one unit of a fan-out.

All calls are made by one background thread, in order: a synchronous `log_metric` costs tens of
milliseconds and the first touch of a fresh database takes seconds. A tracking server that fails
does not fail the run, since the ledger holds everything; the failure is said aloud at the end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pipelines.jobs.submitted import parent_tag
from pipelines.masking import masker
from pipelines.planning import PlannedStage
from pipelines.stage import Json, Manifest
from pipelines.store.fingerprint import flatten
from pipelines.store.location import Location, is_remote, local_copy
from pipelines.tracking.curves import draw_curves
from pipelines.tracking.ended_runs import close_ended
from pipelines.tracking.place import default_uri, local_side, make_database

if TYPE_CHECKING:
    from mlflow import MlflowClient

NICENESS = 10  # of the thread; MLflow's start takes 3 s of a core just when Ray's processes start
MAX_PARAM_CHARACTERS = 500
MAX_PARAMS_PER_CALL = 100  # a limit of MLflow's API
MAX_METRICS_PER_CALL = 1000
FIRST_TOUCH_PAUSES_S = (0.5, 1.0, 2.0, 4.0)


class Tracker:
    """Mirrors a run into MLflow without ever holding it up.

    Args:
        uri: tracking URI; `store` supplies the place for artifacts if it is a database there.
        run_id: our own id of the run, kept as tag `ediffi.run_id` on all its MLflow runs.
    """

    def __init__(self, uri: str, *, store: Location, recipe_name: str, run_id: str) -> None:
        self._uri, self._store = uri, store
        self._recipe_name, self._run_id = recipe_name, run_id
        self._mask = masker()
        self._runs: dict[str, str] = {}  # "" for the parent, "stage" or "stage:unit" -> MLflow id
        self._experiment_id = ""
        self._calls: queue.Queue[Callable[[MlflowClient], None] | None] = queue.Queue()
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    # -- what the runner says ------------------------------------------------------------------

    def run_started(self, resolved: Json) -> None:
        """Open the parent run with the resolved recipe; close what ended drivers left open."""

        def call(client: MlflowClient) -> None:
            parent = self._create(client, "", self._recipe_name, parent_tag())
            self._log_params(client, parent, resolved)
            client.log_dict(parent, self._without_secrets(resolved), "recipe.json")

        self.close_ended()  # first, and apart: if it fails the run has its parent all the same
        self._calls.put(call)

    def close_ended(self) -> None:
        """Close the runs that are open although their driver is over, by our store's records."""

        def call(client: MlflowClient) -> None:
            close_ended(client, self._store, self._run_id)

        self._calls.put(call)

    def stage_cached(self, planned: PlannedStage, manifest: Manifest) -> None:
        """Record a hit as a finished child that points to the run that did the work."""

        def call(client: MlflowClient) -> None:
            origin = self._find_origin(client, planned.fingerprint)
            tags = {"ediffi.state": "cached", "cached_from": origin or manifest.run_id}
            run = self._create(client, planned.name, planned.name, self._tags(planned) | tags)
            self._log_results(client, run, manifest)
            client.set_terminated(run, "FINISHED")

        self._calls.put(call)

    def stage_started(self, planned: PlannedStage, inputs: Mapping[str, Manifest]) -> None:
        """Open a stage's child run, with its settings and the data sets it reads."""

        def call(client: MlflowClient) -> None:
            tags = {"ediffi.state": "ran", "ediffi.reason": "; ".join(planned.reasons)[:5000]}
            run = self._create(client, planned.name, planned.name, self._tags(planned) | tags)
            self._log_params(client, run, planned.stage.identity())
            self._log_inputs(client, run, inputs)

        self._calls.put(call)

    def progress(self, stage: str, unit: str, rows: Sequence[Mapping[str, float]]) -> None:
        """Log rows of metrics, each by the images seen when it was made; unit "": the stage's."""

        def call(client: MlflowClient) -> None:
            run = self._runs[stage]
            if unit:
                run = self._runs.get(f"{stage}:{unit}") or self._create(
                    client, f"{stage}:{unit}", unit, {"ediffi.unit": unit}, parent=run
                )
            self._log_rows(client, run, rows)

        self._calls.put(call)

    def grids(self, stage: str, unit: str, pictures: Mapping[str, Location]) -> None:
        """Keep pictures that a unit drew while it trained, as `grids/<unit>/` of its stage.

        Args:
            pictures: by the name that each shall have there.
        """

        def call(client: MlflowClient) -> None:
            for name, picture in pictures.items():
                folder = f"grids/{unit}/{name}".rpartition("/")[0]
                with local_copy(picture) as path:
                    client.log_artifact(self._runs[stage], str(path), folder)

        self._calls.put(call)

    def stage_finished(
        self, manifest: Manifest, curves: Mapping[str, Sequence[Mapping[str, float]]]
    ) -> None:
        """Close a stage with its counts, metrics, pictures and training curves."""

        def call(client: MlflowClient) -> None:
            run = self._runs[manifest.stage]
            self._log_results(client, run, manifest)
            for name, picture in draw_curves(curves):
                client.log_image(run, picture, artifact_file=f"curves/{name}.png")
            self._close_stage(client, manifest.stage, "FINISHED")

        self._calls.put(call)

    def stage_failed(self, stage: str, message: str) -> None:
        def call(client: MlflowClient) -> None:
            if stage in self._runs:
                client.set_tag(self._runs[stage], "ediffi.error", self._mask(message)[:5000])
                self._close_stage(client, stage, "FAILED")

        self._calls.put(call)

    def figures(self, measure: Callable[[], Mapping[str, float]]) -> None:
        """Log metrics of the whole run; `measure` is called by the thread."""

        def call(client: MlflowClient) -> None:
            self._log_rows(client, self._runs[""], [measure()])

        self._calls.put(call)

    def run_finished(self, status: str, deadline_s: float = 60.0) -> None:
        """Close the parent and all it left open as `FINISHED`, `FAILED` or `KILLED`.

        Waits until the thread has done everything, at most `deadline_s`.
        """

        def call(client: MlflowClient) -> None:
            for run in self._runs.values():  # of stages too: a stopped run leaves them open
                if client.get_run(run).info.status == "RUNNING":
                    client.set_terminated(run, status)

        self._calls.put(call)
        self._calls.put(None)
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self.errors.append(f"still {self._calls.qsize()} calls behind after {deadline_s:.0f} s")

    @property
    def parent_run_id(self) -> str:
        """MLflow's id of the parent run; empty until the thread has created it."""
        return self._runs.get("", "")

    # -- what the thread does --------------------------------------------------------------------

    def _work(self) -> None:
        _give_way()
        client: MlflowClient | None = None
        while (call := self._calls.get()) is not None:
            try:
                if client is None:
                    client = self._connect()
                call(client)
            except Exception as error:  # reported at the end; never fails the run
                self.errors.append(f"{type(error).__name__}: {self._mask(str(error))}")

    def _connect(self) -> MlflowClient:
        """Open the database or server; of several that make its tables at once, one succeeds."""
        is_database = "://" in self._uri and not self._uri.startswith("http")
        for pause_s in FIRST_TOUCH_PAUSES_S if is_database else ():
            try:
                return self._open()
            except Exception:  # of alembic, of sqlalchemy, of the database's own library
                time.sleep(pause_s)
        return self._open()

    def _open(self) -> MlflowClient:
        from mlflow import MlflowClient

        # The first touch migrates the database and tells every step of it. To take stderr away
        # meanwhile would take it from the other threads, too.
        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if self._uri == default_uri(self._store):
            make_database(self._store, self._run_id, lambda uri: MlflowClient(tracking_uri=uri))
        client = MlflowClient(tracking_uri=self._uri)
        experiment = client.get_experiment_by_name(self._recipe_name)
        if experiment is None:
            place = None
            if self._uri == default_uri(self._store):
                side = local_side(self._store)
                place = (side / "mlflow-artifacts" / self._recipe_name).as_uri()
            try:
                self._experiment_id = client.create_experiment(self._recipe_name, place)
                return client
            except Exception:
                experiment = client.get_experiment_by_name(self._recipe_name)
                if experiment is None:  # nobody else has just made it: it is a real failure
                    raise
        self._experiment_id = experiment.experiment_id
        return client

    def _create(
        self,
        client: MlflowClient,
        key: str,
        name: str,
        tags: Mapping[str, str],
        parent: str | None = None,
    ) -> str:
        tags = {word: self._mask(value) for word, value in tags.items()}
        tags["ediffi.run_id"] = self._run_id
        if key:
            tags["mlflow.parentRunId"] = parent or self._runs[""]
        run = client.create_run(self._experiment_id, run_name=name, tags=tags)
        self._runs[key] = run.info.run_id
        return run.info.run_id

    def _tags(self, planned: PlannedStage) -> dict[str, str]:
        return {"ediffi.stage": planned.name, "ediffi.fingerprint": planned.fingerprint}

    def _find_origin(self, client: MlflowClient, fingerprint: str) -> str | None:
        query = f"tags.`ediffi.fingerprint` = '{fingerprint}' and tags.`ediffi.state` = 'ran'"
        runs = client.search_runs([self._experiment_id], query, max_results=1)
        return runs[0].info.run_id if runs else None

    def _close_stage(self, client: MlflowClient, stage: str, status: str) -> None:
        for key, run in self._runs.items():
            if key == stage or key.startswith(f"{stage}:"):
                client.set_terminated(run, status)

    def _without_secrets(self, value: Json) -> Json:
        """The same document, its texts as they may be shown."""
        if isinstance(value, dict):
            return {name: self._without_secrets(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._without_secrets(one) for one in value]
        return self._mask(value) if isinstance(value, str) else value

    def _log_params(self, client: MlflowClient, run: str, values: Json) -> None:
        from mlflow.entities import Param

        params = [
            Param(name, self._mask(str(value))[:MAX_PARAM_CHARACTERS])
            for name, value in flatten(values)
        ]
        for start in range(0, len(params), MAX_PARAMS_PER_CALL):
            client.log_batch(run, params=params[start : start + MAX_PARAMS_PER_CALL])

    def _log_inputs(self, client: MlflowClient, run: str, inputs: Mapping[str, Manifest]) -> None:
        from mlflow.entities import Dataset, DatasetInput

        datasets = [
            DatasetInput(
                Dataset(
                    name=name,
                    digest=manifest.fingerprint,
                    source_type="s3" if is_remote(manifest.directory) else "local",
                    source=str(manifest.directory),
                )
            )
            for name, manifest in inputs.items()
        ]
        if datasets:
            client.log_inputs(run, datasets=datasets)

    def _log_rows(
        self, client: MlflowClient, run: str, rows: Sequence[Mapping[str, float]]
    ) -> None:
        from mlflow.entities import Metric

        stamp = int(time.time() * 1000)
        metrics = [
            Metric(key, float(value), stamp, int(row.get("images", 0)))
            for row in rows
            for key, value in row.items()
            if key != "images"
        ]
        for start in range(0, len(metrics), MAX_METRICS_PER_CALL):
            client.log_batch(run, metrics=metrics[start : start + MAX_METRICS_PER_CALL])

    def _log_results(self, client: MlflowClient, run: str, manifest: Manifest) -> None:
        """Counts and the metrics and artifacts that units name in their facts."""
        totals = manifest.totals
        row: dict[str, float] = {
            "units": totals.num_units,
            "samples_in": totals.num_in,
            "samples_out": totals.num_out,
            "bytes": totals.num_bytes,
            "seconds": manifest.seconds,
            **{f"rejects/{reason}": count for reason, count in totals.rejects.items()},
            **{f"flagged/{reason}": count for reason, count in totals.flagged.items()},
            **manifest.timings,
        }
        for receipt in manifest.receipts:
            prefix = f"{receipt.unit}/" if totals.num_units > 1 else ""
            metrics = receipt.facts.get("metrics", {})
            if metrics:
                row |= {f"{prefix}{name}": value for name, value in metrics.items()}
                # on the parent too: that is the row people compare
                on_parent = {f"{manifest.stage}/{prefix}{name}": metrics[name] for name in metrics}
                self._log_rows(client, self._runs[""], [on_parent])
            for name in receipt.facts.get("artifacts", ()):
                file = next(file for file in receipt.files if file.path == name)
                client.log_artifact(run, str(manifest.local_path(file)))
        self._log_rows(client, run, [row])


def _give_way() -> None:
    """Let all others go first on a busy machine; only Linux has threads of their own priority."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
