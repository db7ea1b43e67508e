"""The multiple-choice questions of DISC-Law-Eval, and how a model is asked them.

A folder of the benchmark holds objective/ (the questions, with their letters), few_shot/ (solved samples) and
subjective/ (the open questions, see `open_questions`). What is read is checked: a file that is not as released is a
UserError that says what to do, never a question less.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.base.console import UserError

LETTERS = "ABCD"
SHOTS = 4


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of questions."""

    name: str
    objective: str  # its word in the names of files of questions
    results: str  # the name of a folder of answers
    chinese: str  # its word in the prompt
    exams: tuple[str, ...]


KINDS = (
    Kind("single", "sing", "single", "单项", ("NJE", "PAE", "CPA", "UNGEE", "LBK", "PFE")),
    Kind("multiple", "mult", "multi", "多项", ("NJE", "PAE", "CPA", "UNGEE")),
)


@dataclass(frozen=True)
class Question:
    """A multiple-choice question."""

    kind: str  # single or multiple
    exam: str  # as NJE
    number: int  # its place in its file, from 1
    text: str  # as it stands in the file
    options: tuple[str, str, str, str]  # of A to D
    gold: str  # the right letters, in order


@dataclass(frozen=True)
class Sample:
    """A solved question for the prompt, with its options in its text."""

    question: str
    answer: str


def load_questions(folder: Path) -> list[Question]:
    """The questions of the benchmark in `folder`, by kind and exam. Raises UserError unless files are as released."""
    questions = []
    for kind in KINDS:
        for exam in kind.exams:
            path = folder / "objective" / f"mcq_{kind.objective}_{exam.lower()}.csv"
            for number, row in enumerate(read_table(path, ("input", "output", *LETTERS)), 1):
                a, b, c, d = (row[letter] for letter in LETTERS)
                gold = gold_of(row["output"], path, number)
                questions.append(Question(kind.name, exam, number, row["input"], (a, b, c, d), gold))
    return questions


def load_samples(folder: Path) -> dict[str, list[Sample]]:
    """The solved samples of the benchmark in `folder`, by kind. Raises UserError where there are too few."""
    samples = {}
    for kind in KINDS:
        path = folder / "few_shot" / f"mcq_{kind.objective}_examples.csv"
        samples[kind.name] = [Sample(row["input"], row["output"]) for row in read_table(path, ("input", "output"))]
        if len(samples[kind.name]) < SHOTS:
            raise UserError(f"{path} has {len(samples[kind.name])} samples, the prompt takes {SHOTS}: {_GET_IT_AGAIN}")
    return samples


def four_shot_prompt(question: Question, examples: Mapping[str, Sequence[Sample]]) -> str:
    """What the model is to continue with its answer: what to do, four solved samples, the question.

    examples: of `load_samples`; the first four of the question's kind are taken.
    """
    (kind,) = (kind for kind in KINDS if kind.name == question.kind)
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True))
    shown = [
        f"以下是一道{kind.chinese}选择题，不需要做任何分析和解释，直接输出答案选项。",
        *(_asked(sample.question, sample.answer) for sample in examples[question.kind][:SHOTS]),
        _asked(f"{question.text.strip()}\n{options}", ""),
    ]
    return "\n\n".join(shown)


def _asked(question: str, answer: str) -> str:
    return f"问题：{question.strip()}\n答案：{answer.strip()}"


_GET_IT_AGAIN = "get it again from the release of DISC-Law-Eval"


def gold_of(cell: str, path: Path, number: int) -> str:
    """The right letters as row `number` of `path` has them, in order. Raises UserError unless they are from A to D."""
    letters = cell.strip()
    if not letters or not set(letters) <= set(LETTERS):
        raise UserError(
            f"{path}, question {number}: the column output has {letters!r} where letters from A to D should stand: "
            + _GET_IT_AGAIN
        )
    return "".join(sorted(set(letters)))


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file in UTF-8 that has at least these columns, and at least one row; else a UserError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            head = next(lines, [])
            rows = []
            for row in filter(None, lines):
                if len(row) != len(head):
                    raise UserError(
                        f"{path}, line {lines.line_num}: {len(row)} cells under {len(head)} column names: a text with "
                        "commas or line ends must stand in quotes; write the file again"
                    )
                rows.append(dict(zip(head, row, strict=True)))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: check the path") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a CSV file that can be read") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path} is no CSV file, line {lines.line_num}: {error}; write it again") from error
    missing = ", ".join(name for name in columns if name not in head)
    if missing:
        found = ", ".join(head) or "nothing"
        raise UserError(f"{path} has no column {missing}; its first line has {found}: name a file with these columns")
    twice = ", ".join(name for name in dict.fromkeys(head) if name and head.count(name) > 1)
    if twice:
        raise UserError(f"{path} has the column {twice} twice: leave one of them")
    if not rows:
        raise UserError(f"{path} has column names but no row under them: name a file with answers or questions")
    return rows
