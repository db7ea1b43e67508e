"""DISC-Law-Eval put to a model: its multiple-choice questions, four-shot, and its open ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.base.console import warn
from training.data.chat import ChatTokenizer, user
from training.engine.cluster import Cluster
from training.evaluation.chat_model.adapters import TrainedAdapters
from training.evaluation.chat_model.answering import answers_to
from training.evaluation.disc_law_eval.open_questions import ModelAnswers, OpenQuestion, open_questions, render
from training.evaluation.disc_law_eval.questions import Question, four_shot_prompt, load_questions, load_samples
from training.evaluation.disc_law_eval.scoring import compare_sides, write_results

# A model that was shown four answers of a letter or two needs no more; one that explains is read from its beginning.
MAX_LETTER_TOKENS = 64


@dataclass(frozen=True)
class LawAnswers:
    """One model's answers to both kinds of questions."""

    questions: list[Question]
    answers: list[str]
    open_questions: list[OpenQuestion]
    open_answers: list[str]
    too_long: int  # questions that did not fit the model's context and stay unanswered

    def write(self, folder: Path) -> None:
        """Writes the answers to the multiple-choice questions in the released form; raises OSError."""
        write_results(folder, self.questions, self.answers)

    def compared(self, after: LawAnswers, overlap: np.ndarray | None) -> tuple[dict[str, Any], str]:
        """The scores as a JSON object, and the page of the open questions.

        overlap: which questions the training data holds, [n] as `overlapping` finds them; None where that is not known.
        The scores are before, after, compared, too_long; and overlap: None, or questions, how many these are, and
        without, which holds before, after and compared of the others (None where all or none of them overlap).
        """
        sides = self.answers, after.answers
        scores = {**compare_sides(self.questions, *sides), "too_long": self.too_long, "overlap": None}
        if overlap is not None:
            others = np.flatnonzero(~overlap).tolist()
            questions = [self.questions[place] for place in others]
            before, now = ([side[place] for place in others] for side in sides)
            without = compare_sides(questions, before, now) if 0 < len(others) < len(overlap) else None
            scores["overlap"] = {"questions": int(overlap.sum()), "without": without}
        texts = [ModelAnswers("before", self.open_answers), ModelAnswers("after", after.open_answers)]
        return scores, render("DISC-Law-Eval, open questions", self.open_questions, texts, "greedy")


@dataclass(frozen=True)
class LawQuestions:
    """What is asked."""

    tokenizer: ChatTokenizer  # in whose form
    questions: list[Question]
    prompts: list[str]  # of `questions`, with four solved samples each
    open_questions: list[OpenQuestion]


def load_law_questions(tokenizer: ChatTokenizer, folder: Path, limit: int | None) -> LawQuestions:
    """The questions in `folder`, the first `limit` of each exam, None for all; raises UserError if not as released."""
    samples = load_samples(folder)
    questions = _first(load_questions(folder), limit)
    prompts = [four_shot_prompt(each, samples) for each in questions]
    return LawQuestions(tokenizer, questions, prompts, open_questions(folder)[: limit or None])


def ask_law_eval(
    trained: TrainedAdapters, asked: LawQuestions, max_new_tokens: int, cluster: Cluster, label: str
) -> LawAnswers:
    """Puts the questions to the model as it is now; every rank answers its share."""
    tokenizer = asked.tokenizer
    config = trained.model.model.get_base_model().config.get_text_config()

    def ask(texts: Sequence[str], most: int, what: str) -> tuple[list[str], int]:
        prompts = tokenizer.encode([tokenizer.prompt([user(text)]) for text in texts])
        room = config.max_position_embeddings - most
        fitting = [place for place, prompt in enumerate(prompts) if len(prompt) <= room]
        too_long = len(prompts) - len(fitting)
        if too_long:
            warn(f"{what}: {too_long:,} of {len(prompts):,} do not fit the model's context and stay unanswered")
        given = answers_to(trained, [prompts[place] for place in fitting], most, cluster, f"{what} {label}")
        answers = [""] * len(prompts)
        for place, each in zip(fitting, given, strict=True):
            answers[place] = tokenizer.decode(each.ids)
        return answers, too_long

    letters, too_long = ask(asked.prompts, MAX_LETTER_TOKENS, "multiple choice")
    texts, too_long_open = ask([each.text for each in asked.open_questions], max_new_tokens, "open questions")
    return LawAnswers(asked.questions, letters, asked.open_questions, texts, too_long + too_long_open)


def _first(questions: Sequence[Question], limit: int | None) -> list[Question]:
    taken: dict[tuple[str, str], int] = {}
    chosen = []
    for question in questions:
        group = question.kind, question.exam
        taken[group] = taken.get(group, 0) + 1
        if limit is None or taken[group] <= limit:
            chosen.append(question)
    return chosen
