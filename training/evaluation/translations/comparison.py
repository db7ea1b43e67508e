"""Compares two evaluations of the same sentences by a two-sided paired bootstrap (Koehn 2004) of BLEU and chrF.

p is how often the choice of the sentences alone makes a difference as large as this one, in either direction.
sacrebleu's own p counts one direction only, so it is about half of this one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from training.base.console import UserError, say
from training.base.files import read_json, read_plain
from training.data.languages import Language, language_of
from training.data.prepared import PARTS
from training.data.translation_metrics import bleu_of
from training.evaluation.bootstrap import Paired, better_of, paired
from training.evaluation.setting import Setting
from training.evaluation.translations.scores import score_of, sentence_counts, signature_of


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as it lies in its run folder. rows: those of LABEL-translations.jsonl."""

    name: str
    scores: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def language(self) -> Language:
        """That of the translations."""
        return language_of(self.scores["languages"]["target"])

    @property
    def translations(self) -> list[str]:
        return [row["translation"] for row in self.rows]

    @property
    def references(self) -> list[str]:
        return [row["reference"] for row in self.rows]


@dataclass(frozen=True)
class Verdict(Paired):
    """What the test says of one metric."""

    metric: str
    signature: str

    def words(self, names: Sequence[str]) -> str:
        """The verdict as a sentence."""
        return better_of(self.metric, names, self.difference, self.p)


def open_evaluation(name: str, folder: Path, label: str) -> Evaluation:
    """The evaluation called `label` of a run. Raises UserError, with the command to run, when there is none.

    name: what it is called in messages.
    """
    setting = Setting.of_label(label)
    done = sorted(path.stem for path in (folder / "evaluation").glob("*.json"))
    found = f"; there is {', '.join(done)}" if done else ""
    if setting is None:
        raise UserError(
            f"{label!r} is no label of an evaluation: it begins with {', '.join(PARTS)}, as in test-beam5{found}"
        )
    scores, translations = (folder / "evaluation" / f"{label}{end}" for end in (".json", "-translations.jsonl"))
    for path in (scores, translations):
        if not path.is_file():
            raise UserError(f"{folder} was not evaluated as {label}: run `{setting.command(folder)}`{found}")
    try:
        about = read_json(scores)
        # As bytes: a text may hold what Python takes for a line end in strings.
        rows = [json.loads(line) for line in read_plain(translations, 1 << 30).splitlines()]
        evaluation = Evaluation(name, about, rows)
        parts = [row["row"] for row in rows], evaluation.references, evaluation.translations
        complete = {len(part) for part in parts} == {about["sentences"]} and {
            "part",
            "split",
            "languages",
        } <= about.keys()
        complete &= all(isinstance(text, str) for texts in parts[1:] for text in texts)
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"{scores} and {translations.name} are damaged: run `{setting.command(folder)}` again")
    return evaluation


def compare(first: Evaluation, second: Evaluation) -> list[Verdict]:
    """Tests BLEU and chrF. Raises UserError, naming what differs, unless both have the same rows and references."""
    check_comparable(first, second)
    references = [[reference] for reference in first.references]
    verdicts = []
    for name, metric in _metrics(first).items():
        counts, others = (sentence_counts(metric, one.translations, references) for one in (first, second))
        test = paired(partial(score_of, metric), counts, others)
        verdicts.append(Verdict(**vars(test), metric=name, signature=signature_of(metric)))
    return verdicts


def scores_of(one: Evaluation) -> dict[str, float]:
    """BLEU and chrF of an evaluation."""
    references = [[reference] for reference in one.references]
    return {
        name: score_of(metric, sentence_counts(metric, one.translations, references).sum(0))
        for name, metric in _metrics(one).items()
    }


def _metrics(one: Evaluation) -> dict[str, BLEU | CHRF]:
    return {"BLEU": bleu_of(one.language), "chrF": CHRF()}


def check_comparable(first: Evaluation, second: Evaluation) -> None:
    """Raises UserError, naming what differs, unless both have the same rows and references."""
    if [(row["row"], row["reference"]) for row in first.rows] == [
        (row["row"], row["reference"]) for row in second.rows
    ]:
        return
    differences = [
        f"{key} {first.scores[key]} and {second.scores[key]}"
        for key in ("part", "split", "sentences")
        if first.scores[key] != second.scores[key]
    ]
    for one, other in zip(first.rows, second.rows, strict=False):
        if (one["row"], one["reference"]) != (other["row"], other["reference"]):
            differences.append(
                f"first, row {one['row']} ({one['reference']!r}) and row {other['row']} ({other['reference']!r})"
            )
            break
    mend = "Evaluate both on one data set (--data FOLDER) and part"
    if first.scores["split"] != second.scores["split"]:
        mend = "Two splits have other sentences to train on and to be scored on: no test compares runs across them"
    raise UserError(
        f"{first.name} and {second.name} were not scored on the same rows with the same references: "
        f"{'; '.join(differences)}. {mend}"
    )


def print_comparison(first: Evaluation, second: Evaluation, verdicts: Sequence[Verdict]) -> None:
    """Scores, intervals, differences, and last the verdicts as sentences."""
    names = first.name, second.name
    width = max(map(len, (*names, "difference")))
    say(f"{first.scores['part']} part, {first.scores['split']} split, {len(first.rows):,} sentences")
    for verdict in verdicts:
        say(f"\n  {verdict.metric:<{width}}   score   95 % interval")
        for name, score, (low, high) in zip(names, verdict.scores, verdict.intervals, strict=True):
            say(f"  {name:<{width}}  {score:6.2f}   {low:.2f} to {high:.2f}")
        low, high = verdict.difference_interval
        say(f"  {'difference':<{width}}  {verdict.difference:+6.2f}   {low:+.2f} to {high:+.2f}, p = {verdict.p:.3f}")
        say(f"  {verdict.signature}")
    same = sum(one == other for one, other in zip(first.translations, second.translations, strict=True))
    say(f"\n{same:,} of {len(first.rows):,} translations are identical ({same / len(first.rows):.1%})")
    for verdict in verdicts:
        say(verdict.words(names))
