"""The training scripts, each readable from top to bottom, and what they share."""

from training.base.environment import set_thread_defaults

set_thread_defaults()  # here and not in a main: OpenMP reads them once, when a script's imports load torch
