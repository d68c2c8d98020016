"""The ten no-op steps as a Metaflow flow: a source, five beside one another, a join, a chain."""

# mypy: ignore-errors
# (its packages are not in our environment)

from metaflow import FlowSpec, step
from toy import note


class Ten(FlowSpec):
    @step
    def start(self):
        note("source")
        self.next(self.a, self.b, self.c, self.d, self.e)

    @step
    def a(self):
        note("a")
        self.next(self.join)

    @step
    def b(self):
        note("b")
        self.next(self.join)

    @step
    def c(self):
        note("c")
        self.next(self.join)

    @step
    def d(self):
        note("d")
        self.next(self.join)

    @step
    def e(self):
        note("e")
        self.next(self.join)

    @step
    def join(self, inputs):
        note("join")
        self.next(self.first)

    @step
    def first(self):
        note("first")
        self.next(self.second)

    @step
    def second(self):
        note("second")
        self.next(self.end)

    @step
    def end(self):
        note("third")


if __name__ == "__main__":
    Ten()
