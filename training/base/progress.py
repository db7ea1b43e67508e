"""A progress line, on a terminal and in a log."""

from __future__ import annotations

import sys
import time

from training.base.console import clear_line, draw_line, speaks
from training.base.durations import format_duration


class Progress:
    """A progress line with a bar and the time left, on standard error.

    On a terminal it is redrawn in place, at most ten times a second; elsewhere (a log file, a batch job) a plain line
    appears every `log_interval_s` seconds, so that logs stay readable.
    """

    def __init__(self, label: str, total: int, unit: str = "", *, start: int = 0, log_interval_s: float = 10.0):
        self.label, self.total, self.unit = label, total, unit
        self.done = self.start = start
        self.note = ""  # shown behind the bar
        self._terminal = sys.stderr.isatty()
        self._interval_s = 0.1 if self._terminal else log_interval_s
        self._began = self._drawn = time.monotonic()

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
            self._draw(now)

    def seconds_left(self, now: float | None = None) -> float | None:
        """Seconds to the end at the mean pace since the start; None before anything is done."""
        fresh = self.done - self.start
        if fresh <= 0:
            return None
        return ((now or time.monotonic()) - self._began) / fresh * (self.total - self.done)

    def _draw(self, now: float) -> None:
        share = min(1.0, self.done / self.total) if self.total else 1.0
        left = self.seconds_left(now)
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
