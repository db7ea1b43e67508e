"""The training scripts, each readable from top to bottom, and what they share."""

import launch.environment  # noqa: F401 (before torch: OpenMP reads its settings when torch loads it)
