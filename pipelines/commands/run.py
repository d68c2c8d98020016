"""What each command of the command line does. Heavy imports stay inside the functions."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.recipe import CacheRecipe
from pipelines.recipe_file import load_any_recipe, load_recipe
from pipelines.stage import Json, Manifest
from pipelines.store.ledger import Ledger
from pipelines.store.location import Location, location

if TYPE_CHECKING:
    from pipelines.run_record import RunRecord


def run(options: Namespace) -> None:
    """Run a recipe to the end, or the chosen stages with all they need."""
    recipe = load_any_recipe(options.recipe, options.overrides)
    record = execute_recipe(recipe, options, options.stages)
    if not options.json:
        print_table(record)


def demo(options: Namespace) -> None:
    """Draw the embedded data set, serve it on loopback and run the demo recipe on it."""
    from pipelines.planning import plan as make_plan

    store = Ledger.checked(options.store).store
    data = (store if isinstance(store, Path) else Path("ediffi-store").absolute()) / "demo-data"
    overrides = [f"data.list={data / 'captions.parquet'}"]
    if (os.cpu_count() or 1) < 2:
        overrides.append("resources.base.num_workers=1")
    with ExitStack() as stack:
        if not (data / "captions.parquet").exists():
            from pipelines.demo.shapes import write_data_set

            write_data_set(data)
        recipe = load_recipe("demo", overrides)
        if not make_plan(recipe, Ledger.checked(options.store))[0].is_hit:
            from pipelines.demo.server import serve_directory

            address = stack.enter_context(serve_directory(data))
            recipe = load_recipe("demo", [*overrides, f"data.address_prefix={address}/"])
        record = execute_recipe(recipe, options, ())
    if not options.json:
        print_table(record)


def execute_recipe(recipe: CacheRecipe, options: Namespace, selected: Sequence[str]) -> RunRecord:
    """Run the chosen stages of a recipe; with --json the result goes to stdout, failed or not."""
    from pipelines.workflow import run_recipe

    ledger = Ledger.open(options.store)
    patience: dict[str, Any] = {"busy": "leave"} if getattr(options, "leave", False) else {}
    try:
        record = run_recipe(recipe, ledger, selected=selected, **patience)
    except (StageFailed, RetryableError) as error:
        if options.json and error.record is not None:
            print(json.dumps(_result(ledger, error.record)))
        raise
    if options.json:
        print(json.dumps(_result(ledger, vars(record))))
    return record


def _result(ledger: Ledger, record: Json) -> Json:
    """The object that `run --json` prints."""
    return {
        "run_id": record["run_id"],
        "store": str(ledger.store),
        "ensemble": str(path) if (path := _ensemble(record)) else "",
        "stages": record["stages"],
    }


def print_table(record: RunRecord) -> None:
    """What a person wants to know after a run."""
    from pipelines.tracking.place import default_uri, without_password

    for row in record.stages:
        seconds = f"{row['seconds']:8.1f} s" if row["state"] == "ran" else " " * 10
        print(f"{row['name']:<18} {row['state']:<7} {seconds}  {row['units']:>4} units")
    print(f"{'total':<18} {'':<7} {record.seconds:8.1f} s")
    figures = _figures(vars(record))
    for title, suffix in (
        ("text alignment", "text_alignment"),
        ("Fréchet distance", "frechet_distance"),
        ("held-out loss", "loss"),
    ):
        found = {
            name.removesuffix(f"/{suffix}"): value
            for name, value in figures.items()
            if name.count("/") == 1 and name.endswith(f"/{suffix}")
        }
        if found:
            print(f"{title:<18} " + ", ".join(f"{k} {v:.3f}" for k, v in sorted(found.items())))
    directories = {row["name"]: location(row["path"]) for row in record.stages}
    if "sample" in directories:
        print(f"pictures           {directories['sample'] / 'grid.png'}")
    if "report" in directories:
        print(f"report             {directories['report'] / 'report.html'}")
    if (ensemble := _ensemble(vars(record))) is not None:
        print(f"ensemble           {ensemble}")
    store = next(iter(directories.values())).parents[1]
    uri = record.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(store)
    uri = without_password(uri)
    if uri.startswith("sqlite"):
        print(f"MLflow             mlflow ui --backend-store-uri {uri}")
    else:
        print(f"MLflow             {uri}")


def _ensemble(record: Json) -> Location | None:
    for row in record["stages"]:
        if row["name"] == "assemble" and row["state"] in {"ran", "cached"}:
            return location(row["path"]) / "ensemble"
    return None


def _figures(record: Json) -> dict[str, float]:
    """The figures of a run's report, by name."""
    for row in record["stages"]:
        if row["name"] == "report" and row["state"] in {"ran", "cached"}:
            return Manifest.load(location(row["path"])).receipt("report").facts["metrics"]
    return {}


def compare(options: Namespace) -> None:
    """Print the settings that differ between runs and the figures of each."""
    from pipelines.cost import cost_of_run
    from pipelines.store.fingerprint import flatten

    ledger = Ledger.checked(options.store)
    records = [ledger.run(run_id) for run_id in options.runs]
    settings = [dict(flatten(record["resolved"])) for record in records]
    names = sorted(set().union(*settings))
    differing = {
        name: [values.get(name, "absent") for values in settings]
        for name in names
        if len({json.dumps(values.get(name, "absent")) for values in settings}) > 1
    }
    figures = [_figures(record) for record in records]
    figures = [one | cost_of_run(ledger, record).metrics() for one, record in zip(figures, records)]
    measured = {name: [one.get(name) for one in figures] for name in sorted(set().union(*figures))}
    seconds = {"seconds": [record["seconds"] for record in records]}
    ids = [record["run_id"] for record in records]
    if options.json:
        print(json.dumps({"runs": ids, "settings": differing, "figures": measured | seconds}))
        return
    print(f"{'':<36}" + "  ".join(f"{run_id:>28}" for run_id in ids))
    for name, values in {**differing, **measured, **seconds}.items():
        print(f"{name:<36}" + "  ".join(f"{_cell(value):>28}" for value in values))


def _cell(value: Json) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def encoders(options: Namespace) -> None:
    """Fit the recipe's CLIP; print where it lies."""
    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.clip_fit is None:
        raise UserError(f"recipe {options.recipe} has no `clip_fit:` section to say what to fit")
    record = execute_recipe(recipe, options, ("clip_fit",))
    if not options.json:
        path = next(row["path"] for row in record.stages if row["name"] == "clip_fit")
        print(Path(path) / "clip")
