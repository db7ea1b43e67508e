"""What wandb gets of a run."""
