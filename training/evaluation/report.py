"""The report of a run: one self-contained HTML page, readable on a phone, in dark and in light.

Promises: no scripts, nothing fetched from elsewhere, every text escaped; examples picked before anyone saw how good
they are; a score never stands without the name of the data, the split and the signature it was computed with.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean, median
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure

from training.evaluation.attention_maps import STYLE, to_svg

EXAMPLES = 12
EXAMPLES_SEED = 1234

SYNTHETIC = "synthetic sample corpus: these scores say nothing about real translation"

CSS = """
:root { color-scheme: light dark; --ink: #1d2327; --ground: #fff; --faint: #5f6b75; --line: #d5dbe0; --tint: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8eb; --ground: #15191c; --faint: #9aa6b0; --line: #343c43; --tint: #1f252a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; } .faint { color: var(--faint); }
.banner { background: #b3261e; color: #fff; padding: .75rem 1rem; border-radius: .4rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; }
pre { background: var(--tint); padding: .75rem; border-radius: .4rem; overflow-x: auto; white-space: pre; }
figure { margin: .75rem 0; padding: .5rem; background: #fff; color: #000; border: 1px solid var(--line);
  border-radius: .4rem; overflow-x: auto; }
figure.whole svg { width: 100%; height: auto; } figure figcaption { position: sticky; left: 0; font-size: .9rem; }
dl.example { border-bottom: 1px solid var(--line); margin: 0; padding: .5rem 0; display: grid;
  grid-template-columns: 6.5rem 1fr; gap: .1rem .6rem; }
dl.example dt { color: var(--faint); } dl.example dd { margin: 0; }
@media (max-width: 30rem) { dl.example { grid-template-columns: 1fr; } dl.example dd { margin-bottom: .3rem; } }
"""


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

    part: train, validation or test. scores: the object that `evaluate` writes to PART.json. data: meta.json of the data
    that was scored; training_data: that of the data trained on. metrics: lines of metrics.jsonl. attention: pairs of
    caption and SVG. checkpoint: its manifest.
    """

    name: str
    part: str
    scores: dict[str, Any]
    data: dict[str, Any]
    training_data: dict[str, Any]
    checkpoint: dict[str, Any]
    metrics: Sequence[dict[str, Any]]
    examples: Sequence[Example]
    attention: Sequence[tuple[str, str]]
    versions: dict[str, str]


def example_rows(count: int) -> list[int]:
    """Which of `count` rows are shown: the same for every model, so that runs can be compared row by row."""
    return random.Random(EXAMPLES_SEED).sample(range(count), min(EXAMPLES, count))


def render(report: Report) -> str:
    """The page."""
    title = f"{report.name}: {report.checkpoint['task']}, Chinese to English"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _summary(report),
        _banner(report),
        _section("Scores", _scores(report)),
        _section("Training", _training(report)),
        _section("Examples", _examples(report)),
        _section("Attention", _attention(report)),
        _section("Data", _data(report)),
        _section("Config", f"<pre>{escape(_yaml(report.checkpoint['config']))}</pre>"),
        _section("Versions", _table(report.versions.items())),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in sections if part)
        + "\n</body>\n</html>\n"
    )


def loss_curve(metrics: Sequence[dict[str, Any]]) -> str:
    """SVG of training and validation loss over steps."""
    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        for kind, style in (
            ("train", {"linewidth": 1, "color": "0.6"}),
            ("validation", {"marker": ".", "color": "C0"}),
        ):
            lines = [line for line in metrics if line["kind"] == kind]
            axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=kind, **style)
        axes.set_xlabel("step")
        axes.set_ylabel("loss per token (nats)")
        axes.grid(color="0.9")
        axes.legend(frameon=False)
        return to_svg(figure)


def _summary(report: Report) -> str:
    scores = report.scores
    return (
        f"<p>BLEU <strong>{scores['bleu']:.2f}</strong>, chrF <strong>{scores['chrf']:.2f}</strong> on the "
        f"{escape(report.part)} part ({scores['sentences']:,} sentences) of the {escape(_split(report))} split, "
        f"checkpoint of step {report.checkpoint['step']:,}.</p>"
    )


def _banner(report: Report) -> str:
    synthetic = report.data["synthetic"] or report.training_data["synthetic"]
    return f'<p class="banner">{escape(SYNTHETIC)}</p>' if synthetic else ""


def _split(report: Report) -> str:
    return str(report.data["options"]["split"])


def _scores(report: Report) -> str:
    scores = report.scores
    count = scores["sentences"]
    rows = [
        ("BLEU", f"{scores['bleu']:.2f}", scores["bleu_signature"]),
        ("chrF", f"{scores['chrf']:.2f}", scores["chrf_signature"]),
        (
            "BLEU, normalised",
            f"{scores['bleu_normalised']:.2f}",
            scores["bleu_normalised_signature"] + "; only for comparison with scores on word tokens",
        ),
        ("exact matches", f"{scores['exact_matches']:,}", f"of {count:,}, as they stand"),
        (
            "exact matches, normalised",
            f"{scores['exact_matches_normalised']:,}",
            f"of {count:,}, in lower case without punctuation",
        ),
        ("loss", f"{scores['loss']:.4f}", "nats per target token, the reference being given up to there"),
        ("token accuracy", f"{scores['accuracy']:.2%}", "of target tokens, the reference being given up to there"),
        ("cut off", f"{scores['cut_off']:,}", "translations that reached the length limit without an end"),
        ("not translated", f"{scores['not_translated']:,}", "sources too long for the model; scored as empty"),
    ]
    body = "".join(
        f'<tr><th>{escape(name)}</th><td class="number">{escape(value)}</td><td class="faint">{escape(how)}</td></tr>'
        for name, value, how in rows
    )
    leakage = report.data["leakage"].get(report.part)  # the training part has none
    words = f"{report.part} part, {_split(report)} split" + (f": {leakage['words']}" if leakage else "")
    return f"<table>{body}</table><p>{escape(words)}.</p>"


def _training(report: Report) -> str:
    train = [line for line in report.metrics if line["kind"] == "train"]
    if not train:
        return "<p>metrics.jsonl has no training steps.</p>"
    facts = [
        ("steps", f"{train[-1]['step']:,}"),
        ("epochs", f"{train[-1]['epoch']:.2f}"),
        ("throughput", f"{median(line['tokens_per_s'] for line in train):,.0f} tokens/s (median; padding not counted)"),
        ("padding share", f"{mean(line['padding_share'] for line in train):.2%}"),
        ("memory", f"{max(line['memory_mb'] for line in train):,.0f} MB at most"),
    ]
    about = (
        '<p class="faint">The training loss is the objective itself, with dropout, label smoothing and, where it has a '
        "weight, the source side; the validation loss is that of plain target tokens.</p>"
    )
    return f'<figure class="whole">{loss_curve(report.metrics)}</figure>{about}{_table(facts)}'


def _examples(report: Report) -> str:
    rows = "".join(
        '<dl class="example">'
        f'<dt>source</dt><dd lang="zh">{escape(example.source)}</dd>'
        f'<dt>reference</dt><dd lang="en">{escape(example.reference)}</dd>'
        f'<dt>translation</dt><dd lang="en">{escape(example.translation)}'
        + (f' <span class="faint">({escape(example.note)})</span>' if example.note else "")
        + "</dd></dl>"
        for example in report.examples
    )
    return (
        f'<p class="faint">{len(report.examples)} rows of the {escape(report.part)} part drawn by a fixed seed '
        f"({EXAMPLES_SEED}), not picked by quality.</p>{rows}"
    )


def _attention(report: Report) -> str:
    if not report.attention:
        return "<p>No example is short enough for a readable map.</p>"
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{_own_ids(svg, f'attention-{number}-')}</figure>"
        for number, (caption, svg) in enumerate(report.attention, 1)
    )
    return (
        '<p class="faint">A row is the position that looks, a column what it looks at; darker is more. The grey lines '
        f"part the source, with &lt;sep&gt;, from the translation.</p>{figures}"
    )


def _data(report: Report) -> str:
    data, manifest = report.data, report.checkpoint
    facts = [
        ("source", f"{data['source']['place']} ({data['source']['bytes']:,} bytes)"),
        ("licence", data["source"]["licence"]),
        ("source SHA-256", data["source"]["sha256"]),
        ("split", _split(report)),
        *((f"{part} rows", f"{rows:,}") for part, rows in data["rows"].items()),
        *((f"leakage, {part}", leakage["words"]) for part, leakage in data["leakage"].items()),
        ("tokenizer", f"{data['tokenizer']['kind']}, {data['tokenizer']['vocabularies']} vocabularies"),
        ("source tokenizer SHA-256", data["tokenizer"]["source"]["sha256"]),
        ("target tokenizer SHA-256", data["tokenizer"]["target"]["sha256"]),
        ("fingerprint, scored data", data["fingerprint"]),
        ("fingerprint, training data", manifest["data"]["fingerprint"]),
        *((f"{name} SHA-256", about["sha256"]) for name, about in manifest["files"].items()),
    ]
    return _table(facts)


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _own_ids(svg: str, prefix: str) -> str:
    """`svg` with its ids prefixed: on one page, the ids of several figures would be taken for each other's."""
    # Within tags only, which hold no < or > but their own: a token may read like an id.
    return re.sub(r"<[^<>]*>", lambda tag: re.sub(r'( id="|url\(#|href="#)', rf"\1{prefix}", tag[0]), svg)
