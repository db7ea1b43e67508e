"""Everything that is written of a run while it trains: checkpoints, metrics, sessions, status, wandb.

Training does not end because nobody can write about it: on a full disk the lines of metrics.jsonl wait until there is
room, and the other files stay as they were.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.base.console import counted, say, warn
from training.base.durations import format_duration
from training.base.environment import as_no_rank
from training.engine.checkpoint import Tensors
from training.engine.cluster import Cluster
from training.engine.goodput import Clock, goodput, in_words
from training.engine.metrics import MetricsFile
from training.engine.saver import Saver, best_interval
from training.engine.status import Best, Sessions, Status, write_status
from training.engine.stopping import StopFlag
from training.engine.surroundings import changes, commit, surroundings
from training.engine.task import RunOptions
from training.engine.tensorboard import Board
from training.engine.wandb.tracker import WandbTracker

if TYPE_CHECKING:
    from training.engine.address.home import Home

INTERRUPTED = "interrupted twice"
ON_END_LIMIT_S = 15.0
PAGES_EVERY_S = 15.0


class Logbook:
    """What the loop writes through. This one writes nothing: all ranks but the first have it."""

    save_error: str | None = None  # why the last save failed, None if it did not
    wandb_id: str | None = None

    def line(self, kind: str, step: int, **values: Any) -> None:
        """A line of metrics.jsonl, which wandb follows."""

    def set_length(self, steps: int) -> None:
        """To be called when the run turns out to have other steps in all than it was begun with."""

    def prepare(self, tensors: Mapping[str, Tensors]) -> None:
        """Gets ready to save such tensors."""

    def save(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        """Begins a checkpoint of `step`; returns as soon as training may change the tensors."""

    def best_interval(self, step_s: float) -> int:
        """The steps between two saves that lose least, once one is done, for which it waits; 0 where none succeeded."""
        return 0

    def drain(self) -> None:
        """Waits for the save that is in flight."""

    def finish_saving(self) -> None:
        """The same; raises UserError if the save failed and no checkpoint stands."""

    def close(self, status: Status, reason: str, step: int, best: Best, *, restart: bool) -> None:
        """The end of the session, by whatever reason. restart: see `write_status`."""


class FirstRanksLogbook(Logbook):
    """The first rank's, for one session, which begins at `step`."""

    def __init__(
        self,
        config: RunOptions,
        about: Mapping[str, Any],
        cluster: Cluster,
        stop: StopFlag,
        clock: Clock,
        *,
        steps: int,
        step: int,
        validated_step: int,
        best: Best,
        wandb_id: str | None,
        show: Callable[[Path], None],
        home: Home | None = None,
    ):
        """about: what goes into every manifest. steps: of the whole run. show: see `Task`. home: the run's address."""
        self._run_dir, self._steps, self._on_end = config.run_dir, steps, config.session.on_end
        self._checkpoint, self._device = config.checkpoint, cluster.device.type
        self._home, self._left_s = home, stop.left_s
        kept = {**about, "commit": commit()}
        self._saver = saver = Saver(config.run_dir, config.checkpoint, kept, home.notice if home else lambda: None)
        stop.reserve_s, stop.saves_fail = lambda: saver.seconds + (home.seconds if home else 0), lambda: saver.gives_up
        if home is not None:
            stop.is_taken = lambda: home.lost is not None
        self._usable_s = stop.usable_s()
        self._metrics = MetricsFile(config.run_dir, resumed_step=step, validated_step=validated_step)
        if self._metrics.reached > step:
            say(f"the last session had come to step {self._metrics.reached:,}; what it had not saved is done again")
        self._tracker = WandbTracker(
            config.wandb,
            config.run_dir,
            run_id=wandb_id,
            config=shown_config(about),
            lines=self._metrics.lines,
        )
        self.wandb_id = self._tracker.run_id
        self._board = Board(config.run_dir, self._metrics.lines) if config.log.tensorboard else None
        ranks, now = cluster.world_size, surroundings(cluster.device, about["versions"])
        self._sessions = Sessions(
            config.run_dir,
            step=step,
            steps=steps,
            world_size=ranks,
            device=str(cluster.device),
            surroundings=now,
            clock=clock,
            last_sign=self._metrics.last_sign,
        )
        say(self._sessions.describe(self._usable_s))
        if step and len(self._sessions.all) > 1:
            before = self._sessions.all[-2]
            other = changes(before.get("surroundings", {}), now)
            if before["world_size"] != ranks:
                other = [f"ranks: {before['world_size']} -> {ranks}", *other]
            if other:
                say(f"not as in the last session: {', '.join(other)}; the numbers are equal up to rounding only")
        self._write_status("running", "training", step, best, restart=True)
        self._pages = Pages(config.run_dir, show)
        self._pages.refresh()
        if home is not None:
            home.start()

    def line(self, kind: str, step: int, **values: Any) -> None:
        written = self._metrics.write(kind, step, **values)
        self._tracker.add(written)
        if self._board is not None:
            self._board.add(written)
        self._pages.refresh()

    def set_length(self, steps: int) -> None:
        self._steps = self._sessions.steps = steps

    def prepare(self, tensors: Mapping[str, Tensors]) -> None:
        self._saver.prepare(tensors)

    def save(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        self._saver.save(step, tensors, state, first=self._metrics.sync)
        self._sessions.update(step, **self._measured())
        self._pages.refresh()

    def _measured(self) -> dict[str, list[float]]:
        uploads_s = self._home.uploads_s if self._home else []
        return {"stalls_s": self._saver.stalls_s, "saves_s": self._saver.saves_s, "uploads_s": uploads_s}

    def best_interval(self, step_s: float) -> int:
        saver = self._saver
        saver.drain()
        if not saver.saves_s:
            return 0
        stall_s, published_s, hours = saver.stalls_s[-1], saver.saves_s[-1], self._checkpoint.hours_between_kills
        found = best_interval(step_s, stall_s, published_s, hours, self._device)
        every = format_duration(found * step_s)
        rule = f"with a kill every {hours:g} hours one every {found:,} steps ({every}) loses least"
        say(f"a save takes {published_s:,.2f} s: {rule}")
        return found

    def drain(self) -> None:
        self._saver.drain()

    def finish_saving(self) -> None:
        self._saver.drain()
        self._saver.check()
        self.save_error = self._saver.error

    def close(self, status: Status, reason: str, step: int, best: Best, *, restart: bool) -> None:
        sessions, home = self._sessions, self._home
        restart = restart and (home is None or home.lost is None)
        self._metrics.close()
        self._write_status(status, reason, step, best, restart=restart)
        sessions.end(step, reason, **self._measured())
        self._pages.close()
        if self._board is not None:
            self._board.close()
        hours = sessions.hours()
        word = Word(self._on_end, self._run_dir, status, reason) if self._on_end is not None else None
        self._tracker.close(status, reason, {**best, "goodput": round(goodput(hours)[1], 4)})
        if word is not None:
            word.wait()
        if home is not None and reason != INTERRUPTED:
            home.finish(self._left_s())
        say(in_words(hours))
        if status == "finished":
            trained = format_duration(sum(session["seconds"] for session in sessions.all))
            best_step = "none validated" if best["best_step"] is None else f"the best at step {best['best_step']:,}"
            sessions_done = f"{counted(len(sessions.all), 'session')}, {trained}"
            say(f"finished: {step:,} steps, {best_step}, in {sessions_done}; see {self._run_dir}")
            return
        if sessions.current["from_step"] == step and status == "resumable":
            warn("this session has not done a single step: where sessions are that short, the run will never end")
        say(sessions.describe(self._usable_s))

    def _write_status(self, status: Status, reason: str, step: int, best: Best, *, restart: bool) -> None:
        """status.json, with what remains to be done."""
        outlook = self._sessions.outlook(self._usable_s)
        hours = self._sessions.hours()
        of_all, of_sessions = (round(share, 4) if hours["steps"] else None for share in goodput(hours))
        with contextlib.suppress(OSError):
            write_status(
                self._run_dir,
                status,
                reason,
                restart=restart,
                step=step,
                steps=self._steps,
                **best,
                **outlook,
                goodput=of_sessions,
                goodput_since_first_start=of_all,
            )


def shown_config(about: Mapping[str, Any]) -> dict[str, Any]:
    """A run's options as wandb shows them: for the name of the run that it began from stands what is known of it."""
    return {**about["config"], **({"init_from": about["init_from"]} if "init_from" in about else {})}


class Pages:
    """The run's pages, made anew behind the steps, every few seconds at most. A failure costs nothing.

    They take the interpreter from the steps while they are made, and longer the longer the record is: so at most a
    hundredth of the time goes into them.
    """

    def __init__(self, run_dir: Path, show: Callable[[Path], None]):
        self._run_dir, self._show = run_dir, show
        self._thread: threading.Thread | None = None
        self._next = -math.inf
        self._failed = False

    def refresh(self) -> None:
        """Begins to make them; returns at once."""
        is_free = self._thread is None or not self._thread.is_alive()
        if is_free and time.monotonic() > self._next:
            self._thread = threading.Thread(target=self._make, name="pages", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Makes them for the last time."""
        if self._thread is not None:
            self._thread.join()
        self._make()

    def _make(self) -> None:
        began = time.monotonic()
        try:
            self._show(self._run_dir)
        except Exception as error:
            if not self._failed:
                warn(f"the run's page could not be made ({error!r}); the run goes on without")
            self._failed = True
        ended = time.monotonic()
        self._next = ended + max(PAGES_EVERY_S, 100 * (ended - began))


class Word:
    """The command that a user wants to be run at the end of a session; what goes wrong with it is a warning."""

    def __init__(self, command: str, run_dir: Path, status: Status, reason: str):
        about = {"RELAY_RUN_DIR": str(run_dir.resolve()), "RELAY_STATUS": status, "RELAY_REASON": reason}
        quiet = subprocess.DEVNULL
        self._end = time.monotonic() + ON_END_LIMIT_S
        self._process = None
        try:
            self._process = subprocess.Popen(
                ["sh", "-c", command],
                env={**as_no_rank(), **about},
                stdin=quiet,
                stdout=quiet,
                stderr=quiet,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            warn(f"session.on_end could not be run: {error}")

    def wait(self) -> None:
        """Until the command has ended, or has had its time."""
        if self._process is None:
            return
        try:
            found = self._process.wait(max(0.0, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            warn(f"session.on_end had not ended after {ON_END_LIMIT_S:g} s, so it was ended")
        else:
            if found:
                warn(f"session.on_end ended with status {found}; the run is as it says")
