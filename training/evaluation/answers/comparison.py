"""Compares the answers of two chat models after training: both to the same questions, task by task and in the mean."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from training.base.console import UserError, say
from training.evaluation.answers.scores import AnswerComparison, TaskScore, compare_tasks, score_answers

ENDING = "-answers.jsonl"  # behind the label, of the file


@dataclass(frozen=True)
class AnswerRun:
    """An evaluation of answers as it lies in its run folder. rows: those of LABEL-answers.jsonl."""

    name: str
    rows: list[dict[str, Any]]


def open_evaluation(name: str, run_dir: Path, label: str) -> AnswerRun:
    """The answers called `label` of a run. Raises UserError where there are none or they cannot be read.

    name: what the run is called in messages.
    """
    path = run_dir / "evaluation" / f"{label}{ENDING}"
    evaluate = f"`python -m training.evaluation.evaluate {shlex.quote(str(run_dir))}`"
    command = f"{evaluate} and the options that {label} stands for"
    if not path.is_file():
        labels = sorted(each.name.removesuffix(ENDING) for each in path.parent.glob(f"*{ENDING}"))
        found = f"; there is {', '.join(labels)}" if labels else ""
        raise UserError(
            f"{run_dir} has no answers called {label}{found}: name one as {run_dir}:LABEL, or make them with {command}"
        )
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        texts = [row[key] for row in rows for key in ("uid", "task", "reference", "after")]
        complete = bool(rows) and all(isinstance(text, str) for text in texts)
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"{path} is damaged: make it again with {command}")
    return AnswerRun(name, rows)


def compare(first: AnswerRun, second: AnswerRun) -> AnswerComparison:
    """Tests the answers after training of two runs. Raises UserError unless both were asked the same questions."""
    check_comparable(first, second)
    return compare_tasks(_after(first), _after(second))


def scores_of(run: AnswerRun) -> dict[str, float]:
    """The score of each task after training, 0 to 100, and their mean."""
    scores = {f"{task} ({score.metric.name})": score.value for task, score in _after(run).items()}
    return {**scores, "mean of tasks": mean(scores.values())}


def _after(run: AnswerRun) -> dict[str, TaskScore]:
    columns = ([row[key] for row in run.rows] for key in ("task", "after", "reference"))
    return score_answers(*columns)


def check_comparable(first: AnswerRun, second: AnswerRun) -> None:
    """Raises UserError unless both runs were asked the same questions."""
    asked = [[(row["uid"], row["reference"]) for row in run.rows] for run in (first, second)]
    if asked[0] != asked[1]:
        shared = len(set(asked[0]) & set(asked[1]))
        raise UserError(
            f"{first.name} and {second.name} were not asked the same questions: {len(asked[0]):,} and "
            f"{len(asked[1]):,}, of which {shared:,} are shared. Evaluate both with the same --data, --part and "
            "--answers_per_task"
        )


def print_comparison(first: AnswerRun, second: AnswerRun, compared: AnswerComparison) -> None:
    """A table of the tasks, and of their mean."""
    say(f"{len(first.rows):,} questions; the difference is {second.name} minus {first.name}\n")
    say_head("first", "second")
    for task in compared.tasks:
        say_row(
            f"{task.after.task} ({task.after.metric.name})", task.after.items, task.test.scores, task.test.to_json(2)
        )
    say_row("mean of tasks", len(first.rows), compared.macro.scores, compared.macro.to_json(2))


def say_head(first: str, second: str) -> None:
    """The head of a table of `say_row`."""
    say(f"  {'':<44} {'items':>6} {first:>8} {second:>8} {'difference (95 %)':>28} {'p':>6}")


def say_row(name: str, items: int, scores: Sequence[float], compared: Mapping[str, Any], *, digits: int = 2) -> None:
    """Two scores on the same items, and what `Paired.to_json` says of them."""
    low, high = compared["difference_interval"]
    difference = f"{compared['difference']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    first, second = (f"{score:.{digits}f}" for score in scores)
    say(f"  {name:<44} {items:>6,} {first:>8} {second:>8} {difference:>28} {compared['p']:>6.3f}")
