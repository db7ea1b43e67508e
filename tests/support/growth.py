"""How the time to read a text grows with its length."""

from __future__ import annotations

import time
from collections.abc import Callable

from training.base.limits import call_limited

_LENGTH = 65_536  # and twice that
_SECONDS = 10.0  # of the processor; a square of such a length takes minutes
_UNMEASURABLE_S = 0.01


def assert_linear(read: Callable[[str], object], piece: str, *, begin: str = "", end: str = "") -> None:
    """Asserts that `read` takes about twice as long for a text of twice as many of `piece`."""
    once, twice = (
        min(_seconds(read, begin + piece * (length // len(piece)) + end) for _ in range(3))
        for length in (_LENGTH, 2 * _LENGTH)
    )
    assert twice < 3.2 * max(once, _UNMEASURABLE_S), (begin, piece, end, once, twice)


def _seconds(read: Callable[[str], object], text: str) -> float:
    began = time.process_time()
    call_limited(lambda: read(text), _SECONDS, 1 << 30)
    return time.process_time() - began
