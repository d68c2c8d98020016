"""A run without Ray: the same units by the same rules, one after another in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipelines.planning import contents_of, describe, plan
from pipelines.recipe import CacheRecipe
from pipelines.run_record import RunRecord
from pipelines.store.fingerprint import unit_key
from pipelines.store.ledger import Ledger
from pipelines.worker.execute import Task, execute
from pipelines.workflow import select


def run_recipe(
    recipe: CacheRecipe,
    ledger: Ledger,
    *,
    selected: Sequence[str] = (),
    retry: Mapping[str, frozenset[str]] | None = None,
) -> list[str]:
    """Bring the selected stages to their manifests; `stage/unit` of all that was looked at."""
    again = retry or {}
    done = []
    planned = select(plan(recipe, ledger), selected)
    for one in planned:
        inputs = {name: ledger.stage(name, key).manifest() for name, key in one.inputs.items()}
        contents = contents_of(one.inputs, inputs)
        if one.record.is_complete and one.name not in again:
            continue
        one.record.open(describe(one.stage, one.inputs), contents)
        units = list(one.stage.plan(inputs))
        for unit in units:
            key = unit.key or unit_key(one.fingerprint, inputs=contents)
            task = Task(
                store=str(ledger.store),
                stage=one.stage,
                fingerprint=one.fingerprint,
                inputs=one.inputs,
                unit=replace(unit, key=key),
                earlier=one.earlier,
                is_retry=unit.id in again.get(one.name, frozenset()),
            )
            execute(task)
            done.append(f"{one.name}/{unit.id}")
        identity = describe(one.stage, one.inputs)
        one.record.complete(
            one.name, identity, one.inputs, contents, [unit.id for unit in units], "run-here"
        )
    record = RunRecord(
        recipe=recipe.name,
        resolved=recipe.model_dump(mode="json"),
        planned={one.name: one.fingerprint for one in planned},
        state="finished",
    )
    ledger.write_run(vars(record))
    return done
