"""How the time to read a text grows with its length."""

from __future__ import annotations

import time
from collections.abc import Callable

from training.base.limits import call_limited

_SHORT, _LONG = 8_192, 131_072
_SECONDS = 10.0  # of the processor; a square of such a length takes minutes
_UNMEASURABLE_S = 0.002


def assert_linear(read: Callable[[str], object], piece: str, *, begin: str = "", end: str = "") -> None:
    """Asserts that a text of sixteen times as many of `piece` does not take a square of that.

    The limit lies in the middle, four times from either: a busy machine makes times vary by less.
    """
    short_s, long_s = (
        min(_seconds(read, begin + piece * (length // len(piece)) + end) for _ in range(3))
        for length in (_SHORT, _LONG)
    )
    assert long_s < 64 * max(short_s, _UNMEASURABLE_S), (begin, piece, end, short_s, long_s)


def _seconds(read: Callable[[str], object], text: str) -> float:
    began = time.thread_time()
    call_limited(lambda: read(text), _SECONDS, 1 << 30)
    return time.thread_time() - began
