"""Shards of a stage on a Dask or Ray cluster."""
