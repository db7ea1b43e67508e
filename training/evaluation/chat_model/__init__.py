"""A chat model with a run's adapters, and what it says."""
