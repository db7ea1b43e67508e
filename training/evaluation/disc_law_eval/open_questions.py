"""The open questions of DISC-Law-Eval, and answers to them side by side: read by people, scored by no one here.

Promises as the report's: no scripts, nothing fetched from elsewhere, every text escaped, the same answers give the same
bytes. Every question that is given is shown, in its order; none is picked by its answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.base.console import UserError
from training.report.templates import page


@dataclass(frozen=True)
class OpenQuestion:
    """A question with an answer in words."""

    number: int  # its id in the file
    text: str
    reference: str  # the answer that the benchmark gives


@dataclass(frozen=True)
class ModelAnswers:
    """What one model says to all questions."""

    name: str  # stands over the answers, as "before: Qwen2.5-3B-Instruct"
    texts: Sequence[str]


def open_questions(folder: Path) -> list[OpenQuestion]:
    """All open questions of the benchmark in `folder`. Raises UserError unless the file is as released."""
    path = folder / "subjective" / "qa_short_answer.json"
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
        questions = [OpenQuestion(record["id"], record["input"], record["output"]) for record in records]
        as_released = bool(questions) and all(
            (type(each.number), type(each.text), type(each.reference)) == (int, str, str) for each in questions
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a folder of DISC-Law-Eval") from error
    except (ValueError, KeyError, TypeError):
        as_released = False
    if not as_released or len({each.number for each in questions}) < len(questions):
        raise UserError(
            f"{path} is not a list of questions with input, output and an id of their own: get it again from the "
            "release of DISC-Law-Eval"
        )
    return questions


def render(title: str, questions: Sequence[OpenQuestion], answers: Sequence[ModelAnswers], about: str = "") -> str:
    """A page with every question, its reference answer and each model's, side by side where there is room.

    about: how the answers were made. Raises ValueError unless every model has one answer per question.
    """
    for each in answers:
        if len(each.texts) != len(questions):
            raise ValueError(f"{len(each.texts)} answers by {each.name} to {len(questions)} questions")
    data = {"title": title, "questions": questions, "answers": answers, "about": about, "sections": {}}
    return page("open_questions.html", data)
