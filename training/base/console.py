"""The one place that prints.

Rank 0 speaks for all ranks; an error that the user can mend is one line that says what to do, without a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from training.base.environment import (
    adopt_srun_task,
    leave_with_launcher,
    own_rank,
    relay_error_file,
    torchrun_error_file,
    was_launched,
)
from training.base.errors import PeerError as PeerError
from training.base.errors import Terminated as Terminated
from training.base.errors import TryLaterError as TryLaterError
from training.base.errors import UserError as UserError
from training.base.files import create
from training.base.streams import guard_outputs, outlive_readers


def speaks() -> bool:
    """Whether this process prints for all: rank 0 does, and a process that is alone."""
    return own_rank() == "0" or not was_launched()


def is_ignored(number: int) -> bool:
    """Whether whoever started this process wants it to ignore the signal, as `nohup` does with SIGHUP."""
    return signal.getsignal(number) is signal.SIG_IGN


def counted(number: int, noun: str) -> str:
    """A number with its noun, as in 1 rank and 2 processes."""
    plural = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{plural}"


def say(text: str = "") -> None:
    """Prints `text` on standard output, on rank 0 only."""
    if speaks():
        clear_line()
        print(harmless(text), flush=True)


def say_part(text: str) -> None:
    """Prints `text` on standard output, on rank 0 only, without ending the line."""
    if speaks():
        clear_line()
        print(harmless(text), end="", flush=True)


def warn(text: str) -> None:
    """Prints `warning: text` on standard error, on rank 0 only."""
    if speaks():
        clear_line()
        print(f"warning: {harmless(text)}", file=sys.stderr, flush=True)


def say_as_any_rank(text: str) -> None:
    """Prints on standard error, whichever rank this is: for what only this one knows."""
    clear_line()
    print(harmless(text), file=sys.stderr, flush=True)


def say_in_handler(text: str) -> None:
    """Prints a line from within a signal handler, where this process may be in the middle of printing another."""
    if speaks():
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"\n{text}\n".encode())


def harmless(text: str) -> str:
    """`text` with a terminal's control characters spelled out: a stranger's file name must not command the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# All but line feeds and tabs; also what turns the direction of writing, or ends a line elsewhere.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def run_main(main: Callable[[], int | None], *, prints_product: bool = False) -> NoReturn:
    """Runs `main` and exits with what it returns; a `UserError` becomes one line on standard error, status 1.

    Every command begins here, under whatever launcher. SIGTERM, and SIGHUP when its terminal closes, end it in good
    order with status 75 (try again later), unless `main` handles the signals itself. prints_product: whether the
    command has to end when nobody can read what it prints, since it has no other product.
    """
    guard_outputs(is_needed=prints_product)
    adopt_srun_task()
    leave_with_launcher()
    signal.signal(signal.SIGTERM, _terminate)
    if not is_ignored(signal.SIGHUP):
        signal.signal(signal.SIGHUP, _terminate)
    try:
        status = _run(main)
    except UserError as error:
        if error.speaks:
            say_as_any_rank(f"error: {error}")
            tell_launcher(str(error), to_mend=not isinstance(error, TryLaterError))
        status = 1
    except PeerError as error:
        say_as_any_rank(f"rank {own_rank()} ends as well: {error}")
        status = 1
    except Terminated as told:
        if speaks():
            say_as_any_rank(
                f"stopped by signal {told}; nothing unfinished was left behind, start the same command again"
            )
        status = 75
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pressed twice
        if speaks():
            say_as_any_rank("interrupted")
        status = 130
    except BrokenPipeError:  # `... | head` closed our standard output: not an error of ours
        status = 141
    outlive_readers()
    _leave(status)


# How `run_main` ends the process, given its exit status.
_leave: Callable[[int], NoReturn] = sys.exit


def leave_at_once() -> None:
    """From now on `run_main` ends the process without taking apart what libraries have left in it."""
    global _leave
    _leave = _exit_at_once


def _exit_at_once(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


_told_to_leave = ""  # the name of the signal


def _run(main: Callable[[], int | None]) -> int:
    global _told_to_leave
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        is_told_here = speaks() if error.speaks is None else error.speaks
        error.speaks = is_told_here or (_is_left_alone() and error.speaks is None)
        raise
    except PeerError:
        raise
    except Exception as error:
        # The library that was at work when the signal came may have turned it into an error of its own: an extension
        # module that was being loaded says that it cannot be imported.
        if _told_to_leave:
            raise Terminated(_told_to_leave) from error
        raise
    finally:
        # How it ends is known; the launcher may tell us to leave because another rank has left.
        _told_to_leave = _told_to_leave or "SIGTERM"


def _is_left_alone() -> bool:
    """Gives the rank that tells an error the time to; whether nothing comes of that.

    It may come to it much later than this one, and a launcher ends all ranks once the first has left.
    """
    signal.signal(signal.SIGTERM, _terminate)  # a training has a handler of its own, which only makes a note
    file = relay_error_file()
    try:
        for _ in range(_HEAD_START_LOOKS):
            if file is not None and file.exists():
                return False
            time.sleep(_LOOK_EVERY_S)
    except Terminated:
        return False
    return True


_LOOK_EVERY_S, _HEAD_START_LOOKS = 0.1, 50


def _terminate(number: int, frame: FrameType | None) -> None:
    global _told_to_leave
    if _told_to_leave:  # leaving already: `timeout` for one sends the signal twice, to the process and to its group
        return
    _told_to_leave = signal.Signals(number).name
    raise Terminated(_told_to_leave)


def tell_launcher(message: str, *, to_mend: bool) -> None:
    """Leaves an error where the launcher looks for it.

    torchrun ends its long report with the same line. to_mend: whether the user has to mend it first, so that
    neither `launch.run` nor the batch scripts of slurm/ start the run again.
    """
    if to_mend and (path := relay_error_file()) is not None:
        with contextlib.suppress(OSError):
            _write(path, message)
    if (path := torchrun_error_file()) is not None:
        about = {"message": {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}}
        _write(path, json.dumps(about))


def _write(path: Path, text: str) -> None:
    with create(path) as file:
        file.write(text.encode())


# A progress line stays on the terminal's last line; whoever prints must clear it first.
_line_is_open = False


def draw_line(text: str) -> None:
    """Draws as much of `text` over the terminal's last line as has room there, and leaves the line open."""
    global _line_is_open
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        columns = 80
    print(f"\r\033[K{cut(text, columns - 1)}", end="", file=sys.stderr, flush=True)
    _line_is_open = True


def cut(text: str, columns: int) -> str:
    """The beginning of `text` that takes at most so many columns of a terminal, where Han characters take two each."""
    for place, character in enumerate(text):
        if not unicodedata.combining(character):
            columns -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns < 0:
            return text[:place]
    return text


def clear_line() -> None:
    """Takes the open line away, if there is one."""
    global _line_is_open
    if _line_is_open:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
        _line_is_open = False
