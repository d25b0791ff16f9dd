"""Stages as processes: jobs, shards, termination, prefetching. In no code digest."""
