"""A progress line, on a terminal and in a log."""

from __future__ import annotations

import sys
import time
from collections import deque

from training.base.console import clear_line, draw_line, speaks
from training.base.durations import format_duration

_RECENT_S = 60.0


class Progress:
    """A progress line with a bar and the time left, on standard error.

    On a terminal it is redrawn in place, at most ten times a second; elsewhere (a log file, a batch job) a plain line
    appears every `log_interval_s` seconds, so that logs stay readable.
    """

    def __init__(self, label: str, total: int, unit: str = "", *, start: int = 0, log_interval_s: float = 10.0):
        self.label, self.total, self.unit = label, total, unit
        self.done = start
        self.note = ""  # shown behind the bar
        self._terminal = sys.stderr.isatty()
        self._interval_s = 0.1 if self._terminal else log_interval_s
        self._drawn = time.monotonic()
        self._marks = deque([(self._drawn, start)])  # when how many were done, of late

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if speaks():
            clear_line()

    def advance(self, count: int = 1) -> None:
        """Counts `count` more units as done."""
        self.done += count
        now = time.monotonic()
        if speaks() and now - self._drawn >= self._interval_s:
            self._drawn = now
            self._draw(self._seconds_left(now))

    def _seconds_left(self, now: float) -> float | None:
        """Seconds to the end at the pace of the last minute, or of the last ten units where these took longer.

        None before anything is done.
        """
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _RECENT_S and self.done - self._marks[1][1] >= 10:
            self._marks.popleft()
        moment, done = self._marks[0]
        return (now - moment) / (self.done - done) * (self.total - self.done) if self.done > done else None

    def _draw(self, left: float | None) -> None:
        share = min(1.0, self.done / self.total) if self.total else 1.0
        unit = f" {self.unit}" if self.unit else ""
        text = f"{share:4.0%} {self.done:,}/{self.total:,}{unit}"
        if left is not None:
            text += f" · {format_duration(left)} left"
        if self.note:
            text += f" · {self.note}"
        if self._terminal:
            filled = round(share * 24)
            bar = "█" * filled + "░" * (24 - filled)
            draw_line(f"{self.label} {bar} {text}")
        else:
            print(f"{self.label} {text}", file=sys.stderr, flush=True)
