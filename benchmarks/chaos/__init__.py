"""Chaos: whole pipelines whose drivers, workers, nodes and stores fail at random moments.

A pipeline is run once undisturbed. Then the same command runs in other stores while something is
done to it again and again, and is given again until it succeeds. In the end nothing may tell the
stores apart: `python -m benchmarks.chaos`, and `tests/chaos` in short.
"""
