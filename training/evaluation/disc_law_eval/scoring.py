"""Which answers to the multiple-choice questions are right, and what that comes to; see the command for the rules.

Accuracies are in per cent of all questions, so an answer without letters is a wrong one. Intervals and p are those of
`bootstrap`: what another choice of questions of the same kind would change.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.base.console import UserError
from training.base.files import write_atomically
from training.evaluation.bootstrap import interval_of, paired, resample, rounded
from training.evaluation.disc_law_eval.letters import letters_of
from training.evaluation.disc_law_eval.questions import KINDS, LETTERS, Question, gold_of, read_table

COLUMNS = ("input", *LETTERS, "multichoice", "model_output", "extract_ans", "correctness")  # of the released files


def score_file(path: Path, objective: Path | None = None) -> dict[str, Any]:
    """file, items and correct of a file of answers. objective: the folder of the questions, unless it is to be found.

    Raises UserError where the file, or that of its questions, is not as expected.
    """
    rows = read_table(path, ("input", "model_output"))
    with_gold = path if "output" in rows[0] else _questions_of(path, objective)
    solved = rows if with_gold == path else read_table(with_gold, ("input", "output"))
    _check_same_questions(path, rows, with_gold, solved)
    gold = [gold_of(row["output"], with_gold, number) for number, row in enumerate(solved, 1)]
    answers = [row["model_output"] for row in rows]
    return {"file": str(path), "items": len(rows), "correct": sum(map(_is_right, answers, gold))}


def _is_right(answer: str, gold: str) -> bool:
    return letters_of(answer) == gold


def _questions_of(path: Path, objective: Path | None) -> Path:
    """The file with the questions of a file of answers, by its name and that of its folder."""
    place = path.resolve()
    kind = next((kind for kind in KINDS if kind.results == place.parent.name), None)
    exam = place.stem.removesuffix("_results")
    if kind is None or exam == place.stem:
        raise UserError(
            f"{path} has no column output with the right letters, and its name does not tell which exam it answers: "
            "call it single/NAME_results.csv or multi/NAME_results.csv, as multi/nje_results.csv, or add that column"
        )
    name = f"mcq_{kind.objective}_{exam}.csv"
    if objective is not None:
        return objective / name
    found = next((file for above in place.parents if (file := above / "objective" / name).is_file()), None)
    if found is None:
        raise UserError(
            f"{path} has no column output with the right letters, and no folder above it has objective/{name}: name "
            "the folder with the questions by --objective FOLDER"
        )
    return found


def _check_same_questions(
    path: Path, rows: Sequence[dict[str, str]], with_gold: Path, solved: Sequence[dict[str, str]]
) -> None:
    mend = "the answers must be to these questions, all of them and in the same order"
    for number, (row, question) in enumerate(zip(rows, solved, strict=False), 1):
        # Programs that save tables have their own ideas of blanks and line ends.
        if row["input"].split() != question["input"].split():
            raise UserError(
                f"{path}, answer {number} is to {_short(row['input'])}, but question {number} of {with_gold} is "
                f"{_short(question['input'])}: {mend}"
            )
    if len(rows) != len(solved):
        raise UserError(f"{path} has {len(rows):,} answers, {with_gold} has {len(solved):,} questions: {mend}")


def _short(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 40 else words[:40] + "…")


def score_answers(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """How many answers are right, over all and by exam and kind, as a JSON object.

    Of all, of each kind and of each exam: items, correct, accuracy (per cent), accuracy_interval (of 95 %), and
    without_letters, the answers that choose nothing. Raises ValueError unless there is one answer per question.
    """
    counts = _counts(questions, answers)
    silent = np.array([not letters_of(answer) for answer in answers])
    kinds = np.array([question.kind for question in questions])
    exams = np.array([question.exam for question in questions])

    def of(chosen: np.ndarray) -> dict[str, Any]:
        own = counts[chosen]
        (resampled,) = resample(_accuracy, own)
        return {
            "items": len(own),
            "correct": int(own[:, 0].sum()),
            "accuracy": round(_accuracy(own.sum(0)), 2),
            "accuracy_interval": rounded(interval_of(resampled), 2),
            "without_letters": int(silent[chosen].sum()),
        }

    return {
        **of(np.full(len(counts), True)),
        "kinds": {kind: of(kinds == kind) for kind in dict.fromkeys(kinds.tolist())},
        "exams": [
            {"exam": exam, "kind": kind, **of((kinds == kind) & (exams == exam))}
            for kind, exam in dict.fromkeys(zip(kinds.tolist(), exams.tolist(), strict=True))
        ],
    }


def compare_sides(questions: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> dict[str, Any]:
    """before and after, each as `score_answers` makes it, and compared, which `compare_answers` makes of them."""
    return {
        "before": score_answers(questions, before),
        "after": score_answers(questions, after),
        "compared": compare_answers(questions, before, after),
    }


def compare_answers(questions: Sequence[Question], first: Sequence[str], second: Sequence[str]) -> dict[str, Any]:
    """Whether `second` answers are better than `first` ones: a two-sided paired bootstrap of the overall accuracy.

    difference: of the second minus the first, in per cent of all questions; difference_interval, of 95 %; p, how often
    chance alone makes one as large in either direction; gained and lost: questions that only the second, and only the
    first, has right. Raises ValueError as `score_answers` does.
    """
    before, after = (_counts(questions, answers) for answers in (first, second))
    test = paired(_accuracy, before, after)
    return {
        "difference": round(test.difference, 2),
        "difference_interval": rounded(test.difference_interval, 2),
        "p": round(test.p, 3),
        "gained": int((after[:, 0] > before[:, 0]).sum()),
        "lost": int((after[:, 0] < before[:, 0]).sum()),
    }


def _counts(questions: Sequence[Question], answers: Sequence[str]) -> np.ndarray:
    """Of each answer whether it is right, and 1: the numbers of right ones and of all are their sums. [n, 2]"""
    if len(questions) != len(answers) or not questions:
        raise ValueError(f"{len(answers)} answers to {len(questions)} questions")
    pairs = zip(questions, answers, strict=True)
    return np.array([(_is_right(answer, question.gold), 1) for question, answer in pairs], dtype=np.float64)


def _accuracy(summed_counts: np.ndarray) -> float:
    right, all_of_them = summed_counts
    return float(100 * right / all_of_them)


def write_results(folder: Path, questions: Sequence[Question], answers: Sequence[str]) -> list[Path]:
    """Writes answers in the form of the released ones: single/NAME_results.csv and multi/NAME_results.csv in `folder`.

    Each file is written whole or not at all; returns them all. `score --objective` reads them, if all questions of an
    exam are among `questions`, in their order. Raises OSError (see `training.base.files.writing_to`), and ValueError
    unless there is one answer per question.
    """
    if len(questions) != len(answers):
        raise ValueError(f"{len(answers)} answers to {len(questions)} questions")
    tables: dict[Path, list[tuple[object, ...]]] = {}
    names = {kind.name: kind.results for kind in KINDS}
    for question, answer in zip(questions, answers, strict=True):
        path = folder / names[question.kind] / f"{question.exam.lower()}_results.csv"
        verdict = letters_of(answer), int(_is_right(answer, question.gold))
        row = question.text, *question.options, question.kind == "multiple", answer, *verdict
        tables.setdefault(path, [COLUMNS]).append(row)
    for path, rows in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        # What UTF-8 cannot write must not cost the hours that the answers took.
        write_atomically(path, text.getvalue().encode("utf-8", "replace"))
    return list(tables)
