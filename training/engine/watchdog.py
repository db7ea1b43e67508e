"""A thread in each rank that notices what the rank itself cannot: that it hangs, or that its launcher is gone.

The training tells it what it is about to do (`beat`). When it has heard nothing for the time limit, every rank's
watchdog leaves a report with the stacks of its process in the run folder. Together these tell which rank is behind and
which only wait for it. That is printed, and the processes end with an error, so that a hanging run does not burn its
allocation. A rank that cannot even write a report (its process is stopped, its machine is gone) is named too.

If the launcher dies, a polite stop is asked for: the ranks save, and none outlives it for long.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TypedDict

from training.base.console import say_as_any_rank, tell_launcher
from training.base.durations import format_duration
from training.engine.cluster import Cluster
from training.engine.status import write_status
from training.engine.stopping import StopFlag

# How often the thread looks; and how long it waits for the reports of the others, which look as often.
_LOOK_EVERY_S = 0.5
_REPORTS_S = 3.0

# How long all of that may take before the process is ended without a report.
_REPORT_PATIENCE_S = 30.0

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


class Watchdog:
    """A context around everything that a rank does in a session."""

    def __init__(self, run_dir: Path, cluster: Cluster, stop: StopFlag, timeout_s: float):
        self._folder, self._run_dir = run_dir / FOLDER, run_dir
        self._rank, self._world_size = cluster.rank, cluster.world_size
        self._stop, self._timeout_s = stop, timeout_s
        self._launcher = cluster.launcher
        self._beats, self._doing, self._since = 0, "starting", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str) -> None:
        """A sign of life: the rank now begins with `doing`. All ranks give equally many, at the same places."""
        self._beats += 1
        self._doing, self._since = doing, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(_LOOK_EVERY_S, self._timeout_s / 4)):
            timeout_s = self._timeout_s
            if self._launcher is not None and self._launcher.is_gone():
                self._stop.launcher_is_gone()
                timeout_s = min(timeout_s, _ORPHAN_TIMEOUT_S)
            # If a library holds Python's lock for ever, this thread stands still as well; faulthandler's does not.
            # It ends the process, too: the run folder may be what hangs, and then no report can be written.
            faulthandler.dump_traceback_later(timeout_s + _REPORT_PATIENCE_S, exit=True)
            silent_s = time.monotonic() - self._since
            if silent_s > timeout_s:
                self._end(silent_s)

    def _end(self, silent_s: float) -> None:
        """Says who hangs, and ends the process whatever happens."""
        try:
            self._report(silent_s)
        except Exception as error:  # a full disk, above all
            say_as_any_rank(
                f"error: rank {self._rank} made no progress for {format_duration(silent_s)} (session.hang_timeout) "
                f"since it began with {self._doing!r}, and cannot report it in {self._folder}: {error}"
            )
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        finally:
            sys.stderr.flush()
            os._exit(1)

    def _report(self, silent_s: float) -> None:
        """Leaves a report, waits for those of the other ranks, and says who hangs."""
        report: SignOfLife = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beats": self._beats,
            "doing": self._doing,
        }
        self._folder.mkdir(exist_ok=True)
        with (self._folder / f"stack-{self._rank}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        path = self._folder / f"rank-{self._rank}.json"
        path.with_suffix(".partial").write_text(json.dumps(report), encoding="utf-8")
        path.with_suffix(".partial").replace(path)
        end = time.monotonic() + _REPORTS_S + 2 * _LOOK_EVERY_S
        while time.monotonic() < end and len(reports := self._reports()) < self._world_size:
            time.sleep(0.1)
        message, behind = self._verdict(reports, silent_s)
        if self._rank == min(report["rank"] for report in reports):
            say_as_any_rank(f"error: {message}\n{self._stacks(behind)}")
            tell_launcher(message, to_mend=False)
            with contextlib.suppress(OSError):
                write_status(self._run_dir, "failed", message, restart=True)
        else:
            time.sleep(1)  # the launcher ends all when the first has gone; that one should be the one with the message

    def _reports(self) -> list[SignOfLife]:
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self._folder.glob("rank-*.json"))]

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
        texts = [f"where rank {rank} is:\n{(self._folder / f'stack-{rank}.txt').read_text('utf-8')}" for rank in ranks]
        return "\n".join([*texts, f"the stacks of all ranks are in {self._folder}"])
