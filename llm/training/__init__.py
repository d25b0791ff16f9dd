"""Training: objectives, batches, the loop, optimizers, schedules, checkpoints, validation."""
