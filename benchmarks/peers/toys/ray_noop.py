"""The toy on bare Ray: started as ours starts it, tasks instead of stages, nothing kept.

`python ray_noop.py ten|wide|start`; `start` does no task at all.
"""

import sys

import ray
from toy import note  # type: ignore[import-not-found]  # beside this one


@ray.remote
def step(name: str, *needs: None) -> None:
    note(name)


def main(shape: str) -> None:
    ray.init(
        address="local",
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _node_ip_address="127.0.0.2",
    )
    if shape == "start":
        return
    source = step.remote("source")
    width = 5 if shape == "ten" else 100
    last = step.remote("join", *[step.remote(f"{index:03d}", source) for index in range(width)])
    for name in ("first", "second", "third") if shape == "ten" else ():
        last = step.remote(name, last)
    ray.get(last)


main(sys.argv[1])
