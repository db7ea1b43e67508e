"""What every training script shares: batch plan, loop, checkpoints, stopping, parallelism, tracking. It knows no task."""
