"""MLflow: what a run tells it, where, and what is closed there afterwards."""
