"""Looking after what a store holds: checking, repairing, clearing, comparing."""
