"""Ends a rank whose watchdog is silent: its thread stands still where a library holds Python's lock for ever.

`python sentry.py PID SIGNAL` is a small process of its own, started by `training.engine.watchdog`, which imports
nothing of ours. It hears from the rank on standard input: each line is the limit of the silence behind it, in seconds.
What counts is how often it looked, not the clock, so that a pause of all processes is no silence; neither is one of the
rank alone. SIGNAL makes the rank print its stacks.
"""

import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

LOOK_EVERY_S = 0.5


def main(pid: int, number: int) -> None:
    for name in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "XCPU"):
        signal.signal(signal.Signals[f"SIG{name}"], signal.SIG_IGN)  # it leaves with its rank
    limit_s, silent_s = float("inf"), 0.0
    while silent_s <= limit_s:
        if select.select([0], [], [], LOOK_EVERY_S)[0]:
            heard = os.read(0, 4096).split()
            if not heard:
                return
            limit_s, silent_s = float(heard[-1]), 0.0
        elif not is_stopped(pid):
            silent_s += LOOK_EVERY_S
    with suppress(OSError):  # nobody may be reading
        print(
            f"error: process {pid} gave no sign of life for {silent_s:.0f} s: a library may hold Python's lock, or the "
            "run folder's disk may not answer; the process is ended, and the checkpoints stand. Where it is:",
            file=sys.stderr,
            flush=True,
        )
    os.kill(pid, number)
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)


def is_stopped(pid: int) -> bool:
    """Whether somebody has stopped the process, by a signal or with a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
