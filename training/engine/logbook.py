"""Everything that is written about a run while it trains: record, sessions, status, wandb. The first rank's alone.

Training does not end because nobody can write about it: on a full disk lines of the record wait until there is room,
and the other accounts are left as they were.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from statistics import mean
from typing import Any

from training.base.console import say, warn
from training.base.durations import format_duration
from training.engine.metrics import Record
from training.engine.saver import Saver
from training.engine.status import Sessions, Status, write_status
from training.engine.wandb.tracker import WandbOptions, WandbTracker


class Logbook:
    """The books of one session.

    step, validated_step: where the run stands when the session begins. usable_s: what the session has for training, in
    seconds; None without a time limit.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        step: int,
        validated_step: int,
        steps: int,
        world_size: int,
        device: str,
        usable_s: float | None,
        wandb: WandbOptions,
        wandb_id: str | None,
        config: dict[str, Any],
    ):
        self._run_dir, self._steps, self._usable_s = run_dir, steps, usable_s
        self._record = Record(run_dir, resumed_step=step, validated_step=validated_step)
        if self._record.reached > step:
            say(f"the last session had come to step {self._record.reached:,}; what it had not saved is done again")
        self._tracker = WandbTracker(wandb, run_dir, run_id=wandb_id, config=config, lines=self._record.lines)
        self._record.follower = self._tracker.add
        self._sessions = Sessions(run_dir, step=step, steps=steps, world_size=world_size, device=device)
        say(self._sessions.describe(usable_s))
        before = self._sessions.all[-2]["world_size"] if step and len(self._sessions.all) > 1 else world_size
        if before != world_size:
            say(f"the last session had {before} rank(s), this one {world_size}: equal up to rounding only")

    @property
    def wandb_id(self) -> str | None:
        """wandb's id of the run, for the checkpoint."""
        return self._tracker.run_id

    def line(self, kind: str, step: int, **values: Any) -> None:
        """A line of the record, which wandb follows."""
        self._record.write(kind, step, **values)

    def sync(self) -> None:
        """Brings the record to the disk."""
        self._record.sync()

    def came_to(self, step: int) -> None:
        """Notes a sign of life of the session: the step that it has come to."""
        self._sessions.update(step)

    def status(self, status: Status, reason: str, step: int, **more: Any) -> None:
        """status.json (see `write_status`), with what remains to be done."""
        outlook = self._sessions.outlook(self._usable_s)
        with contextlib.suppress(OSError):
            write_status(self._run_dir, status, reason, step=step, steps=self._steps, **more, **outlook)

    def close(
        self, status: Status, reason: str, step: int, best: dict[str, Any], saver: Saver, *, restart: bool
    ) -> None:
        """The end of the session, by whatever reason."""
        self._record.close()
        self.status(status, reason, step, restart=restart, **best)
        saves = {"saves": len(saver.saves_s)}
        if saver.saves_s:
            saves |= {"stall_s": round(mean(saver.stalls_s), 4), "save_s": round(mean(saver.saves_s), 4)}
        self._sessions.end(step, reason, **saves)
        self._tracker.close(status, reason, best)
        if status == "finished":
            seconds = sum(session["seconds"] for session in self._sessions.all)
            best_step = f"the best at step {best['best_step']:,}"
            sessions = f"{len(self._sessions.all)} session(s), {format_duration(seconds)}"
            say(f"finished: {step:,} steps, {best_step}, in {sessions}; see {self._run_dir}")
            return
        if self._sessions.current["from_step"] == step and status == "resumable":
            warn("this session has not done a single step: where sessions are that short, the run will never end")
        say(self._sessions.describe(self._usable_s))
