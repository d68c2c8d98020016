"""What the no-op tasks of all sides do: write their name where the benchmark can count it."""

import os


def note(name: str) -> None:
    """One line into `$TOY_LOG`; short enough to come out whole from several processes at once."""
    with open(os.environ["TOY_LOG"], "a") as stream:
        stream.write(f"{name}\n")
