"""What runs when: the pipeline, single stages, the command line and the servers beside them."""
