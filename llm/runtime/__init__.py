"""Stages as processes: jobs, shards, code digest, prefetching. In no code digest."""
