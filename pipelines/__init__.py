"""The orchestrator: recipe, stages, runner, ledger, tracking and the command line."""
