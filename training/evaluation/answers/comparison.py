"""Compares the answers of two runs with adapters: both to the same questions, after training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.console import UserError, say
from training.evaluation.answers.scores import AnswerComparison, compare_tasks, score_answers


@dataclass(frozen=True)
class AnswerRun:
    """An evaluation of answers as it lies in its run folder. rows: those of LABEL-answers.jsonl."""

    name: str
    rows: list[dict[str, Any]]


def open_answers(name: str, path: Path) -> AnswerRun:
    """The answers in `path`. Raises UserError where they cannot be read."""
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        complete = bool(rows) and all(row.keys() >= {"uid", "task", "reference", "after"} for row in rows)
    except (OSError, ValueError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{path} is missing or damaged: run `python -m training.evaluation.answers {name}` again")
    return AnswerRun(name, rows)


def compare_answer_runs(first: AnswerRun, second: AnswerRun) -> AnswerComparison:
    """Tests the answers after training of two runs. Raises UserError unless both were asked the same questions."""
    asked = [[(row["uid"], row["reference"]) for row in run.rows] for run in (first, second)]
    if asked[0] != asked[1]:
        shared = len(set(asked[0]) & set(asked[1]))
        raise UserError(
            f"{first.name} and {second.name} were not asked the same questions: {len(asked[0]):,} and "
            f"{len(asked[1]):,}, of which {shared:,} are shared. Evaluate both with the same --data, --part and "
            "--answers_per_task"
        )
    tasks, references = [row["task"] for row in first.rows], [row["reference"] for row in first.rows]
    return compare_tasks(
        *(score_answers(tasks, [row["after"] for row in run.rows], references) for run in (first, second))
    )


def print_comparison(first: AnswerRun, second: AnswerRun, compared: AnswerComparison) -> None:
    """A table of the tasks, and of their mean."""
    say(f"{len(first.rows):,} questions; the difference is {second.name} minus {first.name}")
    say(f"\n  {'':<44} {'items':>6} {'first':>8} {'second':>8} {'difference (95 %)':>28} {'p':>6}")
    rows = [(f"{task.after.task} ({task.after.metric})", task.after.items, task.test) for task in compared.tasks]
    for name, items, test in [*rows, ("mean of tasks", len(first.rows), compared.macro)]:
        low, high = test.difference_interval
        difference = f"{test.difference:+.2f} ({low:+.2f} to {high:+.2f})"
        one, other = test.scores
        say(f"  {name:<44} {items:>6,} {one:>8.2f} {other:>8.2f} {difference:>28} {test.p:>6.3f}")
