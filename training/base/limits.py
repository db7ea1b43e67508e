"""Limits for a stranger's program that runs inside this process, such as a chat template.

Promises: Python code that takes too long is stopped wherever it stands; whatever asks for too much memory gets none. A
single call into a library cannot be stopped: where it goes on ten times as long, the system ends the process.
Not promised: that another thread than the main one has a limit of time; that there is one of memory where /proc is
lacking.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")


class _TimeIsUp(BaseException):
    """No `Exception`: libraries catch those, and go on."""


def call_limited(function: Callable[[], Result], seconds: float, more_bytes: int) -> Result:
    """What `function` returns. Raises TimeoutError and MemoryError where it needs more than that.

    seconds: of the processor's time, so that a process that was stopped for a while has none taken away. more_bytes:
    beside the memory that this process has already.
    """
    memory = resource.getrlimit(resource.RLIMIT_AS)
    timed = threading.current_thread() is threading.main_thread()
    if timed:
        handler = signal.signal(signal.SIGPROF, _stop)
        timer = signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_VIRTUAL, 10 * seconds)  # nobody handles its signal
    try:
        try:
            _allow(more_bytes, *memory)
            return function()
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _TimeIsUp:
        raise TimeoutError from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        if timed:
            signal.signal(signal.SIGPROF, handler or signal.SIG_DFL)
            if any(timer):
                signal.setitimer(signal.ITIMER_PROF, *timer)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TimeIsUp


def _allow(more_bytes: int, soft: int, hard: int) -> None:
    """Limits the memory of this process to what it has and `more_bytes`, unless it is limited to less already."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return
    pages = int(os.read(file, 64).split()[0])
    os.close(file)
    most = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard))
