"""What stands beside a run's record: how it stands now (status.json), and all its sessions (sessions.json).

Read by people, launchers and the report. Nothing here imports torch, so that a launcher's look costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
import time
from pathlib import Path
from typing import Any, Literal, TypedDict

from training.base.durations import format_duration
from training.base.environment import job_id
from training.base.files import recover, write_atomically, writing_to

SESSIONS = "sessions.json"
STOP_FILE = "STOP"  # made by anybody, it ends the session
Status = Literal["running", "finished", "resumable", "failed"]
EXIT_RESUMABLE = 75  # EX_TEMPFAIL: try again later


class Best(TypedDict):
    """The validation of highest token accuracy so far; None before the first."""

    best_step: int | None
    best_accuracy: float | None


def write_status(run_dir: Path, status: Status, reason: str, *, restart: bool, **more: Any) -> None:
    """Writes status.json: how the run stands and why; what is not in `more` stays as it is.

    restart: whether a launcher should begin another session by itself, since one may get further though nobody changed
    anything. So not where the user stopped the run, or has something to mend first.
    """
    kept = read_status(run_dir) or {}
    content = {**kept, "status": status, "reason": reason, "restart": restart, **more, "time": _now()}
    write_atomically(run_dir / "status.json", json.dumps(content, indent=2) + "\n")


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What `write_status` wrote last; None where there is nothing that can be read."""
    try:
        found = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"status", "reason", "restart"} <= found.keys() else None


def read_sessions(run_dir: str | Path) -> list[dict[str, Any]]:
    """All sessions of a run, the first one first; none where there is no record, or a damaged one."""
    try:
        return json.loads(Path(run_dir, SESSIONS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []


def saved_steps(run_dir: str | Path) -> dict[int, Path]:
    """The steps of the published checkpoints, oldest first, with their folders; told by name, nothing is verified."""
    folders = sorted(Path(run_dir, "checkpoints").glob("step-*"))
    steps = {folder: folder.name.removeprefix("step-") for folder in folders}
    return {int(step): folder for folder, step in steps.items() if step.isdigit()}


def end_killed_saves(run_dir: Path) -> None:
    """Brings back a checkpoint that was being replaced when a kill came, and removes unfinished ones.

    To be called by whoever holds the run folder.
    """
    for path in Path(run_dir, "checkpoints").glob(".step-*"):
        name, _, state = path.name[1:].rpartition(".")
        if state == "replaced":
            recover(path.with_name(name))
        elif state == "partial":
            shutil.rmtree(path, ignore_errors=True)


class Sessions:
    """sessions.json, and what it tells about the sessions to come. Used on one rank only.

    An entry: number, host, job (of SLURM), world_size, device, started, from_step, step, seen (the last sign of life),
    ended, reason, seconds, saves, stall_s and save_s (of a save: training kept waiting, until published; means).
    """

    def __init__(self, run_dir: Path, *, step: int, steps: int, world_size: int, device: str):
        self._run_dir, self._steps = run_dir, steps
        self._began = time.monotonic()
        self.all = read_sessions(run_dir)
        for session in self.all:
            if session["ended"] is None:  # nobody lived to write it down
                session |= {"ended": session["seen"], "reason": "killed, or its machine went down"}
        self.current: dict[str, Any] = {
            "number": len(self.all) + 1,
            "host": socket.gethostname(),
            "job": job_id(),
            "world_size": world_size,
            "device": device,
            "started": _now(),
            "from_step": step,
            "step": step,
            "seen": _now(),
            "ended": None,
            "reason": None,
            "seconds": 0.0,
        }
        self.all.append(self.current)
        with writing_to(run_dir, option="--run_dir"):
            self._write()

    def update(self, step: int, **more: Any) -> None:
        """Notes the step that the session has come to."""
        self.current |= {"step": step, "seen": _now(), "seconds": round(time.monotonic() - self._began, 1), **more}
        with contextlib.suppress(OSError):  # on a full disk the account is lost, not what it was to tell
            self._write()

    def end(self, step: int, reason: str, **more: Any) -> None:
        """Notes how the session ended."""
        self.update(step, ended=_now(), reason=reason, **more)

    def _write(self) -> None:
        write_atomically(self._run_dir / SESSIONS, json.dumps(self.all, indent=2) + "\n")

    def outlook(self, usable_s: float | None) -> dict[str, Any]:
        """What remains: steps, the seconds and sessions they will take and when that is over, as far as is known.

        The pace is that of this session, or of the one before if this one has just begun; validations and saves count.
        usable_s: what this session had for training at its beginning; None if it has no limit.
        """
        left = self._steps - self.current["step"]
        step_s = next((found for session in reversed(self.all[-2:]) if (found := pace_s(session))), None)
        found: dict[str, Any] = {"sessions_done": len(self.all), "steps_left": left}
        if step_s is not None:
            remaining_s = left * step_s
            found["remaining_s"] = round(remaining_s)
            if usable_s is not None:
                ended = self.current["ended"] is not None
                rest_s = remaining_s if ended else remaining_s - max(0.0, usable_s - (time.monotonic() - self._began))
                found["sessions_to_go"] = max(0, math.ceil(rest_s / usable_s))
        return found

    def describe(self, usable_s: float | None) -> str:
        """`outlook` in words."""
        outlook = self.outlook(usable_s)
        words = f"session {self.current['number']}: {outlook['steps_left']:,} steps to go"
        if "remaining_s" in outlook:
            remaining_s = outlook["remaining_s"]
            end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + remaining_s))
            words += f", {format_duration(remaining_s)} of training, at {end} if there is no break"
        if "sessions_to_go" in outlook:
            words += f"; sessions to go after this one: {outlook['sessions_to_go']}"
        return words


def pace_s(session: dict[str, Any]) -> float | None:
    """Seconds a step of a session took, with its validations and saves; None before it has done one."""
    done = session["step"] - session["from_step"]
    return session["seconds"] / done if done > 0 else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
