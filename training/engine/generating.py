"""What a model answers to held-out samples while it is trained: which samples, who answers them, what is kept of it.

Promises: the same samples at every validation and in every run; the same answers on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from training.engine.cluster import Cluster
from training.engine.status import Example

# From all batches of a validation to those of this rank; see `training.engine.task.Task.validate`.
OwnPart = Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]]

_EXAMPLES = 4


@dataclass(frozen=True)
class GeneratedScores:
    """Scores of the answers by name (0 to 100, more is better), and a few of them."""

    scores: dict[str, float]
    examples: list[Example]

    @classmethod
    def of(
        cls, scores: dict[str, float], sources: Sequence[str], references: Sequence[str], answers: Sequence[str]
    ) -> GeneratedScores:
        """Of all samples, whose first ones are the examples."""
        shown = list(zip(sources, references, answers, strict=True))[:_EXAMPLES]
        examples: list[Example] = [{"source": s, "reference": r, "answer": a} for s, r, a in shown]
        return cls({name: round(score, 3) for name, score in scores.items()}, examples)


def drawn(count: int, total: int) -> np.ndarray:
    """Which of `total` samples are answered, `count` at most, [n]; more of them hold the fewer."""
    return np.random.default_rng(1234).permutation(total)[:count]


def answers_of(
    samples: np.ndarray,
    lengths: np.ndarray,
    answer: Callable[[list[int]], list[str]],
    cluster: Cluster,
    own_part: OwnPart,
    *,
    most: int,
) -> list[str]:
    """The answers to `samples` [n], in order, on every rank; each rank gives its part.

    lengths [n]: of the samples; equally long ones share a batch. answer: from the samples of a batch to their answers.
    most: of a batch, which nothing can interrupt. In its rounding an answer depends on the others of its batch, so the
    batches do not depend on the ranks.
    """
    places = np.argsort(lengths, kind="stable")
    own: list[tuple[int, str]] = []
    for batch in own_part(np.array_split(places, -(-len(places) // most))):
        own += zip(batch.tolist(), answer(samples[batch].tolist()), strict=True)
    by_place = dict(pair for of_rank in cluster.gather(own, list[tuple[int, str]]) for pair in of_rank)
    return [by_place[place] for place in range(len(samples))]
