"""MLflow: what a run logs, and how it gets there."""
