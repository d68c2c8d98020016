"""What a command says when its store cannot be reached: words for people, and exit code 3."""

from __future__ import annotations

from argparse import Namespace

from pipelines.commands.options import Command
from pipelines.store.ledger import Ledger
from pipelines.store.outages import as_retryable


def from_store(command: Command) -> Command:
    """The same command, whose errors of the store tell what failed and what to do."""

    def told(options: Namespace) -> int | None:
        with as_retryable(Ledger.at(options.store).store, f"ediffi {options.verb}"):
            return command(options)

    return told
