"""Where the hours of a run went: steps that count, and all else that a run, its interruptions and its machine took.

A session counts its own time by kind (`Clock`) and writes it down at each save and at its end. What a kill cost is
known to the next session alone: which steps it does again, and when the last line was written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any, Literal

from training.base.durations import format_duration
from training.base.environment import process_age_s

Kind = Literal["steps", "start", "validation", "saves", "data", "end"]

# In words, and in this order, everything that the time from the first start to the last end is made of.
KINDS = {
    "steps": "steps that count",
    "again": "steps done again",
    "start": "starting",
    "validation": "validating",
    "saves": "waiting for saves",
    "data": "laying out data",
    "end": "ending",
    "unknown": "unknown, between the last line before a kill and the next start",
    "between": "between sessions",
}


class Clock:
    """The time of this process by kind, from its start on, or from where its last session ended."""

    _ended = -inf  # when that was

    def __init__(self) -> None:
        age_s = min(process_age_s(), time.monotonic() - Clock._ended)
        self.began = time.time() - age_s
        self._since = time.monotonic() - age_s
        self._kind: Kind = "start"
        self._seconds: dict[Kind, float] = {}

    def enter(self, kind: Kind) -> Kind:
        """From now on time counts as `kind`; returns what it counted as."""
        now, before = time.monotonic(), self._kind
        self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._kind, self._since = kind, now
        Clock._ended = now
        return before

    @contextmanager
    def during(self, kind: Kind) -> Iterator[None]:
        """Time inside counts as `kind`."""
        before = self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[Kind, float]:
        """By kind, up to now."""
        self.enter(self._kind)
        return {kind: round(seconds, 3) for kind, seconds in self._seconds.items()}


def hours_of(sessions: Sequence[Mapping[str, Any]], cut_short: Sequence[bool]) -> dict[str, float]:
    """Seconds by kind (`KINDS`) from the first start to the last sign of life.

    sessions: as sessions.json has them; those that kept no hours are left out. cut_short: which of them nobody ended.
    """
    total = dict.fromkeys(KINDS, 0.0)
    counted = [(session, cut) for session, cut in zip(sessions, cut_short, strict=True) if "hours" in session]
    resumed: float = inf  # the earliest step from which a later session went on: what lies behind it was done again
    begins = None
    for session, cut in reversed(counted):
        for kind, seconds in session["hours"].items():
            total[kind] += seconds
        done = session["step"] - session["from_step"]
        lost = min(done, max(0, session["step"] - resumed))
        again = session["hours"].get("steps", 0.0) * lost / done if lost > 0 else 0.0
        told = session["began"] + sum(session["hours"].values())
        last_sign = max(told, session.get("last_sign", told)) if cut else told
        total["steps"] -= again
        total["again"] += again + last_sign - told  # behind its last save nothing of a killed session counts
        if begins is not None:
            total["unknown" if cut else "between"] += max(0.0, begins - last_sign)
        resumed, begins = min(resumed, session["from_step"]), session["began"]
    return total


def goodput(hours: Mapping[str, float]) -> tuple[float, float]:
    """The share of steps that count, of all the time since the first start, and of the sessions' own."""
    whole = sum(hours.values())
    own = whole - hours["between"] - hours["unknown"]
    return hours["steps"] / whole if whole else 0.0, hours["steps"] / own if own else 0.0


def in_words(hours: Mapping[str, float]) -> str:
    """Where the time went, as a sentence; its shares add up to 100 %."""
    whole = sum(hours.values())
    if not whole:
        return ""
    shares = ", ".join(f"{hours[kind] / whole:.1%} {words}" for kind, words in KINDS.items() if hours[kind] > 0)
    return (
        f"goodput: {goodput(hours)[1]:.1%} of the sessions' time went into steps that count; of "
        f"{format_duration(whole)} from the first start on: {shares}"
    )
