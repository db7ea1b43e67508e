"""The part of a report that tells how the run went: its curves, and session by session what became of it.

Everything comes from metrics.jsonl and sessions.json. Either may lack what it did not yet hold, or what a session that
was killed had no time to write down.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from training.base.durations import format_duration
from training.engine.saver import price_of_a_kill
from training.engine.status import Session
from training.evaluation.report.curves import Line, curve
from training.evaluation.report.markup import facts, wide_table


def training(metrics: Sequence[dict[str, Any]], sessions: Sequence[Session]) -> str:
    """Curves of loss, learning rate and throughput over steps, where sessions began marked; and figures of the run."""
    train = [line for line in metrics if line["kind"] == "train"]
    if not train:
        return "<p>metrics.jsonl has no training steps.</p>"
    validation = [line for line in metrics if line["kind"] == "validation"]
    marks = [(s["from_step"], f"session {s['number']} begins after step {s['from_step']:,}") for s in sessions[1:]]

    def points(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in lines]

    def figure(caption: str, about: str, *lines: Line, from_zero: bool = False) -> str:
        until = train[-1]["step"]
        svg = curve(lines, marks, about=f"{about} over steps", until=until, from_zero=from_zero)
        return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"

    curves = (
        figure(
            "loss per token (nats): training, <span class=key>validation</span>",
            "training and validation loss",
            Line(points(train, "loss"), "faint"),
            Line(points(validation, "loss")),
        ),
        figure("token accuracy: <span class=key>validation</span>", "accuracy", Line(points(validation, "accuracy"))),
        figure("learning rate", "learning rate", Line(points(train, "lr"), "faint"), from_zero=True),
        figure("tokens per second", "throughput", Line(points(train, "tokens_per_s"), "faint"), from_zero=True),
    )
    return (
        f'<div class="curves">{"".join(curves)}</div>'
        "<p class=faint>Over optimizer steps; dotted where a session took over. The training loss is the objective "
        "itself, with dropout, label smoothing and, where it has a weight, the source side; the validation loss is "
        "that of plain target tokens.</p>"
        + facts(
            (
                ("steps", f"{train[-1]['step']:,}"),
                ("epochs", f"{train[-1]['epoch']:.2f}"),
                ("throughput", f"{median(line['tokens_per_s'] for line in train):,.0f} tokens/s (median, no padding)"),
                ("padding share", f"{mean(line['padding_share'] for line in train):.2%}"),
                ("memory", f"{max(line['memory_mb'] for line in train):,.0f} MB at most, per rank"),
            )
        )
    )


def story(sessions: Sequence[Session], every_steps: int) -> str:
    """A table of the sessions, and what they come to together; nothing where none is on record.

    every_steps: steps between two checkpoints, as configured.
    """
    if not sessions:
        return ""
    rows = []
    for session, before in zip(sessions, [None, *sessions[:-1]], strict=True):
        job = f" (job {session['job']})" if session["job"] else ""
        rows.append(
            (
                session["number"],
                session["started"][:16].replace("T", " "),  # to the minute
                f"{session['host']}{job}",
                f"{session['world_size']} on {session['device']}",
                _beginning(session, before),
                # Of a session that was killed only the saves are on record.
                f"{session['from_step']:,} to {session['step']:,}{'' if _closed(session) else ' or later'}",
                format_duration(session["seconds"]),
                session["reason"] or "still running when this page was made, or killed",
            )
        )
    head = ("", "began", "host", "ranks", "start", "steps", "time", "why it ended")
    return wide_table(head, rows) + _together(sessions, every_steps)


def _beginning(session: Session, before: Session | None) -> str:
    if session["from_step"] == 0:
        return "new" if before is None else "from the beginning"
    older = before is not None and session["from_step"] < before["step"]
    return "resumed, from an older checkpoint" if older else "resumed"


def _closed(session: Session) -> bool:
    """Whether the session lived to write down its end."""
    return "saves" in session


def total_time(sessions: Sequence[Session]) -> str:
    """Sessions and their time in words; that of a session which was killed counts up to its last save."""
    least = "" if all(map(_closed, sessions)) else "at least "
    seconds = sum(session["seconds"] for session in sessions)
    return f"{len(sessions):,} session{'s' * (len(sessions) > 1)}, {least}{format_duration(seconds)} in all"


def _together(sessions: Sequence[Session], every_steps: int) -> str:
    saving = [session for session in sessions if session.get("saves")]
    if not saving:
        return f"<p>{total_time(sessions)}.</p>"
    count = sum(session["saves"] for session in saving)
    stall_s, save_s = (sum(each["saves"] * each[key] for each in saving) / count for key in ("stall_s", "save_s"))
    # A session that was killed may have done more than its record says, in a time that nobody knows.
    steps = sum(session["step"] - session["from_step"] for session in saving)
    seconds = sum(session["seconds"] for session in saving)
    price = ""
    if steps and seconds:  # a session may do no more than its last save
        words = price_of_a_kill(every_steps, seconds / steps, stall_s, save_s)
        price = f"<p class=faint>At this pace {words}.</p>"
    return (
        f"<p>{total_time(sessions)}. {count:,} checkpoints; in the mean, each held the training up for "
        f"{1000 * stall_s:,.1f} ms and was complete after {save_s:,.2f} s.</p>{price}"
    )
