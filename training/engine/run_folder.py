"""A run's folder: held by one run at a time, its sessions on record, its end written down.

runs/NAME/
  config.yaml  data.json  tokenizer/   what the run is
  checkpoints/                         see training.engine.checkpoint
  metrics.jsonl                        see training.engine.tracking
  sessions.json                        every session: when, where, from which step to which, why it ended
  status.json                          running, finished, resumable or failed, and why
  lock                                 held by the running session
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from data_prep.files import write_atomically, writing_to
from launch.config import differing_keys
from launch.console import UserError, format_duration, say
from launch.environment import job_id
from training.engine.checkpoint import Checkpoint, checkpoints, copy_checkpoint, newest_valid
from training.engine.tracking import METRICS

try:
    import fcntl
except ImportError:  # not POSIX: two runs in one folder are then not told apart
    fcntl = None  # type: ignore[assignment]

SESSIONS = "sessions.json"
WANDB_FILE = "wandb.json"
Status = Literal["running", "finished", "resumable", "failed"]

# A session that was told to stop may still be writing its checkpoint when the next one starts.
_LOCK_PATIENCE_S = 10.0


class Data(Protocol):
    """A prepared data set, as far as the engine cares: where it lies, and what identifies its content.

    folder: with meta.json and tokenizer/, which a run folder gets a copy of. identity: goes into every checkpoint.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def identity(self) -> dict[str, str]: ...


def write_status(run_dir: Path, status: Status, reason: str, **more: Any) -> None:
    """Writes status.json: how the run stands and why; what is not in `more` stays as it is."""
    content = {**(read_status(run_dir) or {}), "status": status, "reason": reason, **more, "time": _now()}
    write_atomically(run_dir / "status.json", json.dumps(content, indent=2) + "\n")


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What `write_status` wrote last; None where there is nothing that can be read."""
    try:
        return json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def read_sessions(run_dir: str | Path) -> list[dict[str, Any]]:
    """All sessions of a run, the first one first; none where there is no record, or a damaged one."""
    try:
        return json.loads(Path(run_dir, SESSIONS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []


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
        pace_s = next((_pace_s(session) for session in reversed(self.all[-2:]) if _pace_s(session)), None)
        found: dict[str, Any] = {"sessions_done": len(self.all), "steps_left": left}
        if pace_s is not None:
            remaining_s = left * pace_s
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


def _pace_s(session: dict[str, Any]) -> float | None:
    done = session["step"] - session["from_step"]
    return session["seconds"] / done if done > 0 else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


class RunFolder:
    """The folder of a run that is about to train here. Used on one rank only."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._lock: TextIO | None = None

    def open(
        self, about: dict[str, Any], data: Data, *, config: str, source: Path | None, may_change: set[str]
    ) -> Checkpoint | None:
        """Locks the folder and finds the newest valid checkpoint, here or in `source`, whose run is then copied here.

        about: the definition of the run: task, config (of which the keys `may_change` do not count), data, and what it
        is built on. A new run's folder gets `config` (YAML), data description and tokenizer instead of a checkpoint, so
        that it can be understood and used without its data. Raises UserError when the folder is in use or is another
        run's.
        """
        with writing_to(self.run_dir, option="--run_dir"):
            Path(self.run_dir, "checkpoints").mkdir(parents=True, exist_ok=True)
            self._take_lock()
            latest = newest_valid(self.run_dir)
            if latest is not None:
                _check_same_run(latest, about, may_change)
            if source is not None:
                if not (source / "checkpoints").is_dir():
                    raise UserError(f"--resume_from {source} is not a run folder: there is no folder checkpoints in it")
                other = newest_valid(source, set_aside=False)
                if other is not None and (latest is None or other.step > latest.step):
                    _check_same_run(other, about, may_change)
                    latest = _carry_over(source, self.run_dir, other)
            if latest is None:
                known = self.run_dir / "config.yaml"
                if known.exists() and known.read_text(encoding="utf-8") != config:
                    # Another run was begun here and never came to a checkpoint: its name in wandb is not ours.
                    (self.run_dir / WANDB_FILE).unlink(missing_ok=True)
                write_atomically(known, config)
                write_atomically(self.run_dir / "data.json", (data.folder / "meta.json").read_bytes())
                shutil.copytree(data.folder / "tokenizer", self.run_dir / "tokenizer", dirs_exist_ok=True)
        return latest

    def _take_lock(self) -> None:
        """The right to write here, kept until the process ends, however it ends: the kernel keeps the book.

        On a network file system without locks there is no protection; the folder is then used as if it were free.
        """
        self._lock = file = (self.run_dir / "lock").open("a+", encoding="utf-8")
        end = time.monotonic() + _LOCK_PATIENCE_S
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    file.seek(0)
                    raise UserError(
                        f"{self.run_dir} is in use by {file.read().strip() or 'another process'}: wait for it or stop "
                        f"it (touch {self.run_dir}/STOP), or choose another --run_dir; nothing was changed"
                    ) from None
                time.sleep(0.2)
            except OSError:  # no locks here
                return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def _check_same_run(latest: Checkpoint, about: dict[str, Any], may_change: set[str]) -> None:
    def definition(about: dict[str, Any]) -> dict[str, Any]:
        config = {key: value for key, value in about["config"].items() if key not in may_change}
        return {"task": about["task"], **config, "data": about["data"], "built_on": about.get("built_on", {})}

    differences = differing_keys(definition(latest.manifest), definition(about))
    if differences:
        raise UserError(
            f"{latest.folder.parents[1]} holds a run with another definition ({'; '.join(differences)}): "
            "restore these keys to continue it, or choose another --run_dir; nothing was changed"
        )


def _carry_over(source: Path, run_dir: Path, newest: Checkpoint) -> Checkpoint:
    """Copies what the run in `source` needs to go on in `run_dir`: record, sessions, newest and best checkpoint.

    `source` is only read. `newest` is its newest valid checkpoint; the copy of it, which is made last, is returned: a
    kill before leaves a folder that the same command fills again.
    """
    say(f"continuing the run in {source} at step {newest.step:,}: copying it to {run_dir}")
    with writing_to(run_dir, option="--run_dir"):
        for path in source.iterdir():
            if path.is_file() and path.name not in ("lock", "status.json"):
                write_atomically(run_dir / path.name, path.read_bytes())
        for name in ("tokenizer", "wandb"):
            if (source / name).is_dir():
                shutil.copytree(source / name, run_dir / name, dirs_exist_ok=True, copy_function=shutil.copyfile)
        (run_dir / METRICS).touch()
    for older in checkpoints(source):
        if older.step < newest.step and older.verify() is None:
            copy_checkpoint(older, run_dir)
    return copy_checkpoint(newest, run_dir)
