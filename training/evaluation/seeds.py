"""Groups of runs that differ in their seeds alone: means, spread, and whether two groups differ.

The paired bootstrap of two runs says what other sentences could change; another seed can change as much again. So each
run of a group counts as one observation, and two groups are compared by Welch's t-test over their runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from training.base.console import say
from training.evaluation.bootstrap import LEVEL, better_of


@dataclass(frozen=True)
class Group:
    """Runs under one name, and the scores of each by metric."""

    name: str
    scores: Sequence[Mapping[str, float]]

    def of(self, metric: str) -> list[float]:
        """The scores of all runs by this metric."""
        return [each[metric] for each in self.scores]


@dataclass(frozen=True)
class Welch:
    """The second group's mean minus the first's, where 95 % of such differences would hold it, and p (two-sided)."""

    difference: float
    interval: tuple[float, float]
    p: float

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Welch:
        """Of two groups of two scores or more each, not all of a group's equal in both."""
        from scipy import stats  # slow to import

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a group without any spread
            found = stats.ttest_ind(second, first, equal_var=False)
            low, high = found.confidence_interval(1 - LEVEL)
        return cls(mean(second) - mean(first), (float(low), float(high)), float(found.pvalue))


def print_groups(groups: Sequence[Group]) -> None:
    """A table for each metric, and where there are two groups what the test says, in words."""
    metrics = [metric for metric in groups[0].scores[0] if all(metric in each for one in groups for each in one.scores)]
    width = max(len(name) for name in (*(one.name for one in groups), *metrics))
    verdicts = []
    for metric in metrics:
        say(f"\n  {metric:<{width}}  runs    mean  deviation  lowest  highest")
        for one in groups:
            found = one.of(metric)
            spread = f"{stdev(found):.2f}" if len(found) > 1 else "-"
            numbers = f"{mean(found):6.2f}  {spread:>9}  {min(found):6.2f}  {max(found):7.2f}"
            say(f"  {one.name:<{width}}  {len(found):4}  {numbers}")
        if len(groups) < 2 or any(len(one.scores) == 1 for one in groups):
            continue
        if all(len(set(one.of(metric))) == 1 for one in groups):
            verdicts.append(f"{metric}: the runs of each group score the same, so there is no spread to test by")
        else:
            test = Welch.of(*(one.of(metric) for one in groups))
            low, high = test.interval
            bounds = f"95 %: {low:+.2f} to {high:+.2f}"
            say(f"  {'difference':<{width}}        {test.difference:+.2f} ({bounds}), p = {test.p:.3f}")
            verdict = better_of(metric, [one.name for one in groups], test.difference, test.p)
            verdicts.append(f"{verdict} (Welch's t-test over runs)")
    say("")
    for one in groups:
        if len(one.scores) == 1:
            say(f"{one.name} is a single run, so nobody can say what its seed was worth: train it with others, too")
    for each in verdicts:
        say(each)
