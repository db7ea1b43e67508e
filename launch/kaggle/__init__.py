"""A run on Kaggle's free GPUs: the notebook that trains, its kernel run there, and the relay from one to the next."""
