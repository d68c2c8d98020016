"""The toy as Dagster assets (`ten`) and as a job with a dynamic output (`wide`).

`python dagster_noop.py ten all` makes every asset, `python dagster_noop.py ten stale` those alone
that Dagster calls stale or missing, as its sensors' `stale_assets_only` does, and all behind them:
an asset behind a stale one is called fresh until that one is made. The code version of the asset
`first` is `$TOY_SETTING`. All of it in one process; Dagster's own commands `asset materialize` and
`job execute` start a process for every step.
"""

# mypy: ignore-errors
# (its packages are not in our environment)

import os
import sys

import dagster
from toy import note


def _asset(name, *needs, setting="0"):
    @dagster.asset(name=name, deps=list(needs), code_version=setting)
    def made():
        note(name)

    return made


_MIDDLE = ("a", "b", "c", "d", "e")
_ASSETS = [
    _asset("source"),
    *(_asset(name, "source") for name in _MIDDLE),
    _asset("join", *_MIDDLE),
    _asset("first", "join", setting=os.environ.get("TOY_SETTING", "0")),
    _asset("second", "first"),
    _asset("third", "second"),
]


@dagster.op(out=dagster.DynamicOut(str))
def source():
    note("source")
    for index in range(100):
        yield dagster.DynamicOutput(f"{index:03d}", mapping_key=f"n{index:03d}")


@dagster.op
def each(name):
    note(name)
    return name


@dagster.op
def join(names):
    note("join")
    return len(names)


@dagster.job
def wide():
    join(source().map(each).collect())


defs = dagster.Definitions(assets=_ASSETS, jobs=[wide])


def _stale(instance):
    """Keys that Dagster calls stale or missing; found as its own scheduler does."""
    from dagster._core.definitions.data_version import StaleStatus
    from dagster._utils.test.data_versions import get_stale_status_resolver

    resolver = get_stale_status_resolver(instance, _ASSETS)
    statuses = {one.key: resolver.get_status(one.key) for one in _ASSETS}
    return [key for key, status in statuses.items() if status != StaleStatus.FRESH]


def main(shape, which):
    with dagster.DagsterInstance.get() as instance:
        if shape == "wide":
            assert wide.execute_in_process(instance=instance).success
            return
        wanted = _stale(instance) if which == "stale" else [one.key for one in _ASSETS]
        if wanted:
            chosen = dagster.AssetSelection.assets(*wanted).downstream()
            assert dagster.materialize(_ASSETS, selection=chosen, instance=instance).success


if __name__ == "__main__":
    main(*sys.argv[1:])
