"""The report of a model that answers questions, before and after training.

Promises beyond those of every page (see `templates`): examples are picked by rules that stand beside them; a score
never stands without its metric, its interval and the number of its items, and a difference never without p.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.evaluation.bootstrap import LEVEL, verdict
from training.evaluation.disc_law_eval.overlap import about_overlap
from training.report.examples import EXAMPLES_SEED
from training.report.page import Evaluated

SYNTHETIC = "made-up sample data: these scores say nothing about real legal questions"
DATA_NOT_SHOWN = {"files", "lengths", "questions", "tasks", "versions"}  # of meta.json
FOLDED = 160  # characters; a longer text shows so many until it is opened


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question of a task with its reference and both answers; scores: before and after, of this item alone.

    notes: what to know about each answer ("" if nothing), as that it was cut off at the length limit.
    """

    task: str
    question: str
    reference: str
    before: str
    after: str
    scores: tuple[float, float]
    notes: tuple[str, str] = ("", "")


def content_of(evaluation: Mapping[str, Any]) -> Evaluated:
    """What the page shows of an evaluation, given these, as JSON has them.

    checkpoint: manifest of the first one evaluated. scores: the object that is written to LABEL.json, see
    `before_after.scores_of`. data: meta.json of the data. parameters: of the whole model; trained_parameters: of the
    adapters. versions: with which it was trained and evaluated. questions: held-out ones picked beforehand, as one of
    each task; examples: rows that `example_rows` draws. law_eval: the scores of `LawAnswers.compared`, with
    open_questions, how many these are, and the name of their page; None if it was not asked.
    """
    scores, law_eval = evaluation["scores"], evaluation["law_eval"]
    measures: dict[tuple[str, str], list[str]] = {}
    for task in scores["tasks"]:
        measures.setdefault((task["metric"], task["how"]), []).append(task["task"])
    more = {
        **_data(evaluation["data"], evaluation["checkpoint"]),
        "measures": [(metric, how, tasks) for (metric, how), tasks in measures.items()],
        "verdicts": {
            "score": verdict(scores["macro_average"], better=1),
            "perplexity": verdict(scores["losses"][-1], better=-1),
            "law_eval": law_eval and verdict(law_eval["compared"], better=1),
        },
        "about_overlap": law_eval and about_overlap(law_eval),
        "synthetic": SYNTHETIC,
        "level": LEVEL,
        "folded": FOLDED,
        "examples_seed": EXAMPLES_SEED,
    }
    return {"template": "answers", "content": {**evaluation, **more}}


def _data(data: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """counts: a table of the rows of each task, the last one of all. facts: pairs of a name and what is known."""
    tasks = data["counts"]["tasks"]
    columns = list(dict.fromkeys(name for count in tasks.values() for name in count))
    rows = [(task, *(count.get(name, 0) for name in columns)) for task, count in tasks.items()]
    rows.append(("all", *(sum(count.get(name, 0) for count in tasks.values()) for name in columns)))
    in_table = {"tasks", *columns, "malformed_listed"}
    about = {
        **{key: value for key, value in data.items() if key not in DATA_NOT_SHOWN},
        "counts": {key: value for key, value in data["counts"].items() if key not in in_table},
        "fingerprint of the data trained on": manifest["data"]["fingerprint"],
        **{f"{name} SHA-256": file["sha256"] for name, file in manifest["files"].items()},
    }
    head = ("task", *(name.replace("_", " ") for name in columns))
    return {"counts": {"head": head, "rows": rows}, "facts": _flat(about)}


def _flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """What is known of the data, one fact a row: names within names are joined by commas, a file of a list is one."""
    if isinstance(value, Mapping):
        found = [_flat(item, f"{name}, {key}" if name else str(key)) for key, item in value.items()]
        return [fact for facts_of_one in found for fact in facts_of_one]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [
            (f"{name} {number}", "; ".join(f"{key} {shown}" for key, shown in _flat(item)))
            for number, item in enumerate(value, 1)
        ]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)))] if value else []
    large = isinstance(value, int) and value >= 10_000  # a seed or a length is not split
    return [(name.replace("_", " "), f"{value:,}" if large else str(value))]
