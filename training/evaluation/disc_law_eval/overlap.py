"""Which questions of DISC-Law-Eval stand in the training data: a model may know their answers by heart.

Parts of DISC-Law-SFT were made from the same bar examinations, and not its task `exam` alone: some records of other
tasks ask whether one option of an exam question is right. A score on the benchmark is worth what the score on the other
questions is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from training.data.text import nfkc
from training.evaluation.bootstrap import verdict
from training.evaluation.disc_law_eval.questions import Question

# Characters in a row, punctuation and blanks aside. A law's name and "which of the following is right" have fewer.
OVERLAP = 20

_NOT_COMPARED = re.compile(r"[\W_]+")


def overlapping(questions: Sequence[Question], texts: Iterable[str]) -> np.ndarray:
    """Whether a text shares OVERLAP characters in a row with a question or with one of its options, [questions].

    It rather finds too many than too few: a statute that both quote counts. All of DISC-Law-SFT takes two minutes.
    """
    places: defaultdict[str, set[int]] = defaultdict(set)
    for place, question in enumerate(questions):
        for own in (question.text, *question.options):
            for run in _runs(own):
                places[run].add(place)
    found = np.zeros(len(questions), dtype=bool)
    for text in texts:
        for run in _runs(text):
            if run in places:
                found[list(places[run])] = True
    return found


def _runs(text: str) -> Iterable[str]:
    """All pieces of OVERLAP characters."""
    compared = _NOT_COMPARED.sub("", nfkc(text))
    return (compared[start : start + OVERLAP] for start in range(len(compared) - OVERLAP + 1))


def about_overlap(scores: Mapping[str, Any]) -> str:
    """How much of DISC-Law-Eval was in the training data, and what remains without it, in words.

    scores: of `LawAnswers.compared`.
    """
    overlap = scores["overlap"]
    if overlap is None:
        return (
            "Whether the training data holds any of these questions was not looked at, since other data was scored: "
            "without --data it is."
        )
    said = (
        f"{overlap['questions']:,} of the {scores['after']['items']:,} questions share {OVERLAP} characters in a row "
        "or more with the training data."
    )
    if overlap["without"] is None:
        return said
    compared = overlap["without"]["compared"]
    low, high = compared["difference_interval"]
    difference = f"{compared['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
    return f"{said} Without them the difference is {difference}: {verdict(compared, better=1)}."
