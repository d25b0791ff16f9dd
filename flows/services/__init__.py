"""The Prefect and MLflow servers: start, stop, protect and find them."""
