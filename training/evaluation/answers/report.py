"""The report of a model that answers questions, before and after training; see `page` for what every report promises.

Every text is escaped, the same run gives the same bytes, and examples are picked by rules that stand beside them. A
score never stands without its metric, its interval and the number of its items, and a difference never without p.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.engine.status import Session
from training.evaluation.bootstrap import LEVEL
from training.evaluation.disc_law_eval.overlap import OVERLAP
from training.evaluation.report import training_history as story
from training.evaluation.report.markup import escaped, facts, isolated, wide_table
from training.evaluation.report.page import banner, config, page
from training.evaluation.translations.report import EXAMPLES_SEED

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


@dataclass(frozen=True)
class AnswerReport:
    """Everything that the page shows.

    scores: the object of `AnswerEvaluation.to_json`, which is written to LABEL.json. data: meta.json of the data.
    checkpoint: its manifest. parameters: of the whole model; trained_parameters: of the adapters. questions: held-out
    ones picked beforehand, as one of each task; examples: rows that `report.example_rows` draws. metrics: lines of
    metrics.jsonl. sessions: as sessions.json has them. law_eval: the body of a section on DISC-Law-Eval as HTML, which
    `law_eval_table` and `disc_law_eval.open_questions.side_by_side` make; "" for none.
    """

    name: str
    scores: dict[str, Any]
    data: dict[str, Any]
    checkpoint: dict[str, Any]
    parameters: int
    trained_parameters: int
    questions: Sequence[AnsweredQuestion]
    examples: Sequence[AnsweredQuestion]
    metrics: Sequence[dict[str, Any]]
    sessions: Sequence[Session]
    versions: dict[str, str]
    law_eval: str = ""


def render(report: AnswerReport) -> str:
    """The page."""
    title = f"{report.name}: {report.scores['base_model']} before and after training"
    sections = {
        "Scores": _scores(report.scores),
        "Perplexity": _perplexity(report.scores["losses"]),
        "Before and after": _questions(report.questions),
        "Random examples": _examples(report),
        "DISC-Law-Eval": report.law_eval,
        "Training": story.training(report.metrics, report.sessions),
        "Sessions": story.story(report.sessions, report.checkpoint["config"]["checkpoint"]["every_steps"]),
        "Data": _data(report),
        "Config": config(report.checkpoint["config"]),
        "Versions": facts(report.versions.items()),
    }
    synthetic = report.scores["synthetic"] or report.data.get("synthetic")
    return page(title, (banner(SYNTHETIC) if synthetic else "") + _summary(report), sections)


def _summary(report: AnswerReport) -> str:
    scores = report.scores
    macro, total = scores["macro_average"], scores["losses"][-1]
    before, after = (_with_interval(macro[side], "score", "interval") for side in ("before", "after"))
    tasks = f"{len(scores['tasks'])} tasks"
    perplexity = f"{_perplexity_of(total['before'])} before, {_perplexity_of(total['after'])} after"
    rows = [
        ("mean score", f"{before} before, {after} after: {_verdict(macro, better=1)}"),
        ("perplexity", f"{perplexity}: {_verdict(total, better=-1)}"),
        ("scored on", f"{scores['part']} part, {scores['items']:,} questions of {tasks}; every task weighs the same"),
        ("answered by", f"step {scores['step']:,} ({scores['weights']}), {scores['decoding']}"),
        ("model", f"{scores['base_model']}, {report.parameters:,} parameters, {report.trained_parameters:,} trained"),
    ]
    if report.sessions:
        rows.append(("trained in", story.total_time(report.sessions)))
    return facts(rows) + "\n"


def _verdict(compared: Mapping[str, Any], better: int) -> str:
    """The test in words. better: 1 where more is better, -1 where less is."""
    if compared["p"] >= LEVEL:
        return f"no difference can be told at p < {LEVEL:g} (p = {compared['p']:.3f})"
    return f"{'better' if compared['difference'] * better > 0 else 'worse'} after training, p = {compared['p']:.3f}"


def _scores(scores: Mapping[str, Any]) -> str:
    tasks, macro = scores["tasks"], scores["macro_average"]
    rows: list[Sequence[object]] = [
        (
            task["task"],
            task["metric"],
            task["items"],
            *(_with_interval(task[side], "score", "interval") for side in ("before", "after")),
            *_difference(task, 2),
            *(f"{task['before'][key]:,} / {task['after'][key]:,}" for key in ("exact", "format_errors", "empty")),
        )
        for task in tasks
    ]
    sides = (_with_interval(macro[side], "score", "interval") for side in ("before", "after"))
    rows.append(("mean of the tasks", "", scores["items"], *sides, *_difference(macro, 2), "", "", ""))
    head = ("task", "metric", "items", "before", "after", "difference", "p", "exact", "format errors", "empty")
    metrics: dict[tuple[str, str], list[str]] = {(task["metric"], task["how"]): [] for task in tasks}
    for task in tasks:
        metrics[task["metric"], task["how"]].append(task["task"])
    odd = [f"{task['task']} {task['odd_references']:,}" for task in tasks if task["odd_references"]]
    return (
        _results(head, rows)
        + "<p class=faint>Scores go from 0 to 100; in brackets, where 95 % of them would lie on other questions of the "
        "same kind (bootstrap). p: how often chance alone makes so large a difference, in either direction (two-sided "
        f"paired bootstrap); where there is none, one test in twenty has p below {LEVEL:g}. A task of fewer than about "
        "twenty items has too narrow an interval and too small a p. Exact: answers that say just what the "
        "reference says. Format errors: answers that are not in the form of the task, before / after training; what "
        "could be read in them counts in the score.</p>"
        + facts((f"{name}: {', '.join(own)}", how) for (name, how), own in metrics.items())
        + (f"<p class=faint>References not in the form of their task: {escaped(', '.join(odd))}.</p>" if odd else "")
    )


def _results(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose last row sums it up, each interval below its score where there is no room beside it."""
    return f'<div class="results">{wide_table(head, rows, marked=len(rows) - 1)}</div>'


def _perplexity(losses: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            loss["task"],
            loss["items"],
            loss["tokens"],
            *(_perplexity_of(loss[side]) for side in ("before", "after")),
            *(f"{loss[side]['loss']:.4f}" for side in ("before", "after")),
            *_difference(loss, 4),
        )
        for loss in losses
    ]
    head = ("task", "items", "tokens", "before", "after", "loss before", "after", "difference", "p")
    return _results(head, rows) + (
        "<p class=faint>Perplexity of the reference answers' tokens, the question being given, with intervals of 95 %; "
        "and its logarithm, the loss in nats per token, whose difference is tested. Less is better.</p>"
    )


def _with_interval(values: Mapping[str, Any], key: str, interval: str) -> str:
    low, high = values[interval]
    return f"{values[key]:.2f} {_brackets(low, high, '.2f')}"


def _brackets(low: float, high: float, form: str) -> str:
    """An interval that no line ends within."""
    return f"({low:{form}} to {high:{form}})".replace(" ", "\N{NO-BREAK SPACE}")


def _perplexity_of(values: Mapping[str, Any]) -> str:
    return _with_interval(values, "perplexity", "perplexity_interval")


def _difference(compared: Mapping[str, Any], digits: int) -> tuple[str, str]:
    """The difference with its interval, and p."""
    low, high = compared["difference_interval"]
    form = f"+.{digits}f"
    return f"{compared['difference']:{form}} {_brackets(low, high, form)}", f"{compared['p']:.3f}"


def law_eval_table(scores: Mapping[str, Any]) -> str:
    """Accuracy on DISC-Law-Eval, over all and by exam, as HTML; see `LawAnswers.compared` for the scores."""
    before, after, compared, overlap = (scores[name] for name in ("before", "after", "compared", "overlap"))
    groups = [
        (f"{one['exam']}, {one['kind']} choice", one, other)
        for one, other in zip(before["exams"], after["exams"], strict=True)
    ]
    groups += [(f"all of {kind} choice", before["kinds"][kind], after["kinds"][kind]) for kind in before["kinds"]]
    if overlap and overlap["without"]:
        without = overlap["without"]
        groups.append(("all but those in the training data", without["before"], without["after"]))
    groups.append(("all", before, after))
    rows = [
        (
            name,
            one["items"],
            *(_with_interval(side, "accuracy", "accuracy_interval") for side in (one, other)),
            f"{other['accuracy'] - one['accuracy']:+.2f}",
            f"{one['without_letters']:,} / {other['without_letters']:,}",
        )
        for name, one, other in groups
    ]
    head = ("questions", "items", "before", "after", "difference", "without letters")
    difference, _ = _difference(compared, 2)
    return _results(head, rows) + (
        f"<p>Over all, the difference is {escaped(difference)}: {escaped(_verdict(compared, better=1))}. "
        f"{compared['gained']:,} answers have become right, {compared['lost']:,} wrong.</p><p class=faint>Accuracy in "
        "per cent of all questions; an answer from which no letter can be read is wrong. In brackets, intervals of "
        f"95 %.</p><p>{escaped(about_overlap(scores))}</p>"
    )


def about_overlap(scores: Mapping[str, Any]) -> str:
    """How much of DISC-Law-Eval was in the training data, and what remains without it, in words."""
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
    difference, _ = _difference(compared, 2)
    return f"{said} Without them the difference is {difference}: {_verdict(compared, better=1)}."


def _questions(questions: Sequence[AnsweredQuestion]) -> str:
    if not questions:
        return ""
    names = ("task", "question", "reference", "before", "after")
    body = "".join(
        "<tr>"
        + _cell("", isolated(each.task))
        + _cell("question", _text(each.question))
        + _cell("reference", _text(each.reference))
        + "".join(
            _cell(name, _text(text) + f'<div class="score">{isolated(_about(score, note))}</div>')
            for name, text, score, note in _answers(each)
        )
        + "</tr>"
        for each in questions
    )
    return (
        f"<p class=faint>{len(questions)} held-out questions, chosen before training; the score of each answer is that "
        f"of its task. A long text opens by a click.</p><table class=answers><thead><tr>"
        f"{''.join(f'<th>{name}</th>' for name in names)}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(name: str, content: str) -> str:
    label = f' data-name="{name}"' if name else ""
    return f"<td{label}>{content}</td>"


def _examples(report: AnswerReport) -> str:
    if not report.examples:
        return ""
    rows = f"{len(report.examples)} rows of the {escaped(report.scores['part'])} part"
    return f"<p class=faint>{rows} drawn by a fixed seed ({EXAMPLES_SEED}), not picked by quality.</p>" + "".join(
        map(_example, report.examples)
    )


def _example(each: AnsweredQuestion) -> str:
    answers = "".join(
        f"<dt>{name}</dt><dd>{_text(text)}<span class=faint>({isolated(_about(score, note))})</span></dd>"
        for name, text, score, note in _answers(each)
    )
    return (
        f'<dl class="example"><dt>task</dt><dd>{isolated(each.task)}</dd>'
        f"<dt>question</dt><dd>{_text(each.question)}</dd><dt>reference</dt><dd>{_text(each.reference)}</dd>"
        f"{answers}</dl>"
    )


def _answers(each: AnsweredQuestion) -> Iterable[tuple[str, str, float, str]]:
    return zip(("before", "after"), (each.before, each.after), each.scores, each.notes, strict=True)


def _about(score: float, note: str) -> str:
    return f"score {score:.1f}" + (f"; {note}" if note else "")


def _text(text: str) -> str:
    """A text with its line ends; only the beginning of a long one, until it is opened."""
    if not text.strip():
        return "<div class=faint>(empty)</div>"
    whole = f'<div class="text" lang="zh">{isolated(text)}</div>'
    if len(text) <= FOLDED:
        return whole
    start = f'<span class="start" lang="zh">{isolated(text[:FOLDED])}… </span>'
    return f'<details><summary>{start}<span class="faint">{len(text):,} characters</span></summary>{whole}</details>'


def _data(report: AnswerReport) -> str:
    counts = report.data["counts"]
    tasks = counts["tasks"]
    columns = list(dict.fromkeys(name for count in tasks.values() for name in count))
    rows = [(task, *(count.get(name, 0) for name in columns)) for task, count in tasks.items()]
    rows.append(("all", *(sum(count.get(name, 0) for count in tasks.values()) for name in columns)))
    about = {
        **{key: value for key, value in report.data.items() if key not in DATA_NOT_SHOWN},
        "counts": {key: value for key, value in counts.items() if key not in ("tasks", *columns, "malformed_listed")},
        "fingerprint of the data trained on": report.checkpoint["data"]["fingerprint"],
        **{f"{name} SHA-256": file["sha256"] for name, file in report.checkpoint["files"].items()},
    }
    head = ("task", *(name.replace("_", " ") for name in columns))
    return wide_table(head, rows, marked=len(rows) - 1) + facts(_flat(about))


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
