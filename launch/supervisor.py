"""Sessions of a run on this machine: what starts its ranks, passes signals on to them, and begins again after a crash.

Promises: no rank outlives its supervisor, or a rank that has failed, for more than a minute; the ranks get each signal
once; what they print is theirs, and nothing is added to it but the reason of a crash. The one table of decisions is
here, too (`layout`): how many processes, threads, and where they meet.

The ranks are started here and not by torchrun, since that has no way to pass on how they ended, ends with a traceback
after every signal, kills them 30 seconds later, and leaves them behind when it is killed itself. All that it would do
for them besides is to set the variables below; the ranks then meet at a store that the first of them keeps.

Importing this costs no torch; `layout` imports it.
"""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from training.base.console import counted, is_ignored, warn
from training.base.durations import format_duration
from training.base.environment import LAUNCHER, cores, cores_seen, read_ranks, relay_error_file
from training.base.files import read_plain
from training.base.processes import family_of, handles, kill_all, signal_all
from training.engine.status import EXIT_RESUMABLE

# What asks for a stop; the ranks know what to do about each.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

_LOOK_EVERY_S = 0.1

# When one rank has failed, the others mostly notice; later they are told to leave, and at last they are killed.
_NOTICE_S, _KILL_S = 3.0, 60.0

# Between a crash and the next start, doubled with every session that brings nothing.
_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0

_NOTHING_YET = "before there was anything to save"


@dataclass(frozen=True)
class Layout:
    """How processes share this machine."""

    processes: int
    threads: int | None  # of each; None: one that has the machine to itself decides by itself
    gpus: int
    reason: str

    def __str__(self) -> str:
        threads = f" of {counted(self.threads, 'thread')}" if self.threads is not None and not self.gpus else ""
        return f"{counted(self.processes, 'process')}{threads}: {self.reason}"


def layout(micro_batches: int | None = None, processes: int | None = None) -> Layout:
    """One process for each GPU; on a CPU as many as divide its cores, so that each has as many threads as the others.

    micro_batches: of a step, which the processes have to share equally; where nobody knows, two processes on a CPU.
    processes: how many somebody wants.
    """
    import torch

    gpus, here = torch.cuda.device_count(), cores()  # makes no context
    if processes is None and gpus:
        processes = next(count for count in range(gpus, 0, -1) if micro_batches is None or micro_batches % count == 0)
    elif processes is None:
        processes = math.gcd(here, micro_batches or 2)
    found = counted(gpus, "GPU") if gpus else counted(here, "core")
    shared = f", {counted(micro_batches, 'micro-batch')} a step" if micro_batches is not None else ""
    return Layout(processes, threads_of(processes), gpus, found + shared)


def threads_of(processes: int) -> int | None:
    """How many threads each of so many processes here is to have; None where one may use all that it sees."""
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        return int(given)
    share = max(1, cores() // processes)
    return None if share == cores_seen() else share


def free_port() -> int:
    """A port where two runs on one machine do not meet: the system gives away those above these by itself."""
    while True:
        port = random.randrange(12000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def _variables(processes: int) -> list[dict[str, str]]:
    """The variables of each rank on this machine. srun may have started a supervisor on each of several."""
    node = read_ranks()  # this process among the nodes
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if node.world_size == 1 else {}
    return [
        {
            **meeting,
            "RANK": str(node.rank * processes + place),
            "LOCAL_RANK": str(place),
            "WORLD_SIZE": str(node.world_size * processes),
            "LOCAL_WORLD_SIZE": str(processes),
            LAUNCHER: str(os.getpid()),
        }
        for place in range(processes)
    ]


@dataclass(frozen=True)
class Ending:
    """How a session ended."""

    outcome: Literal["finished", "stopped", "to mend", "crashed"]
    reason: str = ""  # of the last two; of a stop, where no rank has said it

    @property
    def exit_status(self) -> int:
        return {"finished": 0, "stopped": EXIT_RESUMABLE}.get(self.outcome, 1)


def read_error(path: Path) -> str | None:
    """The error that a rank has left there for the user to mend, see `tell_launcher`; None without one."""
    try:
        return read_plain(path, most_bytes=1 << 20).decode("utf-8", "replace")
    except OSError:
        return None


class Session:
    """The processes of one session on this machine."""

    def __init__(self, words: Sequence[str], processes: int, environment: Mapping[str, str]):
        """words: a module and what it is told. environment: all variables, but those of a rank."""
        # In sessions of their own, so that they get a terminal's signal once: from the supervisor.
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-u", "-m", *words],
                env={**environment, **own},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            for own in _variables(processes)
        ]

    def signal(self, number: int) -> None:
        """Passes a signal on. A rank that does not handle signals yet has nothing to save, and ends in silence."""
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number if handles(rank.pid, signal.SIGTERM) else signal.SIGTERM)

    def pause(self, number: int) -> None:
        """Sends SIGSTOP or SIGCONT to the ranks and all that they have started."""
        signal_all(self._family(), number)

    def kill(self) -> None:
        """Ends all that still runs, and what it has started, at once."""
        kill_all(self._family())
        for rank in self._ranks:
            rank.wait()

    def _family(self) -> list[int]:
        """The process ids of the ranks that still run, and of all that they have started."""
        return [each for rank in self._ranks if rank.poll() is None for each in family_of(rank.pid)]

    def wait(self, look: Callable[[], None]) -> list[tuple[int, int]]:
        """Each rank's place and exit status, in the order in which they ended. look: called all the while."""
        ended: dict[int, int] = {}
        failed: float | None = None
        told = False
        while True:
            new = {place: rank.poll() for place, rank in enumerate(self._ranks) if place not in ended}
            # Who was killed is the cause, and whoever noticed in the same moment is not.
            for place, status in sorted(new.items(), key=lambda each: each[1] or 0):
                if status is not None:
                    ended[place] = status
            if len(ended) == len(self._ranks):
                return list(ended.items())
            if failed is None and any(ended.values()):
                failed = time.monotonic()
            since_s = time.monotonic() - failed if failed is not None else 0.0
            if since_s > _KILL_S:
                self.kill()
            elif since_s > _NOTICE_S and not told:
                told = True
                self.signal(signal.SIGTERM)
            look()
            time.sleep(_LOOK_EVERY_S)


class Supervisor:
    """Begins sessions in this process, which from now on passes signals on to their ranks."""

    def __init__(self) -> None:
        self.asked: list[int] = []  # the signals that asked for a stop
        self._session: Session | None = None
        for number in _SIGNALS:
            if number != signal.SIGHUP or not is_ignored(number):  # as `nohup` has it
                signal.signal(number, self._on_signal)
        if not is_ignored(signal.SIGTSTP):
            signal.signal(signal.SIGTSTP, self._pause)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the ranks, which the terminal does not reach, stand still as long as this process does."""
        session = self._session
        if session is not None:
            session.pause(signal.SIGSTOP)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # here it stands still
        signal.signal(signal.SIGTSTP, self._pause)
        if session is not None:
            session.pause(signal.SIGCONT)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)
        if self._session is not None:
            self._session.signal(number)

    def run(
        self,
        words: Sequence[str],
        processes: int,
        *,
        environment: Mapping[str, str] | None = None,
        look: Callable[[Session], None] = lambda session: None,
    ) -> Ending:
        """One session: a module with its words, as so many ranks. look: called several times a second."""
        if self.asked:
            return Ending("stopped", _NOTHING_YET)
        around = {**os.environ, **(environment or {})}
        if (threads := threads_of(processes)) is not None:
            around.setdefault("OMP_NUM_THREADS", str(threads))
        with tempfile.TemporaryDirectory() as folder:
            errors = relay_error_file() or Path(folder, "error")  # the batch scripts look for it themselves
            session = Session(words, processes, {**around, "RELAY_ERROR_FILE": str(errors)})
            try:
                self._session = session
                for number in self.asked:  # while they were being started
                    session.signal(number)
                ended = session.wait(lambda: look(session))
            finally:
                self._session = None
                session.kill()
            return self._ending(ended, read_error(errors))

    def _ending(self, ended: Sequence[tuple[int, int]], to_mend: str | None) -> Ending:
        if to_mend is not None:
            return Ending("to mend", to_mend)
        # Asked to stop, a rank may also be ended by the signal, or leave at the second Ctrl-C; the others notice that.
        told = {130, -signal.SIGTERM, *(-number for number in self.asked)} if self.asked else set()
        counted = ended[:1] if self.asked else ended
        bad = [(place, status) for place, status in counted if status not in {0, EXIT_RESUMABLE, *told}]
        if bad:
            place, status = bad[0]
            memory = ", as the system does where memory runs out" if status == -signal.SIGKILL else ""
            how = (
                f"was ended by {signal.Signals(-status).name}{memory}" if status < 0 else f"ended with status {status}"
            )
            return Ending("crashed", f"rank {read_ranks().rank * len(ended) + place} {how}")
        if not any(status for _, status in ended):
            return Ending("finished")
        has_said = any(status in (0, EXIT_RESUMABLE, 130) for _, status in ended)
        return Ending("stopped", "" if has_said else _NOTHING_YET)

    def run_to_the_end(
        self, session: Callable[[], Ending], newest_step: Callable[[], int], *, failure_limit: int
    ) -> Ending:
        """Sessions, until one ends otherwise than by a crash, or `failure_limit` in a row have brought nothing.

        newest_step: of the run's checkpoints.
        """
        fruitless = 0
        while True:
            before = newest_step()
            ending = session()
            if ending.outcome != "crashed":
                return ending
            step = newest_step()
            fruitless = fruitless + 1 if step <= before else 0
            if self.asked:
                return ending
            if fruitless >= failure_limit:
                found = f"{counted(fruitless, 'session')} in a row came no further than step {step:,}"
                return Ending("crashed", f"{found}; the last: {ending.reason}")
            pause_s = min(_LONGEST_PAUSE_S, _PAUSE_S * 2**fruitless)
            warn(f"{ending.reason}; starting again from step {step:,} in {format_duration(pause_s)}")
            self._sleep(pause_s)
            if self.asked:
                return Ending("stopped", f"before the next session, at step {step:,}")

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.asked:
            time.sleep(_LOOK_EVERY_S)
