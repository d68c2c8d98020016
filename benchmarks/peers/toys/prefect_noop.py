"""The toy as a Prefect flow, strictest cache: `python prefect_noop.py ten|wide SETTING`."""

# mypy: ignore-errors
# (its packages are not in our environment)

import sys

from prefect import flow, task
from prefect.cache_policies import INPUTS, TASK_SOURCE
from toy import note


@task(cache_policy=INPUTS + TASK_SOURCE, persist_result=True)
def step(name: str, setting: int, needs: list[str]) -> str:
    note(name)
    return f"{name}-{setting}({','.join(needs)})"  # all it depends on, else `third` finds no change


@flow
def toy(shape: str, setting: int) -> None:
    width = 5 if shape == "ten" else 100
    source = step.submit("source", width, [])  # else a hundred would find what ten left
    middle = [step.submit(f"{index:03d}", 0, [source]) for index in range(width)]
    last = step.submit("join", 0, middle)
    for name in ("first", "second", "third") if shape == "ten" else ():
        last = step.submit(name, setting if name == "first" else 0, [last])
    last.result()


if __name__ == "__main__":
    toy(sys.argv[1], int(sys.argv[2]))
