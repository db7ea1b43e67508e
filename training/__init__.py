"""The training scripts, each readable from top to bottom, and what they share."""

from training.base.environment import arrange_process

arrange_process()  # before torch, which reads OpenMP's settings when it is loaded
