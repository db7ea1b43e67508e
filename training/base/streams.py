"""Standard output and standard error as files that outlive whoever reads them.

A terminal closes, the reader of a pipe dies, a log's disk is full: no reason for a training to end, whose product
stands in its folder. So what cannot be written is dropped, unless it is the very product of the command.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from training.base.errors import UserError


class _Output(io.FileIO):
    """An open file descriptor to write to."""

    def __init__(self, number: int, *, is_needed: bool):
        super().__init__(number, "w", closefd=False)
        self.is_needed = is_needed  # whether it matters that something could not be written

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if not self.is_needed:
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(f"standard output cannot be written ({error.strerror}): it is incomplete") from None
        return len(data) if written is None and not self.is_needed else written  # None: the pipe is full for now


_outputs: list[_Output] = []


def guard_outputs(*, is_needed: bool) -> None:
    """Puts such files in the place of `sys.stdout` and `sys.stderr`. To be called once, where a command begins.

    is_needed: whether what goes to standard output has to get there. A write that fails then raises BrokenPipeError if
    nobody reads any more, else UserError.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that anybody opens would be taken for it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:  # it was closed
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _guarded(1, sys.stdout, is_needed=is_needed)
    sys.stderr = _guarded(2, sys.stderr, is_needed=False)


def _guarded(number: int, stream: TextIO | None, *, is_needed: bool) -> TextIO:
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.flush()
        if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number:
            return stream  # somebody has put something else there, a notebook for one
    output = _Output(number, is_needed=is_needed)
    _outputs.append(output)
    return io.TextIOWrapper(
        io.BufferedWriter(output),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",  # of a character that the terminal cannot show
        line_buffering=stream is None or stream.line_buffering,
        write_through=stream is None or stream.write_through,
    )


def outlive_readers() -> None:
    """From now on standard output is not needed either."""
    for output in _outputs:
        output.is_needed = False
