"""The models that are trained from scratch."""
