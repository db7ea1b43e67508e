"""The one place that prints.

Rank 0 speaks for all ranks; an error that the user can mend is one line that says what to do, without a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
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


def speaks() -> bool:
    """Whether this process prints for all: rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Prints `text` on standard output, on rank 0 only."""
    if speaks():
        clear_line()
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints `warning: text` on standard error, on rank 0 only."""
    if speaks():
        clear_line()
        print(f"warning: {text}", file=sys.stderr, flush=True)


def say_as_any_rank(text: str) -> None:
    """Prints on standard error, whichever rank this is: for what only this one knows."""
    clear_line()
    print(text, file=sys.stderr, flush=True)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits with what it returns; a `UserError` becomes one line on standard error, status 1.

    SIGTERM ends it in good order with status 75 (try again later), unless `main` handles the signal itself.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = _run(main)
    except UserError as error:
        if speaks() if error.speaks is None else error.speaks:
            say_as_any_rank(f"error: {error}")
            tell_launcher(str(error), to_mend=not isinstance(error, TryLaterError))
        status = 1
    except PeerError as error:
        say_as_any_rank(f"rank {os.environ.get('RANK', '0')} ends as well: {error}")
        status = 1
    except Terminated:
        if speaks():
            say_as_any_rank(
                "stopped by signal SIGTERM; nothing unfinished was left behind, start the same command again"
            )
        status = 75
    except KeyboardInterrupt:
        if speaks():
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


def draw_line(text: str) -> None:
    """Draws `text` over the terminal's last line, where it stays open."""
    global _line_is_open
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    _line_is_open = True


def clear_line() -> None:
    """Takes the open line away, if there is one."""
    global _line_is_open
    if _line_is_open:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
        _line_is_open = False
