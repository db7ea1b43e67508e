"""The training scripts, each readable from top to bottom, and what they share."""
