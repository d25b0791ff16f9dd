"""Orchestration: the pipeline as a Prefect flow, the command line, and the local servers."""
