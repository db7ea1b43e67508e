"""What another choice of items could change: intervals of scores, and whether a difference is more than chance.

A score here is a function of counts summed over items (sentences, answers), so that the score of any choice of items
comes from counting each item once. The bootstrap (Efron and Tibshirani 1993; for translation, Koehn 2004) draws as many
items as there are, with replacement, RESAMPLES times. Two systems are compared on the same draws. It says nothing about
another training with another seed. Fewer than about twenty items make intervals too narrow and p too small (of ten that
do not differ on average, a difference is found once in ten times instead of twenty); `p_value` keeps a handful from
claiming what it can never show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

RESAMPLES = 1000
SEED = 12345  # sacrebleu's, which draws the same sentences by it
LEVEL = 0.05  # of significance

Interval = tuple[float, float]
Score = Callable[[np.ndarray], float]  # of counts summed over items


def resample(score: Score, *systems: np.ndarray, seed: int | Sequence[int] = SEED) -> np.ndarray:
    """Scores [systems, RESAMPLES] of random choices of items, the same for each of `systems` (their counts [n, k])."""
    scores = np.empty((len(systems), RESAMPLES))
    for choice, times in enumerate(choices(len(systems[0]), seed)):
        scores[:, choice] = [score(times @ counts) for counts in systems]
    return scores


def choices(items: int, seed: int | Sequence[int] = SEED) -> Iterator[np.ndarray]:
    """How often each of the items is drawn, [items], RESAMPLES times anew."""
    dice = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.bincount(dice.integers(items, size=items), minlength=items).astype(np.float64)


def seed_for(name: str) -> list[int]:
    """A seed of the group's own: with the same one, groups of equal size would go up and down together."""
    return [SEED, crc32(name.encode("utf-8", "surrogatepass"))]


def interval_of(scores: np.ndarray) -> Interval:
    """Where 95 % of resampled scores lie."""
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def rounded(interval: Interval, digits: int) -> list[float]:
    """An interval for JSON."""
    return [round(bound, digits) for bound in interval]


@dataclass(frozen=True)
class Paired:
    """Two scores on the same items, their intervals of 95 % and that of their difference, and what the test says."""

    scores: tuple[float, float]
    intervals: tuple[Interval, Interval]
    difference_interval: Interval
    p: float

    @property
    def difference(self) -> float:
        """The second minus the first."""
        return self.scores[1] - self.scores[0]

    def to_json(self, digits: int) -> dict[str, Any]:
        """difference, difference_interval and p; the scores themselves are for whoever knows what they are."""
        return {
            "difference": round(self.difference, digits),
            "difference_interval": rounded(self.difference_interval, digits),
            "p": round(self.p, 4),
        }

    @classmethod
    def of(cls, scores: tuple[float, float], resampled: np.ndarray, differing: int) -> Paired:
        """From two scores, their resampled ones [2, RESAMPLES], and how many items differ between the two."""
        differences = resampled[1] - resampled[0]
        return cls(
            scores=scores,
            intervals=(interval_of(resampled[0]), interval_of(resampled[1])),
            difference_interval=interval_of(differences),
            p=p_value(scores[1] - scores[0], differences, differing),
        )


def paired(score: Score, first: np.ndarray, second: np.ndarray, seed: int | Sequence[int] = SEED) -> Paired:
    """The two-sided paired bootstrap of two systems' counts [n, k] on the same items in the same order."""
    scores = score(first.sum(0)), score(second.sum(0))
    return Paired.of(scores, resample(score, first, second, seed=seed), differing(first, second))


def differing(first: np.ndarray, second: np.ndarray) -> int:
    """How many items have other counts in the second system than in the first."""
    return int((first != second).any(axis=1).sum())


def p_value(difference: float, resampled: np.ndarray, differing: int | None = None) -> float:
    """How often chance alone makes a difference of at least this size, in either direction.

    `resampled` differences spread around the one found as chance would spread them around zero (Efron and Tibshirani
    1993, section 16.4). The one found counts as one of them, so p is never 0.

    differing: the number of items on which the two systems differ, if known. That so many all change in one direction
    happens by chance once in 2^(differing - 1) times, and p is never below that: a single item, drawn from itself over
    and over, has no spread at all, and would prove anything.
    """
    by_chance = np.abs(resampled - resampled.mean())
    p = float(((by_chance >= abs(difference)).sum() + 1) / (len(resampled) + 1))
    return p if differing is None else max(p, min(1.0, 2.0 ** (1 - differing)))


def better_of(metric: str, names: Sequence[str], difference: float, p: float) -> str:
    """What a test says of two systems, in words. difference: the second's score minus the first's; more is better."""
    if p >= LEVEL:
        return f"{metric}: no difference can be told at p < {LEVEL:g} (p = {p:.3f})"
    return f"{metric}: {names[difference > 0]} is better, p = {p:.3f}"


def verdict(compared: Mapping[str, Any], better: int) -> str:
    """What the test says, of the JSON of a `Paired`, in words. better: 1 where more is better, -1 where less is."""
    if compared["p"] >= LEVEL:
        return f"no difference can be told at p < {LEVEL:g} (p = {compared['p']:.3f})"
    return f"{'better' if compared['difference'] * better > 0 else 'worse'} after training, p = {compared['p']:.3f}"
