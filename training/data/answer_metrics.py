"""How near one generated answer comes to its reference: a metric for each form that answers have.

Every metric gives counts per answer, and a score from 0 to 100 of any choice of answers is a function of their sum.
An answer is read leniently, since a model that says the right label in a sentence knows it; that it is not in the form
that was asked for is told beside the score. Leniency ends where one would have to guess: several labels where one is
due, or two answers that contradict each other, are wrong. A reader by patterns does not understand a denial
("not A"), so the more an answer talks, the less its score means.

Every pattern reads a text once, however it is made: what a run has taken is not given back (*+), and no run is begun in
its middle.

An answer that says exactly what its reference says gets the full score by every metric, whatever the reference is: one
that is not in the form of its task is compared as text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.data.text import nfkc

Counts = tuple[float, float] | tuple[float, float, float]


@dataclass(frozen=True)
class Item:
    """One answer: what the metric counts in it, and what is to be known of it beside that."""

    counts: Counts
    exact: bool  # it says exactly what the reference says
    in_form: bool = True  # it has the form of the task
    reference_in_form: bool = True  # so does the reference itself


@dataclass(frozen=True)
class Metric:
    """A way to score the answers of a task."""

    name: str
    words: str  # how it is computed
    items: Callable[[Sequence[str], Sequence[str]], list[Item]]  # of all answers and their references together
    score: Callable[[np.ndarray], float]  # 0 to 100 from summed counts


def mean(summed_counts: np.ndarray) -> float:
    """Of counts (value from 0 to 1, 1 for the item): the mean in percent."""
    return 100 * float(summed_counts[0] / summed_counts[1])


def f1(summed_counts: np.ndarray) -> float:
    """Of counts (right ones, those said, those wanted): F1 in percent, 100 where nothing was wanted or said."""
    right, said, wanted = summed_counts
    return 200 * float(right / (said + wanted)) if said + wanted else 100.0


# Marks without width among the blanks: models and web pages leave them behind.
_BLANK = re.compile("[\\s\u200b-\u200f\u2060\ufeff]+")


def plain(text: str) -> str:
    """Full-width forms as half-width ones (NFKC), lower case, without blanks: what makes no difference here."""
    return _BLANK.sub("", nfkc(text)).lower()


def _words_only(text: str) -> str:
    """`plain` without punctuation and symbols."""
    return "".join(sign for sign in plain(text) if unicodedata.category(sign)[0] not in "PS")


# Characters of a text that ROUGE-L compares: some 50 times what an answer has. The time grows as their square.
_MOST_COMPARED = 50_000


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004), F1 from 0 to 1, on characters, since nothing parts Chinese words; see `plain`.

    Of a longer text its first 50,000 characters.
    """
    one, other = plain(answer)[:_MOST_COMPARED], plain(reference)[:_MOST_COMPARED]
    if not one or not other:
        return float(one == other)
    return 2 * common_subsequence(one, other) / (len(one) + len(other))


def common_subsequence(one: str, other: str) -> int:
    """The length of the longest common subsequence, exact; two texts of 2,000 characters take about a millisecond.

    Bit-parallel (Hyyrö 2004): a whole row of the usual table is one integer, whose zeros are where the length grows.
    """
    places: dict[str, int] = {}
    for place, sign in enumerate(one):
        places[sign] = places.get(sign, 0) | 1 << place
    all_ones = row = (1 << len(one)) - 1
    for sign in other:
        matches = row & places.get(sign, 0)
        row = (row + matches | row - matches) & all_ones
    return len(one) - row.bit_count()


def _free_text(answers: Sequence[str], references: Sequence[str]) -> list[Item]:
    return [
        Item((rouge_l(answer, reference), 1), plain(answer) == plain(reference), bool(plain(answer)))
        for answer, reference in zip(answers, references, strict=True)
    ]


def _spans(answers: Sequence[str], references: Sequence[str]) -> list[Item]:
    return [_span(answer, reference) for answer, reference in zip(answers, references, strict=True)]


def _span(answer: str, reference: str) -> Item:
    said, wanted = Counter(_words_only(answer)), Counter(_words_only(reference))
    exact = _words_only(answer) == _words_only(reference)
    total = said.total() + wanted.total()
    value = 2 * (said & wanted).total() / total if total else float(exact)
    return Item((value, 1), exact, bool(plain(answer)))


# Longer ones, and those with punctuation or blanks within, are sentences in which a label may be named.
_LONGEST_LABEL = 12


def _single_labels(answers: Sequence[str], references: Sequence[str]) -> list[Item]:
    labels = {_label(reference) for reference in references}
    return [_single(answer, reference, labels) for answer, reference in zip(answers, references, strict=True)]


def _single(answer: str, reference: str, labels: set[str]) -> Item:
    said, in_form = _label(answer), True
    if said not in labels and not (0 < len(said) <= _LONGEST_LABEL and said == _words_only(answer)):
        in_form = False
        named = named_labels(answer, labels)
        said = named[0] if len(named) == 1 else said
    right = said == _label(reference)
    return Item((float(right), 1), right, in_form)


def _label(text: str) -> str:
    return plain(text).strip("'\"“”‘’「」『』《》【】()[]。.,;:!")


def named_labels(text: str, labels: set[str]) -> list[str]:
    """Those of `labels` that `text` names, each once; one within the name of another does not count as named."""
    left, found = plain(text), []
    for label in sorted(labels - {""}, key=lambda label: (-len(label), label)):
        if label in left:
            found.append(label)
            left = left.replace(label, "\n")
    return found


_LABEL_LIST = re.compile(r"\s*+标签[:：]\s*+(?:'[^']*'(?:\s*+[,，、]\s*+'[^']*')*+\s*+)?")
_QUOTED = re.compile("['\"“‘「]([^'\"“”‘’「」]+)['\"”’」]")


def _label_sets(answers: Sequence[str], references: Sequence[str]) -> list[Item]:
    wanted = [_labels(reference, set()) for reference in references]
    known = set().union(*wanted)
    items = []
    for answer, reference, labels in zip(answers, references, wanted, strict=True):
        said = _labels(answer, known)
        counts = float(len(said & labels)), float(len(said)), float(len(labels))
        items.append(
            Item(counts, said == labels, bool(_LABEL_LIST.fullmatch(answer)), bool(_LABEL_LIST.fullmatch(reference)))
        )
    return items


def _labels(text: str, known: set[str]) -> set[str]:
    """The labels in quotes behind 标签：; else what is listed there without quotes; else the known labels it names."""
    _, heading, rest = re.sub("标签[:：]", "标签:", text).rpartition("标签:")
    found = _QUOTED.findall(rest)
    if not found and heading:
        found = re.split("[,，、;；。\n]", rest)
    if not found:
        found = named_labels(text, known) or ([] if known else [text])
    return {_label(label) for label in found} - {""}


# The letters of options, one or several of a multiple-choice question.
_BETWEEN = r"\s,、和及与"
_RUN = rf"([A-F](?:[{_BETWEEN}]*[A-F])*)(?![A-Za-z])"
_WHOLE_RUN = rf"(?<![A-F{_BETWEEN}])[{_BETWEEN}]*+([A-F](?:[{_BETWEEN}]*+[A-F])*+)(?![A-Za-z])"
_OPENING = re.compile(rf"\s*{_RUN}\s*(?:[.:,;、。)]|$)")
_NEXT_OPTION = re.compile(r"([A-F])\s*[.、:]")
_EXPLANATION = re.compile(r"(?<!\s)[^\S\n]*+\n\s*+[【\[(]?(?:解析|解释|推理|分析|理由)")
_CHOSEN = re.compile(
    rf"(?:答案|(?<!不)正确的?选项|(?<!不)正确的|[^项不]选|选择)(?:应该?)?[是为选]?(?:选项)?[:\s\"'“【(]*{_RUN}"
    rf"|{_WHOLE_RUN}(?:选?项)?[都是为]*正确"
)


def _letters(answers: Sequence[str], references: Sequence[str]) -> list[Item]:
    return [_as_read(options_chosen, *pair) for pair in zip(answers, references, strict=True)]


def options_chosen(text: str) -> tuple[frozenset[str], bool]:
    """The letters of the options that an answer chooses, and whether it begins with them, as it should ("B. …").

    Several may stand at the start (AC), or on lines of their own up to the explanation. If an answer begins otherwise,
    the last letters count that it calls right or says to choose, else the only letter that it has.
    """
    text = nfkc(text)
    stated = _EXPLANATION.split(text.strip(), maxsplit=1)[0]
    if opening := _OPENING.match(stated):
        letters = set(re.findall("[A-F]", opening[1]))
        for line in stated[opening.end() :].splitlines()[1:]:
            option = _NEXT_OPTION.match(line)
            if option is None:
                break
            letters.add(option[1])
        return frozenset(letters), True
    if chosen := _CHOSEN.findall(f" {text}"):
        return frozenset(re.findall("[A-F]", "".join(chosen[-1]))), False
    letters = set(re.findall("(?<![A-Za-z])[A-F](?![A-Za-z])", text))
    return frozenset(letters if len(letters) == 1 else ()), False


_CASE = re.compile(r"LABEL['\"]?\s*[:=]\s*['\"]?(?:案例)?([BC])(?![A-Za-z_])", re.IGNORECASE)
_NEARER = re.compile(r"(?:接近|相似|类似|相近|符合|匹配)(?:于|的?[是为]|:)*\s*+(?:案例\s*+)?['\"“]?([BC])(?![A-Za-z_])")


def _cases(answers: Sequence[str], references: Sequence[str]) -> list[Item]:
    return [_as_read(nearer_case, *pair) for pair in zip(answers, references, strict=True)]


def nearer_case(text: str) -> tuple[str | None, bool]:
    """B or C, the case that an answer finds nearer to A, and whether the answer is nothing but JSON: {"LABEL": "C"}.

    Otherwise the LABEL within the answer counts, else the case that is called near, else the only one of the two
    letters in it. None where these contradict each other, or there is none.
    """
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict) and answer.keys() == {"LABEL"} and answer["LABEL"] in ("B", "C"):
        return answer["LABEL"], True
    text = nfkc(text)
    for pattern in (_CASE, _NEARER, re.compile("(?<![A-Za-z_])[BC](?![A-Za-z_])")):
        if found := {letter.upper() for letter in pattern.findall(text)}:
            return (found.pop() if len(found) == 1 else None), False
    return None, False


def _as_read(read: Callable[[str], tuple[object, bool]], answer: str, reference: str) -> Item:
    """Right or wrong by what `read` finds in both; as text where it finds nothing in the reference."""
    (said, in_form), (wanted, reference_in_form) = read(answer), read(reference)
    right = said == wanted if wanted else plain(answer) == plain(reference)
    return Item((float(right), 1), right, in_form, reference_in_form)


_TAG = r"(?:[BIS]-[A-Za-z_]+|[OS])"
_TAGS = re.compile(rf"\s*{_TAG}(?:\s+{_TAG})*\s*")
_ANY_TAG = re.compile(rf"(?<![A-Za-z_-]){_TAG}(?![A-Za-z_-])")

Entity = tuple[str, int, int]  # its kind, and its places from the first up to and without the last


def _tags(answers: Sequence[str], references: Sequence[str]) -> list[Item]:
    items = []
    for answer, reference in zip(answers, references, strict=True):
        said, wanted = _ANY_TAG.findall(answer), _ANY_TAG.findall(reference)
        if not wanted:
            right = plain(answer) == plain(reference)
            items.append(Item((float(right), 1, 1), right, False, False))
            continue
        found, expected = entities(said), entities(wanted)
        counts = float(len(found & expected)), float(len(found)), float(len(expected))
        in_form = bool(_TAGS.fullmatch(answer)) and len(said) == len(wanted)
        items.append(Item(counts, said == wanted, in_form, bool(_TAGS.fullmatch(reference))))
    return items


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of BIO tags, S being one of a single place, with a kind or without.

    As conlleval has it, an I that continues nothing, or something of another kind, begins an entity.
    """
    found: set[Entity] = set()
    kind, start = "", -1  # of the entity that is open; none below 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-")
        if start >= 0 and not (mark == "I" and own == kind):
            found.add((kind, start, place))
            start = -1
        if mark == "S":
            found.add((own, place, place + 1))
        elif mark != "O" and start < 0:
            kind, start = own, place
    return found


ROUGE_L = Metric("ROUGE-L", "F1 of the longest common subsequence of characters, mean of all answers", _free_text, mean)
SPAN_F1 = Metric("span F1", "F1 of the characters, without punctuation, mean of all answers", _spans, mean)
LABEL = Metric("accuracy", "answers with the label of the reference", _single_labels, mean)
LABEL_F1 = Metric("label F1", "F1 of the labels of all answers together", _label_sets, f1)
LETTERS = Metric("accuracy", "answers with exactly the letters of the reference", _letters, mean)
CASE = Metric("accuracy", "answers that name the case of the reference", _cases, mean)
ENTITY_F1 = Metric("entity F1", "F1 of kind and place of the tagged entities of all answers together", _tags, f1)

# By the names that prepared data has for the tasks (data_prep.disc_law). Most are the prefix of a record's id, as in
# leg_case_cls-17. The two sets of questions share one, legal_question_answering_N, so the file tells them apart: the
# plain name is Pair-QA, that with _reference is Triplet-QA, whose questions come with their statutes. The judgements of
# Triplet are spelt judgement_predit- there.
TASKS = {
    "jud_read_compre": SPAN_F1,
    "leg_ele_extra": ENTITY_F1,
    "leg_eve_detec": LABEL_F1,
    "exam": LETTERS,
    "leg_case_cls": LABEL,
    "sent_pred": ROUGE_L,
    "jud_doc_sum": ROUGE_L,
    "sim_case_match": CASE,
    "op_sum": ROUGE_L,
    "legal_question_answering": ROUGE_L,
    "legal_question_answering_reference": ROUGE_L,
    "judgement_predict": ROUGE_L,
}


def metric_of(task: str) -> Metric:
    """The metric of a task; ROUGE-L for one that is not in TASKS."""
    return TASKS.get(task, ROUGE_L)


def rows_by_task(tasks: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each task, in the order of TASKS; those that it lacks follow by name."""
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        rows.setdefault(task, []).append(row)
    places = {task: place for place, task in enumerate(TASKS)}
    return {task: rows[task] for task in sorted(rows, key=lambda task: (places.get(task, len(TASKS)), task))}


def mean_of_tasks(tasks: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> float:
    """The mean of the tasks' scores, 0 to 100: each weighs the same, however many answers it has."""
    scores = []
    for task, rows in rows_by_task(tasks).items():
        metric = metric_of(task)
        items = metric.items([answers[row] for row in rows], [references[row] for row in rows])
        scores.append(metric.score(np.sum([item.counts for item in items], 0)))
    return float(np.mean(scores))
