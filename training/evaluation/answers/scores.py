"""How good generated answers are, task by task, and whether those of a trained model are better than its base model's.

Each task has the score that suits the form of its answers, see TASKS; a task that is not in that table is free text.
Nothing is left out: an answer that is empty, cut off or in no readable form counts as it stands. Scores of two models
are comparable only on the same items, and ROUGE-L says how alike two texts are, not whether an answer is good law.

Intervals (95 %) and p are those of a bootstrap over the items of the task, see `bootstrap`. The macro average gives
every task the same weight, however many items it has; it is one over these tasks, not over others like them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.data.answer_metrics import Metric, metric_of, rows_by_task
from training.evaluation.bootstrap import (
    Interval,
    Paired,
    choices,
    differing,
    interval_of,
    paired,
    resample,
    rounded,
    seed_for,
)


@dataclass(frozen=True)
class TaskScore:
    """The score of one task, 0 to 100, and its interval of 95 %."""

    task: str
    value: float
    interval: Interval
    items: int
    exact: int  # answers that say exactly what the reference says
    format_errors: int  # answers not in the form of the task; what could be read in them counts in the score
    empty: int
    odd_references: int  # references not in that form themselves
    references_sha256: str  # of all references in order: equal ones belong to the same items
    counts: np.ndarray = field(repr=False, compare=False)  # [items, k], of the metric

    @property
    def metric(self) -> Metric:
        """The task's."""
        return metric_of(self.task)

    def of_items(self) -> list[float]:
        """The score of each single item."""
        return [self.metric.score(counts) for counts in self.counts]

    def to_json(self) -> dict[str, Any]:
        """What is said of the answers, not of the task."""
        return {
            "score": round(self.value, 2),
            "interval": rounded(self.interval, 2),
            "exact": self.exact,
            "format_errors": self.format_errors,
            "empty": self.empty,
        }


def score_task(task: str, answers: Sequence[str], references: Sequence[str]) -> TaskScore:
    """Scores the answers of one task, a reference each. Raises ValueError when their numbers differ or are zero."""
    if len(answers) != len(references) or not references:
        raise ValueError(f"{task}: {len(answers)} answers for {len(references)} references")
    metric = metric_of(task)
    items = metric.items(answers, references)
    counts = np.array([item.counts for item in items], dtype=np.float64)
    (resampled,) = resample(metric.score, counts, seed=seed_for(task))
    return TaskScore(
        task=task,
        value=metric.score(counts.sum(0)),
        interval=interval_of(resampled),
        items=len(items),
        exact=sum(item.exact for item in items),
        format_errors=sum(not item.in_form for item in items),
        empty=sum(not answer.strip() for answer in answers),
        odd_references=sum(not item.reference_in_form for item in items),
        references_sha256=hashlib.sha256("\0".join(references).encode("utf-8", "surrogatepass")).hexdigest(),
        counts=counts,
    )


def score_answers(tasks: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, TaskScore]:
    """Scores answers of several tasks, each item with the name of its own; the tasks in the order of TASKS."""
    if not len(tasks) == len(answers) == len(references):
        raise ValueError(f"{len(tasks)} tasks, {len(answers)} answers and {len(references)} references")
    return {
        task: score_task(task, [answers[row] for row in own], [references[row] for row in own])
        for task, own in rows_by_task(tasks).items()
    }


@dataclass(frozen=True)
class TaskComparison:
    """One task before and after training."""

    before: TaskScore
    after: TaskScore
    test: Paired

    def to_json(self) -> dict[str, Any]:
        """As one of the `tasks` of an evaluation."""
        return {
            "task": self.after.task,
            "metric": self.after.metric.name,
            "how": self.after.metric.words,
            "items": self.after.items,
            "odd_references": self.after.odd_references,
            "references_sha256": self.after.references_sha256,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            **self.test.to_json(2),
        }


@dataclass(frozen=True)
class AnswerComparison:
    """Every task before and after training, and the macro average over them."""

    tasks: Sequence[TaskComparison]
    macro: Paired

    def to_json(self) -> dict[str, Any]:
        """`tasks` and `macro_average` of an evaluation."""
        sides = zip(("before", "after"), self.macro.scores, self.macro.intervals, strict=True)
        return {
            "tasks": [task.to_json() for task in self.tasks],
            "macro_average": {
                **{
                    name: {"score": round(value, 2), "interval": rounded(interval, 2)}
                    for name, value, interval in sides
                },
                **self.macro.to_json(2),
            },
        }


def compare_tasks(before: Mapping[str, TaskScore], after: Mapping[str, TaskScore]) -> AnswerComparison:
    """Tests two systems on the same items, task by task and in the macro average.

    Raises ValueError, naming the task, unless both have the same tasks with the same references.
    """
    if before.keys() != after.keys() or not after:
        raise ValueError(f"tasks differ, or there are none: {sorted(before)} and {sorted(after)}")
    compared = []
    for task, second in after.items():
        first = before[task]
        if first.references_sha256 != second.references_sha256:
            raise ValueError(f"{task}: not scored against the same references, {first.items} and {second.items} items")
        test = paired(first.metric.score, first.counts, second.counts, seed_for(task))
        compared.append(TaskComparison(first, second, test))
    return AnswerComparison(compared, _macro_average(compared))


def _macro_average(compared: Sequence[TaskComparison]) -> Paired:
    """The items of all tasks are drawn together, and a draw's average is over the tasks that it has items of.

    If each task were drawn for itself, a task of one item would always be drawn alike: a dozen of those have no spread,
    and would show any difference to be real.
    """
    ends = np.cumsum([task.after.items for task in compared])[:-1]
    resampled = [
        np.mean(
            [
                [side.metric.score(own @ side.counts) for side in (task.before, task.after)]
                for task, own in zip(compared, np.split(times, ends), strict=True)
                if own.any()
            ],
            axis=0,
        )
        for times in choices(sum(task.after.items for task in compared))
    ]
    before, after = np.mean([task.test.scores for task in compared], axis=0).tolist()
    changed = sum(differing(task.before.counts, task.after.counts) for task in compared)
    return Paired.of((before, after), np.transpose(resampled), changed)
