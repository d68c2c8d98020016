"""The parts of `benchmarks.paper_claims`: data, recipes, judges and the six claims."""
