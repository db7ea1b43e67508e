"""The one place that prints.

Rank 0 speaks for all ranks; an error that the user can mend is one line that says what to do, without a traceback.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend. The message says what was found, what was expected and what to do."""


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Prints `text` on standard output, on rank 0 only."""
    if _speaks():
        _clear_line()
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints `warning: text` on standard error, on rank 0 only."""
    if _speaks():
        _clear_line()
        print(f"warning: {text}", file=sys.stderr, flush=True)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits with what it returns; a `UserError` becomes one line on standard error, status 1."""
    try:
        status = main() or 0
    except UserError as error:
        if _speaks():
            _clear_line()
            print(f"error: {error}", file=sys.stderr, flush=True)
            _tell_torchrun(str(error))
        status = 1
    except KeyboardInterrupt:
        if _speaks():
            _clear_line()
            print("interrupted", file=sys.stderr, flush=True)
        status = 130
    except BrokenPipeError:  # `... | head` closed our standard output: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def _tell_torchrun(message: str) -> None:
    """Leaves the message where torchrun looks for it, so that it ends its long report with the same line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        about = {"message": {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(path).write_text(json.dumps(about), encoding="utf-8")


# A progress line stays on the terminal's last line; whoever prints must clear it first.
_line_is_open = False


def _clear_line() -> None:
    global _line_is_open
    if _line_is_open:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
        _line_is_open = False


def format_duration(seconds: float) -> str:
    """Seconds as people read them: 42s, 3m05s, 2h07m, 1d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Progress:
    """A progress line with a bar and the time left, on standard error.

    On a terminal it is redrawn in place, at most ten times a second; elsewhere (a log file, a batch job) a plain line
    appears every `log_interval_s` seconds, so that logs stay readable.
    """

    def __init__(self, label: str, total: int, unit: str = "", *, start: int = 0, log_interval_s: float = 10.0):
        self.label, self.total, self.unit = label, total, unit
        self.done = self.start = start
        self.note = ""
        self._terminal = sys.stderr.isatty()
        self._interval_s = 0.1 if self._terminal else log_interval_s
        self._began = self._drawn = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if _speaks():
            _clear_line()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more units as done; `note` is shown behind the bar."""
        self.done += count
        self.note = note or self.note
        now = time.monotonic()
        if _speaks() and now - self._drawn >= self._interval_s:
            self._drawn = now
            self._draw(now)

    def seconds_left(self, now: float | None = None) -> float | None:
        """Seconds to the end at the mean pace since the start; None before anything is done."""
        fresh = self.done - self.start
        if fresh <= 0:
            return None
        return ((now or time.monotonic()) - self._began) / fresh * (self.total - self.done)

    def _draw(self, now: float) -> None:
        global _line_is_open
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
            print(f"\r\033[K{self.label} {bar} {text}", end="", file=sys.stderr, flush=True)
            _line_is_open = True
        else:
            print(f"{self.label} {text}", file=sys.stderr, flush=True)
