"""How a run went: its curves, and session by session what became of it, while it is still going on or afterwards.

Everything comes from metrics.jsonl and sessions.json. Either may lack what it did not yet hold, or what a session that
was killed had no time to write down.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from math import isfinite, nan
from pathlib import Path
from statistics import mean, median
from typing import Any

from training.base.durations import format_duration
from training.engine.goodput import in_words
from training.engine.metrics import read_metrics
from training.engine.saver import price_of_a_kill
from training.engine.status import Session, read_sessions, was_cut_short, where_hours_went
from training.evaluation.report.curves import Line, curve


def run_record(run_dir: Path, manifest: Mapping[str, Any], libraries: Iterable[str]) -> dict[str, Any]:
    """What every page about a run is made of, as the run's folder has it now.

    name: the folder's. checkpoint: `manifest`, of one of its checkpoints. metrics: lines of metrics.jsonl. sessions: as
    sessions.json has them. versions: of Python and libraries, in training and, of these `libraries`, here.
    """
    return {
        "name": run_dir.resolve().name,
        "checkpoint": manifest,
        "metrics": read_metrics(run_dir),
        "sessions": read_sessions(run_dir),
        "versions": {
            **{f"{name}, training": found for name, found in manifest["versions"].items()},
            **{f"{name}, evaluation": version(name) for name in libraries},
            "python, evaluation": platform.python_version(),
        },
    }


def history(record: Mapping[str, Any]) -> dict[str, Any]:
    """What history.html shows of a `run_record`.

    training: figures and curves, None where no step is on record. sessions: each with its `start` in words, and
    whether it was `cut_short`. total_time, goodput: in words, "" without sessions. saves: what checkpoints cost, None
    where none is known.
    """
    sessions, every_steps = record["sessions"], record["checkpoint"]["config"]["checkpoint"]["every_steps"]
    starts = [_start(session, before) for session, before in zip(sessions, [None, *sessions], strict=False)]
    return {
        "training": _training(record["metrics"], sessions),
        "sessions": [
            {**session, "start": start, "cut_short": was_cut_short(session)}
            for session, start in zip(sessions, starts, strict=True)
        ],
        "total_time": _total_time(sessions),
        "goodput": in_words(where_hours_went(sessions)),
        "saves": _saves([session for session in sessions if "save_s" in session], every_steps),
    }


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
    return {
        "steps": train[-1]["step"],
        "epochs": figures("epoch")[-1],
        "tokens_per_s": median(figures("tokens_per_s")),
        "padding_share": mean(figures("padding_share")),
        "memory_mb": max(figures("memory_mb")),
        "loss": over_steps("training and validation loss", *losses),
        "accuracy": over_steps("accuracy", Line(points(validation, "accuracy"))),
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


def _saves(saving: Sequence[dict[str, Any]], every_steps: int) -> dict[str, Any] | None:
    """Of sessions with saves: how many, their means, and the price of a kill in words ("" where no pace is known)."""
    if not saving:
        return None
    count = sum(session["saves"] for session in saving)
    stall_s, save_s = (sum(each["saves"] * each[key] for each in saving) / count for key in ("stall_s", "save_s"))
    # A session that was killed may have done more than its record says, in a time that nobody knows.
    steps = sum(session["step"] - session["from_step"] for session in saving)
    seconds = sum(session["seconds"] for session in saving)
    # A session may do no more than its last save.
    price = price_of_a_kill(every_steps, seconds / steps, stall_s, save_s) if steps and seconds else ""
    return {"count": count, "stall_s": stall_s, "save_s": save_s, "price": price}
