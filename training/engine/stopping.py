"""When a session stops, which all ranks agree on.

A signal handler sets a flag and does nothing else; so do the time limit, a file named STOP, saves that fail, the end of
the launcher, and a cloud's notice that it takes the machine back. The ranks agree on it between two steps, and between
two batches of a validation, so nobody is left waiting in a collective. Then: checkpoint, `status.json`, exit. That file
says how the session ended: launchers turn it into an exit status, since `torchrun` cannot pass a worker's on.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal, TypeVar

from pydantic import Field

from training.base.console import is_ignored, say, say_in_handler
from training.base.durations import format_duration
from training.base.environment import process_age_s, time_left
from training.base.options import Duration, Options
from training.engine.cluster import Cluster
from training.engine.notices import Notices
from training.engine.status import STOP_FILE

# Ranks agree at every step that takes longer than this, and about this often where steps are shorter. A small
# reduction on the host takes a hundredth of it.
_AGREE_EVERY_S = 0.02

# Reasons to stop beside signals, as numbers above theirs: the ranks agree on the largest.
_FILE, _TIME, _SAVES, _LAUNCHER, _NOTICE, _TAKEN = 1001, 1002, 1003, 1004, 1005, 1006

T = TypeVar("T")


class SessionOptions(Options):
    """When a session ends, and what counts as hanging."""

    time_limit: Duration | None = Field(
        None, gt=0, description="end the session in time, from its start; null: only the scheduler's limit counts"
    )
    margin: Duration = Field(
        30, ge=0, description="kept free before the time limit, beside what a step and a save were measured to take"
    )
    stop_signal: Literal["SIGUSR1", "SIGUSR2"] | None = Field(
        "SIGUSR1", description="a signal that asks for a stop beside SIGTERM, SIGINT and the like; null: none"
    )
    notices: bool = Field(
        True, description="stop in time where AWS, Google or Azure announces that it takes the machine back"
    )
    on_end: str | None = Field(
        None,
        min_length=1,
        description="a shell command for when the session ends, which finds RELAY_RUN_DIR, RELAY_STATUS and "
        "RELAY_REASON among its variables; null: none",
    )
    hang_timeout: Duration = Field(
        600,
        gt=0,
        description="without progress for so long (at the start and the end 20 minutes more) a rank is named with its "
        "stack, and the session ends",
    )


class Stopped(Exception):
    """All ranks have agreed to stop; raised on each of them at the same place."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class StopFlag:
    """Whether to stop, and why."""

    def __init__(self, run_dir: Path, cluster: Cluster, options: SessionOptions):
        self._cluster = cluster
        self._file = run_dir / STOP_FILE
        self._options = options
        self._asked = 0
        self._interrupted = False
        self._calls = self._next_call = self._last_call = 0
        self._last_time: float | None = None
        self._paused_s = cluster.watcher.paused_s()
        self._slowest_step_s = 0.0
        self._deadline = _deadline(options) if cluster.is_first else math.inf
        self.reserve_s: Callable[[], float] = lambda: 0.0  # what the end of the session will take: a save
        self.saves_fail: Callable[[], bool] = lambda: False
        self.is_taken: Callable[[], bool] = lambda: False  # whether another machine has the run
        self._notices = Notices() if options.notices and cluster.ranks.local_rank == 0 else None
        names = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGXCPU", *([options.stop_signal] if options.stop_signal else [])]
        for name in names + ([] if is_ignored(signal.SIGHUP) else ["SIGHUP"]):
            signal.signal(signal.Signals[name], self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt  # asked twice: leave at once, the last checkpoint stands
            self._interrupted = True  # a launcher may send SIGTERM in between
            say_in_handler("stopping behind this step, with a checkpoint; Ctrl-C again leaves at once, without one")
        self._asked = number

    def check(self) -> None:
        """Raises `Stopped` on every rank if any has a reason. To be called by all ranks equally often.

        Costs one small reduction on the host every time, or at every k-th call when calls come quickly.
        """
        self._calls += 1
        if self._calls < self._next_call:
            return
        now = time.monotonic()
        paused_s = self._cluster.watcher.paused_s() - self._paused_s
        self._paused_s += paused_s
        if paused_s and self._cluster.is_first:  # SLURM does not count the time in which it suspends a job, others do
            self._deadline = _deadline(self._options)
        since_s = now - paused_s - (now if self._last_time is None else self._last_time)
        step_s = max(0.0, since_s) / (self._calls - self._last_call)
        asked, slowest_s = self._cluster.maximum([self._own_reason(now), step_s])
        # Every rank computes the same next call from the same numbers; where the duration is unknown, it is the next.
        self._next_call = self._calls + (max(1, min(100, int(_AGREE_EVERY_S / slowest_s))) if slowest_s else 1)
        self._last_time, self._last_call = now, self._calls
        self._slowest_step_s = max(slowest_s, 0.9 * self._slowest_step_s)  # a first, slow step is forgotten in time
        if asked:
            raise Stopped(self._words(int(asked)))

    def _own_reason(self, now: float) -> int:
        if self.is_taken():
            return _TAKEN
        launcher = self._cluster.launcher
        if not self._asked and launcher is not None and launcher.is_gone():
            return _LAUNCHER
        if not self._asked and self._notices is not None and self._notices.found is not None:
            return _NOTICE
        if self._asked or not self._cluster.is_first:
            return self._asked
        if self.saves_fail():
            return _SAVES
        if now + self._slowest_step_s + self.reserve_s() + self._options.margin > self._deadline:
            return _TIME
        return _FILE if self._file.exists() else 0

    def _words(self, reason: int) -> str:
        others = {
            _FILE: f"the file {self._file}",
            _TIME: "the time limit",
            _SAVES: "failing saves",
            _LAUNCHER: "the end of the launcher",
            _TAKEN: "another machine, which has the run now",
            _NOTICE: f"a notice of preemption by {(self._notices and self._notices.found) or 'a cloud'}",
        }
        return others.get(reason) or f"signal {signal.Signals(reason).name}"

    def until_stop(self, items: Sequence[T], beat: Callable[[], None]) -> Iterator[T]:
        """This rank's part of `items`, every world-size-th, with a look at the flag and a `beat` before each.

        Every rank looks and beats equally often, even if the last round has no item for it.
        """
        world_size = self._cluster.world_size
        for first in range(0, len(items), world_size):
            self.check()
            beat()
            if first + self._cluster.rank < len(items):
                yield items[first + self._cluster.rank]

    def usable_s(self) -> float | None:
        """The seconds that this session has left for training; None without a time limit."""
        if self._deadline == math.inf:
            return None
        return max(1.0, self.left_s() - self._options.margin - self.reserve_s())

    def left_s(self) -> float:
        """The seconds until this session has to be over; infinite without a time limit."""
        return self._deadline - time.monotonic()

    def clear(self) -> bool:
        """Whether somebody wants the run to rest, so that no launcher should start it again by itself.

        That is said by the STOP file or by an interrupt on any rank, even if the session was ending for another reason.
        The file is removed, so that the next session does not stop at once. To be called by all ranks.
        """
        wanted = self._interrupted
        if self._cluster.is_first and self._file.exists():
            self._file.unlink(missing_ok=True)
            wanted = True
        return any(self._cluster.maximum([wanted]))


def _deadline(options: SessionOptions) -> float:
    """When the session has to be over, on the monotonic clock, which nobody can set; says so."""
    now = time.monotonic()
    limits = []
    if options.time_limit is not None:
        limits.append((now - process_age_s() + options.time_limit, "session.time_limit"))
    surroundings = time_left()
    if surroundings is not None:
        limits.append((now + surroundings[0], surroundings[1]))
    if not limits:
        return math.inf
    deadline, source = min(limits)
    say(source if deadline == math.inf else f"this session ends in {format_duration(deadline - now)}: {source}")
    return deadline
