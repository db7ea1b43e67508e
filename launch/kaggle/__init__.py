"""A run on Kaggle's free GPUs: the notebook that trains, the session within it, and the relay from one to the next."""
