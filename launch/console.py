"""The one place that prints.

Rank 0 speaks for all ranks; an error that the user can mend is one line that says what to do, without a traceback.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend. The message says what was found, what was expected and what to do.

    speaks: whether this process is the one to print it; None where rank 0 is, since every rank has the same.
    """

    def __init__(self, message: str, *, speaks: bool | None = None):
        super().__init__(message)
        self.speaks = speaks


class TryLaterError(UserError):
    """Something that passes by itself, such as another run that is still using a folder."""


class PeerError(Exception):
    """Another process of the run failed, which this one only notices: the other's error is the one to read."""


class Terminated(BaseException):
    """SIGTERM, where nothing needs more than to leave: what is half written is removed on the way out."""


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


def say_as_any_rank(text: str) -> None:
    """Prints on standard error, whichever rank this is: for what only this one knows."""
    _clear_line()
    print(text, file=sys.stderr, flush=True)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits with what it returns; a `UserError` becomes one line on standard error, status 1.

    SIGTERM ends it in good order with status 75 (try again later), unless `main` handles the signal itself.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = _run(main)
    except UserError as error:
        if _speaks() if error.speaks is None else error.speaks:
            say_as_any_rank(f"error: {error}")
            tell_launcher(str(error), to_mend=not isinstance(error, TryLaterError))
        status = 1
    except PeerError as error:
        say_as_any_rank(f"rank {os.environ.get('RANK', '0')} ends as well: {error}")
        status = 1
    except Terminated:
        if _speaks():
            say_as_any_rank(
                "stopped by signal SIGTERM; nothing unfinished was left behind, start the same command again"
            )
        status = 75
    except KeyboardInterrupt:
        if _speaks():
            say_as_any_rank("interrupted")
        status = 130
    except BrokenPipeError:  # `... | head` closed our standard output: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    if "deepspeed" in sys.modules:
        # What it leaves behind aborts a process now and then that is done and only has to go; torchrun takes that for
        # a failure of the run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


_told_to_leave = False


def _run(main: Callable[[], int | None]) -> int:
    global _told_to_leave
    try:
        return main() or 0
    except (UserError, PeerError):
        raise
    except Exception as error:
        # Whatever library was at work when the signal came may have made an error of its own of it: an extension
        # module that is being loaded says that it cannot be imported.
        if _told_to_leave:
            raise Terminated from error
        raise
    finally:
        _told_to_leave = True  # how it ends is known; the launcher may tell us to leave because another rank has left


def _terminate(number: int, frame: FrameType | None) -> None:
    global _told_to_leave
    if _told_to_leave:  # leaving already: `timeout` for one sends the signal twice, to the process and to its group
        return
    _told_to_leave = True
    raise Terminated


def tell_launcher(message: str, *, to_mend: bool) -> None:
    """Leaves an error where the launcher looks for it.

    torchrun ends its long report with the same line. The batch scripts of slurm/ do not start a run again that the user
    has to mend first (to_mend).
    """
    if to_mend and (path := os.environ.get("RELAY_ERROR_FILE")):
        with contextlib.suppress(OSError):
            Path(path).write_text(message, encoding="utf-8")
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


_UNITS_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str) -> float:
    """Seconds of `90`, `90s`, `3m05s`, `11h30m`, `1d04h`, `4:00:00` or `1-00:00:00`; raises ValueError on others.

    It reads what `format_duration` writes, and what SLURM does.
    """
    text = text.strip()
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 <= seconds < math.inf:
            return seconds
    parts = re.findall(r"([0-9.]+)([dhms])", text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    clock = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if clock:
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    raise ValueError(f"{text!r} is no duration: write 90s, 30m, 11h30m or 4:00:00")


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
