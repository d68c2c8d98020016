"""The stale-cache toy as Dagster assets; makes what Dagster calls stale, prints what came out.

The shard is an observed source whose data version is the digest of its bytes. Code versions are
written by hand, which is all that Dagster knows of code: nobody thinks of them in a hurry.
"""

# mypy: ignore-errors
# (its packages are not in our environment)

import hashlib
import json

import dagster
from helping import helper
from reading import number_of
from toy import note


@dagster.observable_source_asset
def shard():
    with open("input.tar", "rb") as stream:
        return dagster.DataVersion(hashlib.file_digest(stream, "sha256").hexdigest())


@dagster.asset(deps=[shard], code_version="1")
def read():
    note("read")
    return number_of("input.tar")


class Settings(dagster.Config):
    add: int


@dagster.asset(code_version="1", op_tags={"cpus": "1"})
def helped(config: Settings, read):
    note("helped")  # a remark
    return helper(read) + config.add


def times(factor):
    @dagster.asset(code_version="1")
    def scaled(helped):
        note("scaled")
        return helped * factor

    return scaled


scaled = times(3)
ASSETS = [shard, read, helped, scaled]


def main():
    from dagster._core.definitions.data_version import StaleStatus
    from dagster._core.definitions.observe import observe
    from dagster._utils.test.data_versions import get_stale_status_resolver

    with open("settings.json") as stream:
        settings = {"ops": {"helped": {"config": json.load(stream)}}}
    with dagster.DagsterInstance.get() as instance:
        observe([shard], instance=instance)
        resolver = get_stale_status_resolver(instance, ASSETS)
        keys = [one.key for one in ASSETS[1:]]
        stale = [key for key in keys if resolver.get_status(key) != StaleStatus.FRESH]
        if stale:
            chosen = dagster.AssetSelection.assets(*stale).downstream()
            names = {key.to_user_string() for key in chosen.resolve(ASSETS)}
            assert dagster.materialize(
                ASSETS,
                selection=chosen,
                instance=instance,
                run_config=settings if "helped" in names else None,
            ).success
        print(dagster.Definitions(assets=ASSETS).load_asset_value("scaled", instance=instance))


if __name__ == "__main__":
    main()
