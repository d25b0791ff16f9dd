"""How a stage becomes a cached, tracked Prefect task."""
