"""Training: the one loop, its batches, optimizers, schedules, checkpoints and metrics."""
