"""How a run stands now (status.json), all its sessions (sessions.json), and what a line of metrics.jsonl says.

Read by people, launchers and the report. Nothing here imports torch, so that a launcher's look costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, Literal, NotRequired

import yaml
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from training.base.durations import format_duration
from training.base.environment import job_id
from training.base.files import read_plain, recover, write_atomically
from training.base.strict_yaml import read_yaml
from training.engine.goodput import Clock, Kind, hours_of

CONFIG = "config.yaml"
STATUS = "status.json"
SESSIONS = "sessions.json"
METRICS = "metrics.jsonl"
WANDB_FILE = "wandb.json"
KEPT = "kept_steps.json"  # the steps whose checkpoints are never removed
STOP_FILE = "STOP"  # made by anybody, it ends the session
Status = Literal["running", "finished", "resumable", "failed"]
EXIT_RESUMABLE = 75  # EX_TEMPFAIL: try again later
_KILLED = "killed, or its machine went down"


# What a stranger's record may hold: steps, seconds, and moments in seconds since 1970.
_MOST_STEPS, _LATEST = 1 << 53, 1e11
Steps = Annotated[int, Field(ge=0, lt=_MOST_STEPS)]
Seconds = Annotated[float, Field(ge=0, lt=1e10)]
Moment = Annotated[float, Field(ge=0, lt=_LATEST)]


@with_config(ConfigDict(allow_inf_nan=False))
class Session(TypedDict):
    """An entry of sessions.json. Times are local, as `2026-01-31T12:00:00+0100`."""

    number: int
    host: str
    job: str | None  # of SLURM
    world_size: Steps
    device: str
    started: str
    from_step: Steps
    step: Steps
    seen: str  # the last sign of life
    ended: str | None
    reason: str | None
    seconds: Seconds
    surroundings: NotRequired[dict[str, str]]  # what it computed with, see `training.engine.surroundings`
    saves: NotRequired[Steps]  # that were published
    stall_s: NotRequired[Seconds]  # how long a save kept the training waiting, in the mean
    save_s: NotRequired[Seconds]  # how long a save took until it was published, in the mean
    uploads: NotRequired[Steps]  # checkpoints that have arrived at the run's address
    upload_s: NotRequired[Seconds]  # how long one took, in the mean
    began: NotRequired[Moment]  # when its process did, seconds since 1970
    hours: NotRequired[dict[Kind, Seconds]]  # seconds since then by kind, up to its last save or its end
    last_sign: NotRequired[Moment]  # of one that was killed: when its last line was written


@with_config(ConfigDict(extra="allow", allow_inf_nan=False))
class _StatusFile(TypedDict):
    """status.json, as far as others rely on it."""

    status: Status
    reason: str
    restart: bool
    step: NotRequired[Steps]
    steps: NotRequired[Steps]
    goodput: NotRequired[float | None]  # of the sessions' own time; None before the first step


# What wandb accepts, and what is safe in a path.
WANDB_ID = r"^[\w-][\w.-]{0,127}$"
_WandbName = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f/\\#?%:]+$")]

_WandbText = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]


class WandbRecord(TypedDict):
    """wandb.json: the run's place in wandb, and the last step that the server is known to have."""

    id: Annotated[str, StringConstraints(pattern=WANDB_ID)]
    project: NotRequired[_WandbName]
    entity: NotRequired[_WandbName | None]  # None: that of the key
    name: NotRequired[_WandbText]
    group: NotRequired[_WandbText | None]  # what shows runs together
    folder: NotRequired[str | None]  # of wandb's own files; None: the run folder
    arrived: NotRequired[int]


# What the JSON files beside the checkpoints hold.
RECORDS: dict[str, TypeAdapter[Any]] = {
    STATUS: TypeAdapter(_StatusFile),
    SESSIONS: TypeAdapter(list[Session]),
    WANDB_FILE: TypeAdapter(WandbRecord),
    KEPT: TypeAdapter(list[Steps]),
}


class Example(TypedDict):
    """A held-out sample, and what the model answered."""

    source: str
    reference: str
    answer: str


_EXAMPLES = TypeAdapter(list[Example])
_LARGEST, _MOST_KEYS = 1e200, 64  # of a line of metrics.jsonl


class Outlook(TypedDict):
    """What remains of a run, as far as is known."""

    sessions_done: int
    steps_left: int
    remaining_s: NotRequired[int]
    sessions_to_go: NotRequired[int]


class Best(TypedDict):
    """The best validation so far, by the score that is called `best_by`; None before the first."""

    best_step: int | None
    best_score: float | None
    best_by: str


def badness(score: float, by: str) -> float:
    """What is lower for the better of two scores of that name: a lower loss, more of any other."""
    return score if by == "loss" else -score


def read_config(run_dir: Path) -> dict[str, Any] | None:
    """The options in config.yaml, as they were written; None where there is nothing that can be read."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        found = read_yaml(read_plain(run_dir / CONFIG).decode())
        return found if isinstance(found, dict) else None
    return None


def write_status(run_dir: Path, status: Status, reason: str, *, restart: bool, **more: Any) -> None:
    """Writes status.json: how the run stands and why; what is not in `more` stays as it is.

    restart: whether a launcher should begin another session by itself, because it may get further though nobody has
    changed anything; not where the user stopped the run, or has something to mend first.
    """
    kept = read_status(run_dir) or {}
    content = {**kept, "status": status, "reason": reason, "restart": restart, **more, "time": _now()}
    write_atomically(run_dir / STATUS, json.dumps(content, indent=2) + "\n")


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What `write_status` wrote last; None where there is nothing that can be read."""
    found: dict[str, Any] | None = read_record(run_dir, STATUS)
    return found


def read_sessions(run_dir: str | Path) -> list[Session]:
    """All sessions of a run, the first one first; none where there is no sessions.json, or a damaged one."""
    return read_record(run_dir, SESSIONS) or []


def read_record(run_dir: str | Path, name: str) -> Any:
    """What the file of RECORDS called `name` holds; None where there is none, or where it holds something else."""
    try:
        return RECORDS[name].validate_json(read_plain(Path(run_dir, name)))
    except (OSError, ValidationError):
        return None


def metrics_line(text: bytes) -> dict[str, Any] | None:
    """What a line of metrics.jsonl says: `kind`, `step`, `time`, `loss` and more; None where it cannot be read.

    All but `kind` and the `examples` of a validation are numbers. What was no finite number, the loss too, is None,
    whether written as null or as NaN.
    """
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        values: dict[str, Any] = json.loads(text)
        kind = values.pop("kind")
        examples = {"examples": _EXAMPLES.validate_python(values.pop("examples"))} if "examples" in values else {}
        numbers = {key: value if value is None or abs(value) < _LARGEST else None for key, value in values.items()}
        step, time_s = numbers["step"], numbers["time"] or -1
        in_bounds = isinstance(step, int) and 0 <= step < _MOST_STEPS and 0 <= time_s < _LATEST
        known = isinstance(kind, str) and in_bounds and len(numbers) <= _MOST_KEYS
        return {"kind": kind, **numbers, **examples} if known and "loss" in numbers else None
    return None


def measured_in(line: Mapping[str, Any]) -> dict[str, float | None]:
    """The values of such a line by name, without where and when it was written, and without `examples`."""
    return {key: value for key, value in line.items() if key not in ("kind", "step", "time", "examples")}


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The values of such a line as kind/name, for example `train/loss`; what is null is left out."""
    return {f"{line['kind']}/{key}": value for key, value in measured_in(line).items() if value is not None}


def checkpoint_folder(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is published."""
    return Path(run_dir, "checkpoints", f"step-{step:010d}")


_STEP = re.compile("step-[0-9]{1,15}")


def saved_steps(run_dir: str | Path) -> dict[int, Path]:
    """The steps of the published checkpoints and their folders, oldest first, by name alone: nothing is verified."""
    folders = sorted(Path(run_dir, "checkpoints").glob("step-*"))
    return {int(folder.name[5:]): folder for folder in folders if _STEP.fullmatch(folder.name) and folder.is_dir()}


def end_killed_saves(run_dir: Path) -> None:
    """Brings back a checkpoint that was being replaced when a kill came, and removes unfinished ones.

    To be called by the process that holds the run folder.
    """
    for path in Path(run_dir, "checkpoints").glob(".step-*"):
        name, _, state = path.name[1:].rpartition(".")
        if state == "replaced":
            recover(path.with_name(name))
        elif state == "partial":
            shutil.rmtree(path, ignore_errors=True)


def was_cut_short(session: Session) -> bool:
    """Whether nobody wrote down how a session ended: it may have come further than is on record, or still run."""
    return session["reason"] in (None, _KILLED)


def where_hours_went(sessions: Sequence[Session]) -> dict[str, float]:
    """See `training.engine.goodput`."""
    return hours_of(sessions, [was_cut_short(each) and each is not sessions[-1] for each in sessions])


class Sessions:
    """sessions.json, and what it tells about the sessions to come. Used on one rank only."""

    def __init__(
        self,
        run_dir: Path,
        *,
        step: int,
        steps: int,
        world_size: int,
        device: str,
        surroundings: dict[str, str],
        clock: Clock | None = None,
        last_sign: float | None = None,
    ):
        """clock: of this process. last_sign: when the last line of the record was written."""
        self._run_dir, self.steps, self._clock = run_dir, steps, clock or Clock()
        self._began = time.monotonic()
        self.all = read_sessions(run_dir)
        for session in self.all:
            if session["ended"] is None:  # no process lived to write it down
                session["ended"], session["reason"] = session["seen"], _KILLED
                if last_sign is not None:
                    session["last_sign"] = last_sign
        self.current: Session = {
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
            "surroundings": surroundings,
            "began": round(self._clock.began, 3),
            "hours": self._clock.seconds(),
        }
        self.all.append(self.current)
        self._write()

    def update(
        self, step: int, *, stalls_s: Sequence[float], saves_s: Sequence[float], uploads_s: Sequence[float] = ()
    ) -> None:
        """Notes the step that the session has come to. stalls_s, saves_s: of its saves, see `Saver`."""
        current = self.current
        current["step"], current["seen"], current["saves"] = step, _now(), len(saves_s)
        if saves_s:
            current["stall_s"], current["save_s"] = round(mean(stalls_s), 4), round(mean(saves_s), 4)
        if uploads_s:
            current["uploads"], current["upload_s"] = len(uploads_s), round(mean(uploads_s), 4)
        current["seconds"] = round(time.monotonic() - self._began, 1)
        current["hours"] = self._clock.seconds()
        with contextlib.suppress(OSError):  # a full disk costs this note, not the training
            self._write()

    def end(self, step: int, reason: str, **measured: Sequence[float]) -> None:
        """Notes how the session ended; the rest as in `update`."""
        self.current["ended"], self.current["reason"] = _now(), reason
        self.update(step, **measured)

    def hours(self) -> dict[str, float]:
        """Where the time of all sessions went, up to now."""
        self.current["hours"] = self._clock.seconds()
        return where_hours_went(self.all)

    def _write(self) -> None:
        write_atomically(self._run_dir / SESSIONS, json.dumps(self.all, indent=2) + "\n")

    def outlook(self, usable_s: float | None) -> Outlook:
        """What remains.

        The pace is that of this session, or of the one before if this one has just begun; it includes validations and
        saves. usable_s: what this session had for training at its beginning; None if it has no limit.
        """
        left = self.steps - self.current["step"]
        step_s = next((pace for session in reversed(self.all[-2:]) if (pace := pace_s(session))), None)
        found: Outlook = {"sessions_done": len(self.all), "steps_left": left}
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


def pace_s(session: Session) -> float | None:
    """Seconds that a step of a session took, with its validations and saves; None before it has done one."""
    done = session["step"] - session["from_step"]
    return session["seconds"] / done if done > 0 else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
