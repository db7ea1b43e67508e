"""A thread in each rank that notices what the rank itself cannot: that it hangs, or that its launcher is gone.

The training tells it what it is about to do (`beat`). When it has heard nothing for the time limit, every rank's
watchdog leaves a report with the stacks of its process in the run folder. Together these tell which rank is behind and
which only wait for it. That is printed, and the processes end with an error, so that a hanging run does not burn its
allocation. A rank that cannot even write a report (its process is stopped, its machine is gone) is named too.

Time in which a rank stood still itself does not count for it: a run that is paused, all of it, for however long, goes
on. So the ranks of a run wait for each other as long as they have to, and the watchdog alone decides what is too long.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict

from training.base.console import say_as_any_rank, tell_launcher
from training.base.durations import format_duration
from training.base.files import create
from training.engine import sentry
from training.engine.cluster import Cluster, Watcher
from training.engine.run_folder import keep_private
from training.engine.status import write_status
from training.engine.task import RunOptions

# How often the thread looks; and how long it waits for the reports of the others, which look as often.
_LOOK_EVERY_S = 0.5
_REPORTS_S = 3.0

# A thread that looks so much later than it should was not late: its process was paused, or Python's lock was taken.
_LATE_S = 2.0

# How long all of that may take before the process is ended without a report.
_REPORT_PATIENCE_S = 30.0

# What is no step, such as loading a model from a slow disk, may take so much longer.
_SLOW_S = 1200.0

# How long the ranks of a run wait for each other, at most, in a collective: a pause counts there, even of all ranks.
_LONGEST_PAUSE_S = 7 * 24 * 3600.0

# Makes a process print its stacks, whatever it is doing. Nobody else uses it but debuggers.
_PRINT_STACKS = signal.SIGTRAP

# Without a launcher to end it, a rank that does not move is given less time.
_ORPHAN_TIMEOUT_S = 60.0

FOLDER = "hang"


class SignOfLife(TypedDict):
    """What a rank's watchdog reports about its rank."""

    rank: int
    host: str
    pid: int
    beats: int
    doing: str


@contextmanager
def watched_ranks(config: RunOptions) -> Iterator[Cluster]:
    """The processes of a run, each with a watchdog from before they meet until they part."""
    if config.private:
        keep_private(config.run_dir)
    cluster = Cluster(_LONGEST_PAUSE_S, deterministic=config.deterministic)
    with Watchdog(config.run_dir, cluster, config.session.hang_timeout) as cluster.watcher, cluster:
        yield cluster


class Watchdog(Watcher):
    """A context around everything that a rank does."""

    _since: float

    def __init__(self, run_dir: Path, cluster: Cluster, timeout_s: float):
        self._folder, self._run_dir = run_dir / FOLDER, run_dir
        self._rank, self._world_size = cluster.rank, cluster.world_size
        self._timeout_s, self._launcher = timeout_s, cluster.launcher
        self._look_every_s = min(_LOOK_EVERY_S, timeout_s / 4)
        self._beats, self._may_write = 0, False
        self._looked, self._paused_s, self._looking = time.monotonic(), 0.0, threading.Lock()
        self.beat("the start", slow=True)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        faulthandler.register(_PRINT_STACKS, file=2)
        command = [sys.executable, "-I", "-S", sentry.__file__, str(os.getpid()), str(int(_PRINT_STACKS))]
        self._sentry = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, bufsize=0, start_new_session=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        assert self._sentry.stdin is not None
        self._sentry.stdin.close()
        self._sentry.wait()
        faulthandler.unregister(_PRINT_STACKS)

    def may_write(self) -> None:
        with suppress(OSError):  # what an earlier session left
            self._report_of(self._rank).unlink(missing_ok=True)
            self._stack_of(self._rank).unlink(missing_ok=True)
            self._folder.rmdir()
        self._may_write = True

    def paused_s(self) -> float:
        self._look()
        return self._paused_s

    def _look(self) -> float:
        """The time, after counting what has been a pause: then nobody looked, though the watchdog does all the time."""
        with self._looking:
            now = time.monotonic()
            late_s = now - self._looked - self._look_every_s
            if late_s > _LATE_S:
                self._paused_s += late_s
                self._since = min(now, self._since + late_s)
            self._looked = now
            return now

    def beat(self, doing: str, slow: bool = False) -> None:
        self._beats += 1
        self._doing, self._since = doing, time.monotonic()
        self._limit_s = self._timeout_s + (_SLOW_S if slow else 0)

    def _watch(self) -> None:
        assert self._sentry.stdin is not None
        while not self._over.wait(self._look_every_s):
            now, limit_s = self._look(), self._limit_s
            if self._launcher is not None and self._launcher.is_gone():
                limit_s = min(limit_s, _ORPHAN_TIMEOUT_S)
            # If a library holds Python's lock for ever, this thread stands still as well; then the sentry ends the
            # process. The run folder may be what hangs, too, and then no report can be written.
            with suppress(OSError):  # somebody has killed it
                self._sentry.stdin.write(b"%f\n" % (limit_s + _REPORT_PATIENCE_S))
            if now - self._since > limit_s:
                self._end(now - self._since)

    def _end(self, silent_s: float) -> None:
        """Says who hangs, and ends the process whatever happens."""
        message = (
            f"rank {self._rank} made no progress for {format_duration(silent_s)} (session.hang_timeout) since it began "
            f"with {self._doing!r}"
        )
        try:
            if self._may_write:
                self._report(silent_s)
            else:
                self._say_own(message)
        except Exception as error:  # a full disk, above all
            self._say_own(f"{message}, and cannot report it in {self._folder}: {error}")
        finally:
            sys.stderr.flush()
            os._exit(1)

    def _say_own(self, message: str) -> None:
        say_as_any_rank(f"error: {message}")
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        tell_launcher(message, to_mend=False)

    def _report(self, silent_s: float) -> None:
        """Leaves a report, waits for those of the other ranks, and says who hangs."""
        report: SignOfLife = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beats": self._beats,
            "doing": self._doing,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        with create(self._stack_of(self._rank)) as file:
            faulthandler.dump_traceback(file, all_threads=True)
        path = self._report_of(self._rank)
        with create(path.with_suffix(".partial")) as file:
            file.write(json.dumps(report).encode())
        path.with_suffix(".partial").replace(path)
        end = time.monotonic() + _REPORTS_S + 2 * _LOOK_EVERY_S
        while time.monotonic() < end and len(reports := self._reports()) < self._world_size:
            time.sleep(0.1)
        message, behind = self._verdict(reports, silent_s)
        if self._rank == min(report["rank"] for report in reports):
            say_as_any_rank(f"error: {message}\n{self._stacks(behind)}")
            tell_launcher(message, to_mend=False)
            with suppress(OSError):
                write_status(self._run_dir, "failed", message, restart=True)
        else:
            time.sleep(1)  # the launcher ends all when the first has gone; that one should be the one with the message

    def _stack_of(self, rank: int) -> Path:
        return self._folder / f"stack-{rank}.txt"

    def _report_of(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _reports(self) -> list[SignOfLife]:
        paths = [path for path in map(self._report_of, range(self._world_size)) if path.exists()]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def _verdict(self, reports: list[SignOfLife], silent_s: float) -> tuple[str, list[int]]:
        """What to say, and the ranks whose stacks belong to it."""
        silent = sorted(set(range(self._world_size)) - {report["rank"] for report in reports})
        for_so_long = f"for {format_duration(silent_s)} (session.hang_timeout)"
        after = "the checkpoints stand, and the same command continues"
        if silent:
            named = ", ".join(map(str, silent))
            return (
                f"rank {named} of {self._world_size} gives no sign of life {for_so_long}: its process is stopped or "
                f"its machine is gone, and the others wait; {after}",
                [],
            )
        last = min(report["beats"] for report in reports)
        behind = [report for report in reports if report["beats"] == last]
        if len(behind) == len(reports) > 1:
            return (
                f"no rank made progress {for_so_long}; all began with {behind[0]['doing']!r}. {after.capitalize()}",
                [report["rank"] for report in behind],
            )
        who = ", ".join(f"rank {each['rank']} (process {each['pid']} on {each['host']})" for each in behind)
        waiting = ", ".join(str(each["rank"]) for each in reports if each["beats"] > last)
        return (
            f"{who} hangs: no progress {for_so_long} since it began with {behind[0]['doing']!r}"
            + (f", and rank {waiting} waits for it" if waiting else "")
            + f"; {after}",
            [report["rank"] for report in behind],
        )

    def _stacks(self, ranks: list[int]) -> str:
        texts = [f"where rank {rank} is:\n{self._stack_of(rank).read_text('utf-8')}" for rank in ranks]
        return "\n".join([*texts, f"the stacks of all ranks are in {self._folder}"])
