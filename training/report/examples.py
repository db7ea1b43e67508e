"""Which rows of a part a page shows as examples: drawn, not picked by quality."""

from __future__ import annotations

import random

EXAMPLES = 12
EXAMPLES_SEED = 1234


def example_rows(count: int) -> list[int]:
    """Which of `count` rows are shown: the same for every model, so that runs can be compared row by row."""
    return random.Random(EXAMPLES_SEED).sample(range(count), min(EXAMPLES, count))
