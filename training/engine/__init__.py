"""What every training script shares: batch plan, loop, checkpoints, stopping, parallelism, metrics; no task."""
