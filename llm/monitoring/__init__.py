"""Training metrics: the metrics file, throughput. In no code digest."""
