"""What a model with trained adapters answers and how good that is, before and after the training."""
