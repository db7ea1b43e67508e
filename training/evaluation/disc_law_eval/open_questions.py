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
from training.evaluation.report.markup import isolated
from training.evaluation.report.page import page


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


def side_by_side(questions: Sequence[OpenQuestion], answers: Sequence[ModelAnswers], about: str = "") -> str:
    """Every question with its reference answer and each model's, as the body of a section of HTML.

    Next to each other where there is room, one below the other where there is not. about: how the answers were made.
    Raises ValueError unless every model has one answer per question.
    """
    for each in answers:
        if len(each.texts) != len(questions):
            raise ValueError(f"{len(each.texts)} answers by {each.name} to {len(questions)} questions")
    words = f"{len(questions):,} open questions of DISC-Law-Eval with its reference answers"
    made = f" Answers: {isolated(about)}." if about else ""
    rows = zip(questions, *(each.texts for each in answers), strict=True)
    names = [each.name for each in answers]
    return f"<p class=faint>{words}.{made} They are here to be read; no score is made of them.</p>\n" + "\n".join(
        _question(question, names, texts) for question, *texts in rows
    )


def _question(question: OpenQuestion, names: Sequence[str], texts: Sequence[str]) -> str:
    columns = zip(("reference", *names), (question.reference, *texts), strict=True)
    place = f"open-{question.number}"
    return (
        f'<article class="open" id="{place}"><h3><a href="#{place}">{question.number}</a></h3>'
        f'<div class="text" lang="zh">{_text(question.text)}</div><dl class="beside">'
        + "".join(
            f'<div><dt>{isolated(name)}</dt><dd class="text" lang="zh">{_text(text)}</dd></div>'
            for name, text in columns
        )
        + "</dl></article>"
    )


def _text(text: str) -> str:
    return isolated(text.strip()) if text.strip() else '<span class="faint" lang="en">(no answer)</span>'


def render(title: str, questions: Sequence[OpenQuestion], answers: Sequence[ModelAnswers], about: str = "") -> str:
    """`side_by_side` as a page of its own."""
    return page(title, side_by_side(questions, answers, about), {})
