"""How a run went: its curves, and session by session what became of it, while it is still going on or afterwards.

Everything comes from metrics.jsonl and sessions.json. Either may lack what it did not yet hold, or what a session that
was killed had no time to write down.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from statistics import mean, median
from typing import Any, TypedDict

from training.base.durations import format_duration
from training.engine.goodput import in_words
from training.engine.saver import best_interval, price_of_a_kill
from training.engine.status import Session, badness, measured_in, pace_s, was_cut_short, where_hours_went
from training.engine.surroundings import changes
from training.engine.weights import Ancestor, ancestor
from training.report.curves import Line, curve

_NAMES = {"accuracy": "token accuracy", "bleu": "BLEU", "chrf": "chrF"}
SILENT_INTERVALS = 3  # between two signs of life; after so many the page says that the run was not heard of
SHORTEST_S = 60.0  # of such an interval
_MOST_SCORES = 20
_EXAMPLES_SHOWN = 6  # answers of a sample, of as many validations


def history(record: Mapping[str, Any]) -> dict[str, Any]:
    """What history.html shows of a `run_record`, see `training.report.page`.

    training: figures and curves, None where no step is on record. generated: samples with
    their answers. sessions: each with its `start` in words, whether it was `cut_short`, and what `changed`. total_time,
    goodput: in words, "" without sessions. saves: what checkpoints cost, None where none is known. script: of a page
    that is made anew while it is looked at, else None.
    """
    sessions = record["sessions"]
    before = [None, *sessions]
    starts = [_start(session, earlier) for session, earlier in zip(sessions, before, strict=False)]
    changed = [
        changes(earlier.get("surroundings", {}), session.get("surroundings", {})) if earlier else []
        for session, earlier in zip(sessions, before, strict=False)
    ]
    return {
        "script": "live.js" if record["standing"]["running"] else None,
        "training": _training(record["metrics"], sessions),
        "generated": _generated(record["metrics"]),
        "sessions": [
            {**session, "start": start, "cut_short": was_cut_short(session), "changed": other}
            for session, start, other in zip(sessions, starts, changed, strict=True)
        ],
        "total_time": _total_time(sessions),
        "goodput": in_words(where_hours_went(sessions)),
        "saves": _saves([session for session in sessions if "save_s" in session], record),
    }


class Standing(TypedDict):
    """How a run stands."""

    words: str  # its state and progress
    step: int
    running: bool
    at: float  # when it was last heard of, seconds since 1970
    silent_s: int  # for how long it is nothing unusual to hear nothing of it
    seen: str  # `at` in words
    best: str  # its best validation in words, "" before the first
    began_with: str  # whose weights, "" if new ones


def standing(record: Mapping[str, Any]) -> Standing:
    """How the run of a `run_record` stands, of which this is a part."""
    status, sessions, metrics, config = (record[key] for key in ("status", "sessions", "metrics", "config"))
    state, steps = status.get("status", "not begun"), status.get("steps")
    running = state == "running"
    step = metrics[-1]["step"] if running and metrics else status.get("step", 0)
    pace = pace_s(sessions[-1]) if sessions else None
    words = state if state in ("running", "not begun") else f"{state}: {status['reason']}"
    if steps:
        words += f"; step {step:,} of {steps:,} ({step / steps:.0%})"
    if running and pace is not None and steps:
        words += f", about {format_duration(round((steps - step) * pace))} to go"
    every = [config.get("log", {}).get("validate_every_steps"), record["save_every"]]
    between_s = (pace or 0) * min((steps for steps in every if isinstance(steps, int)), default=0)
    at = max([line["time"] for line in metrics[-1:]] + [each.get("began", 0.0) for each in sessions[-1:]], default=0.0)
    return {
        "words": words,
        "step": step,
        "running": running,
        "at": at,
        "silent_s": round(SILENT_INTERVALS * max(SHORTEST_S, between_s)),
        "seen": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)),
        "best": _best(metrics, config.get("checkpoint", {}).get("best_by", "accuracy")),
        "began_with": _began_with(ancestor(record["checkpoint"])),
    }


def _best(metrics: Sequence[dict[str, Any]], by: str) -> str:
    """The first of the best validations, in words."""
    found = [(line[by], line["step"]) for line in metrics if line["kind"] == "validation" and line.get(by) is not None]
    if not found:
        return ""
    score, step = min(found, key=lambda each: badness(each[0], by))
    return f"{_NAMES.get(by, by)} {score:.4g} at step {step:,}"


def _began_with(origin: Ancestor | None) -> str:
    if origin is None:
        return ""
    steps = ", ".join(f"step {step}" for step in origin["checkpoints"])
    return (
        f"{origin['run']} ({origin.get('weights', 'best')}: {steps})" if steps else f"the adapters in {origin['run']}"
    )


def _generated(metrics: Sequence[dict[str, Any]]) -> list[tuple[dict[str, str], list[tuple[int, str]]]]:
    """Samples, and what was answered to each at the last validations, the newest first."""
    shown: dict[tuple[str, str], tuple[dict[str, str], list[tuple[int, str]]]] = {}
    for line in reversed([line for line in metrics if line.get("examples")][-_EXAMPLES_SHOWN:]):
        for each in line["examples"]:
            _, answers = shown.setdefault((each["source"], each["reference"]), (each, []))
            answers.append((line["step"], each["answer"]))
    return list(shown.values())


def scores_in(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the scores that validations have on record, beside the loss."""
    names = dict.fromkeys(key for line in metrics if line["kind"] == "validation" for key in measured_in(line))
    return [name for name in names if name != "loss"][:_MOST_SCORES]


def _training(metrics: Sequence[dict[str, Any]], sessions: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    train = [line for line in metrics if line["kind"] == "train"]
    if not train:
        return None
    validation = [line for line in metrics if line["kind"] == "validation"]
    marks = [(s["from_step"], f"session {s['number']} begins after step {s['from_step']:,}") for s in sessions[1:]]

    def points(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
        return [(line["step"], nan if line.get(key) is None else line[key]) for line in lines]

    def figures(key: str) -> list[float]:
        return [value for _, value in points(train, key) if isfinite(value)] or [nan]

    def over_steps(about: str, *lines: Line, from_zero: bool = False) -> str:
        return curve(lines, marks, about=f"{about} over steps", until=train[-1]["step"], from_zero=from_zero)

    losses = Line(points(train, "loss"), "faint"), Line(points(validation, "loss"))
    drawn = {key.removeprefix("samples/"): sum(figures(key)) for key in train[-1] if key.startswith("samples/")}
    return {
        "steps": train[-1]["step"],
        "drawn": ", ".join(f"{name} {count:,.0f}" for name, count in drawn.items()),
        "epochs": figures("epoch")[-1],
        "tokens_per_s": median(figures("tokens_per_s")),
        "padding_share": mean(figures("padding_share")),
        "memory_mb": max(figures("memory_mb")),
        "loss": over_steps("training and validation loss", *losses),
        "scores": [
            {"name": _NAMES.get(name, name), "curve": over_steps(name, Line(points(validation, name)))}
            for name in scores_in(metrics)
        ],
        "lr": over_steps("learning rate", Line(points(train, "lr"), "faint"), from_zero=True),
        "throughput": over_steps("throughput", Line(points(train, "tokens_per_s"), "faint"), from_zero=True),
    }


def _start(session: dict[str, Any], before: dict[str, Any] | None) -> str:
    if session["from_step"] == 0:
        return "new" if before is None else "from the beginning"
    older = before is not None and session["from_step"] < before["step"]
    return "resumed, from an older checkpoint" if older else "resumed"


def _total_time(sessions: Sequence[Session]) -> str:
    """Sessions and their time; that of a session which was killed counts up to its last save."""
    if not sessions:
        return ""
    least = "at least " if any(map(was_cut_short, sessions)) else ""
    seconds = sum(session["seconds"] for session in sessions)
    return f"{len(sessions):,} session{'s' * (len(sessions) > 1)}, {least}{format_duration(seconds)} in all"


def _saves(saving: Sequence[dict[str, Any]], record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of sessions with saves: how many, their means, and the price of a kill in words ("" where no pace is known)."""
    if not saving:
        return None
    count = sum(session["saves"] for session in saving)
    stall_s, save_s = (sum(each["saves"] * each[key] for each in saving) / count for key in ("stall_s", "save_s"))
    # A session that was killed may have done more than its record says, in a time that nobody knows.
    steps = sum(session["step"] - session["from_step"] for session in saving)
    seconds = sum(session["seconds"] for session in saving)
    price, every = "", record["save_every"]
    if steps and seconds and every:  # a session may do no more than its last save
        step_s, hours = seconds / steps, record["config"]["checkpoint"]["hours_between_kills"]
        price = price_of_a_kill(
            every, best_interval(step_s, stall_s, save_s, hours, saving[-1]["device"]), step_s, hours
        )
    return {"count": count, "stall_s": stall_s, "save_s": save_s, "price": price}
