"""The local Prefect and MLflow servers."""
