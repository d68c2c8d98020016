"""The stale-cache toy as a Prefect flow, with its strictest cache; prints what it made.

With the word `digest` the shard's bytes are made an input of the first task, as Prefect's pages
advise for files.
"""

# mypy: ignore-errors
# (its packages are not in our environment)

import json
import sys

from helping import helper
from prefect import flow, task
from prefect.cache_policies import INPUTS, TASK_SOURCE
from prefect.utilities.hashing import file_hash
from reading import number_of
from toy import note

CACHE = INPUTS + TASK_SOURCE


@task(cache_policy=CACHE, persist_result=True)
def read(path: str, digest: str) -> int:
    note("read")
    return number_of(path)


@task(cache_policy=CACHE, persist_result=True, tags={"cpus-1"})
def helped(number: int, add: int) -> int:
    note("helped")  # a remark
    return helper(number) + add


def times(factor: int):
    @task(cache_policy=CACHE, persist_result=True)
    def scaled(number: int) -> int:
        note("scaled")
        return number * factor

    return scaled


scaled = times(3)


@flow
def stale() -> int:
    with open("settings.json") as stream:
        add = json.load(stream)["add"]
    digest = file_hash("input.tar") if "digest" in sys.argv else ""
    return scaled(helped(read("input.tar", digest), add))


if __name__ == "__main__":
    print(stale())
