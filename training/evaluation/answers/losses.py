"""How well a model foresees the answers of a data set, task by task, before and after training.

The loss of a task is the sum of nats over its answer tokens divided by their number, never a mean of means; perplexity
is its exponential. Only losses of the same tokens are compared, that is, of models with the same tokenizer. Intervals
and p are those of `bootstrap`, over items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.data.answer_metrics import rows_by_task
from training.evaluation.bootstrap import Interval, Paired, interval_of, paired, resample, rounded, seed_for

ALL_TASKS = "all tasks"


@dataclass(frozen=True)
class TaskLoss:
    """How well the answers of one task, or of all, were foreseen, with intervals of 95 %."""

    task: str
    items: int
    tokens: int
    loss: float  # nats per answer token
    interval: Interval
    counts: np.ndarray = field(repr=False, compare=False)  # [items, 2], nats and tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return _exp(self.loss)

    @property
    def perplexity_interval(self) -> Interval:
        """The interval of the perplexity."""
        return _exp(self.interval[0]), _exp(self.interval[1])

    def to_json(self) -> dict[str, Any]:
        """What is said of the model, not of the task."""
        return {
            "loss": round(self.loss, 5),
            "interval": rounded(self.interval, 5),
            "perplexity": round(self.perplexity, 3),
            "perplexity_interval": rounded(self.perplexity_interval, 3),
        }


def loss_by_task(tasks: Sequence[str], losses_sum: Sequence[float], token_counts: Sequence[int]) -> dict[str, TaskLoss]:
    """The loss of each task, and of ALL_TASKS, from each item's nats, summed over its answer tokens, and their number.

    A token weighs the same in whichever item it stands. Raises ValueError for items without tokens, or losses that are
    no numbers.
    """
    if not len(tasks) == len(losses_sum) == len(token_counts) or not tasks:
        raise ValueError(f"{len(tasks)} tasks, {len(losses_sum)} losses and {len(token_counts)} token counts")
    counts = np.array([losses_sum, token_counts], dtype=np.float64).T
    if not np.isfinite(counts).all() or (counts[:, 1] < 1).any():
        raise ValueError("every item needs a finite loss and at least one token")
    rows = {**rows_by_task(tasks), ALL_TASKS: list(range(len(tasks)))}
    return {task: _task_loss(task, counts[own]) for task, own in rows.items()}


def _task_loss(task: str, counts: np.ndarray) -> TaskLoss:
    (resampled,) = resample(_per_token, counts, seed=seed_for(task))
    total = counts.sum(0)
    return TaskLoss(task, len(counts), int(total[1]), _per_token(total), interval_of(resampled), counts)


@dataclass(frozen=True)
class LossComparison:
    """The loss of one task, or of all, before and after training; the test is that of nats per token."""

    before: TaskLoss
    after: TaskLoss
    test: Paired

    def to_json(self) -> dict[str, Any]:
        """As one of the `losses` of an evaluation."""
        return {
            "task": self.after.task,
            "items": self.after.items,
            "tokens": self.after.tokens,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            **self.test.to_json(5),
        }


def compare_losses(before: Mapping[str, TaskLoss], after: Mapping[str, TaskLoss]) -> list[LossComparison]:
    """Tests two models on the same tokens, task by task and in all. Raises ValueError where tokens differ."""
    if before.keys() != after.keys():
        raise ValueError(f"tasks differ: {sorted(before)} and {sorted(after)}")
    for task in after:
        if not np.array_equal(before[task].counts[:, 1], after[task].counts[:, 1]):
            raise ValueError(f"{task}: the two losses are not of the same tokens")
    return [
        LossComparison(first, second, paired(_per_token, first.counts, second.counts, seed_for(task)))
        for task, second in after.items()
        for first in (before[task],)
    ]


def _per_token(summed_counts: np.ndarray) -> float:
    nats, tokens = summed_counts
    return float(nats / tokens)


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # about as far as floating point goes
