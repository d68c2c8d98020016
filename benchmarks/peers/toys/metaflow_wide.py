"""A hundred no-op steps beside one another as a Metaflow flow, between a source and a join."""

# mypy: ignore-errors
# (its packages are not in our environment)

from metaflow import FlowSpec, step
from toy import note


class Wide(FlowSpec):
    @step
    def start(self):
        note("source")
        self.names = [f"{index:03d}" for index in range(100)]
        self.next(self.each, foreach="names")

    @step
    def each(self):
        note(self.input)
        self.next(self.join)

    @step
    def join(self, inputs):
        note("join")
        self.next(self.end)

    @step
    def end(self):
        """Metaflow wants one."""


if __name__ == "__main__":
    Wide()
