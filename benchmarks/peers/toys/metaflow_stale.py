"""The stale-cache toy as a Metaflow flow: `run`, `resume`; `tell` prints what the last run made."""

# mypy: ignore-errors
# (its packages are not in our environment)

import json
import sys

from helping import helper
from metaflow import Flow, FlowSpec, namespace, resources, step
from reading import number_of
from toy import note


def times(factor):
    return lambda number: number * factor


scale = times(3)


class Stale(FlowSpec):
    @step
    def start(self):
        note("read")
        self.number = number_of("input.tar")
        self.next(self.helped)

    @resources(cpu=1)
    @step
    def helped(self):
        note("helped")  # a remark
        with open("settings.json") as stream:
            self.number = helper(self.number) + json.load(stream)["add"]
        self.next(self.end)

    @step
    def end(self):
        note("scaled")
        self.number = scale(self.number)


if __name__ == "__main__":
    if sys.argv[1:] == ["tell"]:
        namespace(None)
        print(Flow("Stale").latest_run.data.number)
    else:
        Stale()
