"""MLflow: parent run = one `ediffi run`, child = stage, grandchild = one unit of a fan-out.

All calls are made by one background thread, in order: a synchronous `log_metric` costs tens of
milliseconds and the first touch of a fresh database takes seconds. A tracking server that fails
does not fail the run, since the ledger holds everything; the failure is said aloud at the end.
"""

from __future__ import annotations

import contextlib
import io
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.fingerprint import flatten
from pipelines.location import Location, is_remote, local_copy
from pipelines.planning import PlannedStage
from pipelines.stage import Json, Manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_PARAM_CHARACTERS = 500
MAX_PARAMS_PER_CALL = 100  # a limit of MLflow's API
MAX_METRICS_PER_CALL = 1000


def default_uri(store: Location) -> str:
    """The tracking database that lies in the store itself; beside an object store, here."""
    return f"sqlite:///{_local_side(store) / 'mlflow.db'}"


def _local_side(store: Location) -> Path:
    return store if isinstance(store, Path) else Path("ediffi-store").absolute()


def without_password(uri: str) -> str:
    """The address as it may be shown or logged."""
    return re.sub(r"(//[^/:@]*):[^@/]*@", r"\1:***@", uri)


class Tracker:
    """Mirrors a run into MLflow without ever holding it up.

    Args:
        uri: tracking URI; `store` supplies the place for artifacts if it is a database there.
        run_id: our own id of the run, kept as tag `ediffi.run_id` on all its MLflow runs.
    """

    def __init__(self, uri: str, *, store: Location, recipe_name: str, run_id: str) -> None:
        self._uri, self._store = uri, store
        self._recipe_name, self._run_id = recipe_name, run_id
        self._runs: dict[str, str] = {}  # "" for the parent, "stage" or "stage:unit" -> MLflow id
        self._experiment_id = ""
        self._calls: queue.Queue[Callable[[MlflowClient], None] | None] = queue.Queue()
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    # -- what the runner says ------------------------------------------------------------------

    def run_started(self, resolved: Json, killed_run_ids: Sequence[str]) -> None:
        """Open the parent run with the resolved recipe; close what killed drivers left open."""

        def call(client: MlflowClient) -> None:
            for run_id in killed_run_ids:
                self._close_killed(client, run_id)
            parent = self._create(client, "", self._recipe_name, {})
            self._log_params(client, parent, resolved)
            client.log_dict(parent, resolved, "recipe.json")

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
                client.set_tag(self._runs[stage], "ediffi.error", message[:5000])
                self._close_stage(client, stage, "FAILED")

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
        client: MlflowClient | None = None
        while (call := self._calls.get()) is not None:
            try:
                if client is None:
                    client = self._connect()
                call(client)
            except Exception as error:  # reported at the end; never fails the run
                self.errors.append(f"{type(error).__name__}: {without_password(str(error))}")

    def _connect(self) -> MlflowClient:
        if self._uri == default_uri(self._store):
            _local_side(self._store).mkdir(parents=True, exist_ok=True)
        # The first touch migrates the database and tells every step of it.
        with contextlib.redirect_stderr(io.StringIO()):
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=self._uri)
            experiment = client.get_experiment_by_name(self._recipe_name)
        if experiment is not None:
            self._experiment_id = experiment.experiment_id
        else:
            place = None
            if self._uri == default_uri(self._store):
                side = _local_side(self._store)
                place = (side / "mlflow-artifacts" / self._recipe_name).as_uri()
            self._experiment_id = client.create_experiment(self._recipe_name, place)
        return client

    def _create(
        self,
        client: MlflowClient,
        key: str,
        name: str,
        tags: Mapping[str, str],
        parent: str | None = None,
    ) -> str:
        tags = {**tags, "ediffi.run_id": self._run_id}
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

    def _close_killed(self, client: MlflowClient, run_id: str) -> None:
        query = f"tags.`ediffi.run_id` = '{run_id}' and attributes.status = 'RUNNING'"
        # It may have been a run of another recipe, which has an experiment of its own.
        experiments = [one.experiment_id for one in client.search_experiments()]
        for run in client.search_runs(experiments, query):
            client.set_terminated(run.info.run_id, "KILLED")

    def _log_params(self, client: MlflowClient, run: str, values: Json) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:MAX_PARAM_CHARACTERS]) for name, value in flatten(values)]
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


def draw_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> Iterator[tuple[str, Any]]:
    """One picture a metric, one line a unit, by images seen; yields names and PIL pictures."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    for name in ("loss", "images_per_s"):
        lines = {
            unit: [(row["images"], row[name]) for row in rows if name in row]
            for unit, rows in curves.items()
        }
        if not any(lines.values()):
            continue
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="images seen", ylabel=name)
        for unit, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=unit)
        axes.legend()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        yield name, Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
