"""The report of a run: one self-contained HTML page, readable on a phone, in dark and in light.

Promises: no scripts, nothing fetched from elsewhere, every text escaped; the same run gives the same bytes; examples
picked by rules that stand beside them; a score never stands without the name of the data, the split and the signature
it was computed with.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sacrebleu.metrics import CHRF

from training.engine.status import Session
from training.evaluation.report import training_history as story
from training.evaluation.report.markup import escaped, facts, isolated, wide_table
from training.evaluation.report.page import banner, config, page
from training.evaluation.translations.scores import with_interval

EXAMPLES = 12
EXAMPLES_SEED = 1234
RANKED = 5  # examples of each kind among the best, the typical and the worst

# What is shown of another run's scores.
BESIDE = {
    *("task", "split", "part", "synthetic", "sentences", "step", "loss", "data_fingerprint"),
    *("bleu", "bleu_interval", "chrf", "chrf_interval"),
}

SYNTHETIC = "synthetic sample corpus: these scores say nothing about real translation"


@dataclass(frozen=True)
class Example:
    """One row of the part: source, reference, translation, and what to know about the translation ("" if nothing)."""

    source: str
    reference: str
    translation: str
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    scores: the object that `evaluate` writes to LABEL.json. data: meta.json of the data that was scored; training_data:
    that of the data trained on. checkpoint: its manifest. parameters: of the model. metrics: lines of metrics.jsonl.
    sessions: as sessions.json has them. examples: of `example_rows`; ranked: of `ranked_rows`, by kind. attention:
    pairs of caption and SVG. beside: of `runs_beside`.
    """

    name: str
    scores: dict[str, Any]
    data: dict[str, Any]
    training_data: dict[str, Any]
    checkpoint: dict[str, Any]
    parameters: int
    metrics: Sequence[dict[str, Any]]
    sessions: Sequence[Session]
    examples: Sequence[Example]
    ranked: Sequence[tuple[str, Sequence[Example]]]
    attention: Sequence[tuple[str, str]]
    beside: Sequence[tuple[str, dict[str, Any]]]
    versions: dict[str, str]


def example_rows(count: int) -> list[int]:
    """Which of `count` rows are shown: the same for every model, so that runs can be compared row by row."""
    return random.Random(EXAMPLES_SEED).sample(range(count), min(EXAMPLES, count))


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


def runs_beside(run_dir: Path, label: str, task: str) -> list[tuple[str, dict[str, Any]]]:
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
            scores = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(scores, dict) and scores.keys() >= BESIDE and scores["task"] == task:
                run = path.parent.parent
                found.append((f"{own.name}:{path.stem}" if run == own else run.name, scores))
    return found


def render(report: Report) -> str:
    """The page."""
    title = f"{report.name}: {report.checkpoint['task']}, Chinese to English"
    sections = {
        "Scores": _scores(report),
        "Beside other evaluations": _beside(report),
        "Training": story.training(report.metrics, report.sessions),
        "Sessions": story.story(report.sessions, report.checkpoint["config"]["checkpoint"]["every_steps"]),
        "Examples": _examples(report),
        "Attention": _attention(report),
        "Data": _data(report),
        "Config": config(report.checkpoint["config"]),
        "Versions": facts(report.versions.items()),
    }
    return page(title, _banner(report) + _summary(report), sections)


def _banner(report: Report) -> str:
    synthetic = report.data["synthetic"] or report.training_data["synthetic"]
    return banner(SYNTHETIC) if synthetic else ""


def _summary(report: Report) -> str:
    scores, config = report.scores, report.checkpoint["config"]
    rows = [
        ("BLEU", with_interval(scores, "bleu")),
        ("chrF", with_interval(scores, "chrf")),
        ("scored on", f"{scores['part']} part of the {scores['split']} split, {scores['sentences']:,} sentences"),
        ("translated by", f"step {scores['step']:,} ({scores['weights']}), {scores['search']}"),
        ("model", ", ".join((f"{report.parameters:,} parameters", *(f"{k} {v}" for k, v in config["model"].items())))),
    ]
    if report.sessions:
        rows.append(("trained in", story.total_time(report.sessions)))
    return facts(rows) + "\n"


def _scores(report: Report) -> str:
    scores, several = report.scores, report.scores["all_references"]
    count = f"of {scores['sentences']:,}"
    known = f"{several['references']:,} references"
    words = f"{several['sentences']:,} distinct sources with {known}, each against all of its own"
    given = "the reference being given up to there"
    rows = [
        ("BLEU", with_interval(scores, "bleu"), scores["bleu_signature"]),
        ("chrF", with_interval(scores, "chrf"), scores["chrf_signature"]),
        (
            "BLEU, normalised",
            with_interval(scores, "bleu_normalised"),
            f"{scores['bleu_normalised_signature']}; only for comparison with scores on word tokens",
        ),
        ("BLEU, all references", with_interval(several, "bleu"), f"{several['bleu_signature']}; {words}"),
        ("chrF, all references", with_interval(several, "chrf"), f"{several['chrf_signature']}; {words}"),
        ("exact matches", f"{scores['exact_matches']:,}", f"{count}, as they stand"),
        ("exact, normalised", f"{scores['exact_matches_normalised']:,}", f"{count}, in lower case without punctuation"),
        ("loss", f"{scores['loss']:.4f}", f"nats per target token, {given}"),
        ("token accuracy", f"{scores['accuracy']:.2%}", f"of {scores['target_tokens']:,} target tokens, {given}"),
        ("left out of these", f"{scores['unscored_pairs']:,}", "too long for the model: not in loss and accuracy"),
        ("not translated", f"{scores['not_translated']:,}", "sources too long for the model; scored as empty"),
        ("empty", f"{scores['empty']:,}", "translations without a single word"),
        ("cut off", f"{scores['cut_off']:,}", "translations that reached the length limit without an end"),
        ("<unk>", f"{scores['translations_with_unknown_words']:,}", "translations with words that the model lacks"),
        ("<unk> in sources", f"{scores['sources_with_unknown_words']:,}", "sources with such words"),
    ]
    body = "".join(
        f"<tr><th>{isolated(name)}</th><td class=number>{isolated(value)}</td><td class=faint>{isolated(how)}</td></tr>"
        for name, value, how in rows
    )
    leakage = report.data["leakage"].get(scores["part"])  # the training part has none
    about = f"{scores['part']} part, {scores['split']} split" + (f": {leakage['words']}" if leakage else "")
    return (
        f"<table class=scores>{body}</table><p>{isolated(about)}.</p><p class=faint>In brackets, where 95 % of the "
        "scores on other sentences of the same kind would lie (bootstrap).</p>" + _by_kind(scores)
    )


def _by_kind(scores: dict[str, Any]) -> str:
    groups = [(f"source of {group['source_tokens']} tokens", group) for group in scores["by_length"]]
    unknown = ""
    if scores["by_seen"] is None:
        unknown = "<p class=faint>The data trained on was not at hand: what was seen in training is not known.</p>"
    else:
        names = {"seen": "a side seen in training", "unseen": "neither side seen in training"}
        groups += [(names[name], group) for name, group in scores["by_seen"].items()]
    rows = [
        (name, group["sentences"], *("-" if group[key] is None else group[key] for key in ("bleu", "chrf")))
        for name, group in groups
    ]
    return f"<h3>By kind of sentence</h3>{wide_table(('', 'sentences', 'BLEU', 'chrF'), rows)}{unknown}"


def _beside(report: Report) -> str:
    if not report.beside:
        return ""
    rows = [
        (
            name,
            scores["split"],
            scores["part"],
            with_interval(scores, "bleu"),
            with_interval(scores, "chrf"),
            f"{scores['loss']:.4f}",
            scores["sentences"],
            ("the same" if scores["data_fingerprint"] == report.scores["data_fingerprint"] else "other")
            + (", synthetic" if scores["synthetic"] else ""),
            scores["step"],
        )
        for name, scores in [(report.name, report.scores), *report.beside]
    ]
    head = ("run", "split", "part", "BLEU", "chrF", "loss", "sentences", "data", "step")
    return wide_table(head, rows, marked=0) + (
        '<p class="faint">The first row is what this page shows; the others are further evaluations of this run, and '
        "those runs beside it that were evaluated likewise. Scores on another part or other data are scores on other "
        "sentences: a difference between them is not one between the models alone.</p>"
    )


def _examples(report: Report) -> str:
    drawn = (
        f"<p class=faint>{len(report.examples)} rows of the {escaped(report.scores['part'])} part drawn by a fixed "
        f"seed ({EXAMPLES_SEED}), not picked by quality.</p>{''.join(map(_example, report.examples))}"
    )
    ranked = "".join(
        f"<h3>{escaped(kind.capitalize())}</h3>{''.join(map(_example, examples))}"
        for kind, examples in report.ranked
        if examples
    )
    return (
        f"<h3>Random</h3>{drawn}<p class=faint>What follows is picked by quality: the {RANKED} rows with the highest "
        "sentence-level chrF, those nearest to the median, and those with the lowest; of equal ones, those with longer "
        f"references.</p>{ranked}"
    )


def _example(example: Example) -> str:
    note = f" <span class=faint>({isolated(example.note)})</span>" if example.note else ""
    return (
        '<dl class="example">'
        f'<dt>source</dt><dd lang="zh">{isolated(example.source)}</dd>'
        f'<dt>reference</dt><dd lang="en">{isolated(example.reference)}</dd>'
        f'<dt>translation</dt><dd lang="en">{isolated(example.translation)}{note}</dd></dl>'
    )


def _attention(report: Report) -> str:
    if not report.attention:
        return "<p>No map: the model has no attention, or none of the random examples is short enough.</p>"
    figures = "".join(
        f"<figure class=map><figcaption>{isolated(caption)}</figcaption>{svg}</figure>"
        for caption, svg in report.attention
    )
    return (
        "<p class=faint>A row is the position that looks, a column what it looks at; stronger is more. Where a map "
        "shows source and translation in one, lines part the source, with &lt;sep&gt;, from the translation.</p>"
        + figures
    )


def _data(report: Report) -> str:
    data, manifest = report.data, report.checkpoint
    return facts(
        (
            ("source", f"{data['source']['place']} ({data['source']['bytes']:,} bytes)"),
            ("licence", data["source"]["licence"]),
            ("source SHA-256", data["source"]["sha256"]),
            ("split", report.scores["split"]),
            *((f"{part} rows", f"{rows:,}") for part, rows in data["rows"].items()),
            *((f"leakage, {part}", leakage["words"]) for part, leakage in data["leakage"].items()),
            ("tokenizer", f"{data['tokenizer']['kind']}, {data['tokenizer']['vocabularies']} vocabularies"),
            ("source tokenizer SHA-256", data["tokenizer"]["source"]["sha256"]),
            ("target tokenizer SHA-256", data["tokenizer"]["target"]["sha256"]),
            ("fingerprint, scored data", data["fingerprint"]),
            ("fingerprint, training data", manifest["data"]["fingerprint"]),
            *((f"{name} SHA-256", about["sha256"]) for name, about in manifest["files"].items()),
        )
    )
