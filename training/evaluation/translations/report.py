"""The report of a run that translates.

Promises beyond those of every page (see `templates`): examples are picked by rules that stand beside them; a score
never stands without the name of the data, the split and the signature it was computed with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from sacrebleu.metrics import CHRF
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from training.base.files import read_plain
from training.report.examples import EXAMPLES_SEED
from training.report.page import Evaluated

RANKED = 5  # examples of each kind among the best, the typical and the worst


@with_config(ConfigDict(allow_inf_nan=False))
class Beside(TypedDict):
    """What is shown of another run's scores, which may be a stranger's."""

    task: str
    split: str
    part: str
    synthetic: bool
    sentences: int
    step: int
    loss: NotRequired[float]  # an ensemble has none
    data_fingerprint: str
    bleu: float
    bleu_interval: tuple[float, float]
    chrf: float
    chrf_interval: tuple[float, float]


_BESIDE = TypeAdapter(Beside)

SYNTHETIC = "synthetic sample corpus: these scores say nothing about real translation"


@dataclass(frozen=True)
class Example:
    """One row of the part: source, reference, translation, and what to know about the translation ("" if nothing)."""

    source: str
    reference: str
    translation: str
    note: str = ""


def ranked_rows(translations: Sequence[str], references: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """The rows whose translations are the best, the typical and the worst by sentence-level chrF, each with that score.

    Typical is nearest to the median. Of equal ones the longer reference goes first, since it was the harder to meet,
    then the earlier row. No row is among two kinds, so a small part has fewer.
    """
    metric = CHRF()
    chrf = [
        metric.sentence_score(translation, [reference]).score
        for translation, reference in zip(translations, references, strict=True)
    ]
    middle = median(chrf)
    distances = {
        "best": [-value for value in chrf],
        "worst": chrf,
        "typical": [abs(value - middle) for value in chrf],
    }
    picked: dict[str, list[tuple[int, float]]] = {}
    left = set(range(len(chrf)))
    for kind, distance in distances.items():
        keys = {row: (distance[row], -len(references[row]), row) for row in left}
        order = sorted(left, key=keys.__getitem__)
        picked[kind] = [(row, chrf[row]) for row in order[:RANKED]]
        left -= set(order[:RANKED])
    return {kind: picked[kind] for kind in ("best", "typical", "worst")}


def runs_beside(run_dir: Path, label: str, task: str) -> list[tuple[str, Beside]]:
    """Name and scores of what may be compared with this run's evaluation under this label.

    That is its others, and those under the same label of the runs of the same task in the same folder: so the runs of
    one model on both splits find each other. What cannot be read, or says less than this version's scores, is left out.
    """
    found = []
    own = run_dir.resolve()
    others = [path for path in sorted((own / "evaluation").glob("*.json")) if path.stem != label]
    alike = [folder / "evaluation" / f"{label}.json" for folder in sorted(own.parent.iterdir()) if folder != own]
    for path in (*others, *alike):
        with suppress(OSError, ValueError):
            scores = _BESIDE.validate_json(read_plain(path))
            if scores["task"] == task:
                run = path.parent.parent
                found.append((f"{own.name}:{path.stem}" if run == own else run.name, scores))
    return found


def content_of(evaluation: Mapping[str, Any]) -> Evaluated:
    """What the page shows of an evaluation, given these, as JSON has them.

    checkpoint: manifest of the first one evaluated. scores: the object that `evaluate` writes to LABEL.json. languages:
    code, name and direction of writing of source and target. data: meta.json of the data that was scored;
    training_data: that of the data trained on. parameters: of the model. versions: with which it was trained and
    evaluated. examples: of `example_rows`; ranked: pairs of kind and examples, of `ranked_rows`. attention: pairs of
    caption and `Sheet`. beside: of `runs_beside`.
    """
    model = evaluation["checkpoint"]["config"]["model"]
    more = {
        "options": "".join(f", {key} {value}" for key, value in model.items()),
        "synthetic": SYNTHETIC,
        "examples_seed": EXAMPLES_SEED,
        "ranked_rows": RANKED,
    }
    return {"template": "translations", "content": {**evaluation, **more}}
