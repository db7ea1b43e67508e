"""How runs stand, by their own files and SLURM's queue; and how one is stopped. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.scripts import is_held, job_name, last_step
from launch.slurm.job import JOBS, read_events
from training.base.console import UserError, say, warn
from training.base.durations import format_duration
from training.base.files import open_in_place, open_plain
from training.base.options import CommandLine
from training.engine.goodput import goodput
from training.engine.status import (
    METRICS,
    STOP_FILE,
    metrics_line,
    pace_s,
    read_sessions,
    read_status,
    where_hours_went,
)

COLUMNS = ("run", "state", "step", "sessions", "s/step", "tokens/s", "goodput", "expected end", "job")

# So much of the end of metrics.jsonl certainly holds its last line of training.
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Queued:
    """A job in SLURM's queue."""

    number: str
    state: str
    reason: str  # why it waits, or where it runs
    name: str


def ask_slurm(*words: str, refusal: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """What a command of SLURM's answers. Raises UserError, as `refusal` with SLURM's own words in it."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, **how)
    except FileNotFoundError:
        where = "run this on the cluster's login node (a submission's --print works anywhere)"
        raise UserError(f"there is no {words[0]} on this machine: {where}") from None
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        said = re.sub(r"^(\w+|allocation failure): (error: )?", "", said, flags=re.M)
        raise UserError(refusal.format(said.replace("\n", "; "))) from None


def queue() -> list[Queued]:
    """All jobs of the user that wait or run. Raises UserError where SLURM does not answer."""
    words = ("squeue", "--me", "--noheader", "--format", "%A|%T|%R|%j")
    answer = ask_slurm(*words, refusal="SLURM does not answer ({}): try again in a minute", timeout=60)
    return [Queued(*line.split("|", 3)) for line in answer.stdout.splitlines()]


def jobs_of(run_dir: Path, queued: Sequence[Queued]) -> list[Queued]:
    """The run's jobs among those in the queue."""
    numbers = {event["job"] for event in read_events(run_dir)}
    return [job for job in queued if job.number in numbers]


def stop(argv: Sequence[str]) -> int:
    """`stop RUN_DIR`; says what it did. Raises UserError if the run has no jobs on record and does not train."""
    about = "A running session saves and ends, and waiting jobs are taken out of the queue."
    parser = CommandLine("python -m launch.slurm stop", about)
    parser.add_argument("run_dir", type=Path)
    run_dir = parser.parse_args(argv).run_dir
    trains = in_training(run_dir)
    if not (run_dir / JOBS).exists() and not trains:
        raise UserError(f"no job of {run_dir} is known ({JOBS}); a file {run_dir}/{STOP_FILE} stops any session")
    jobs = jobs_of(run_dir, queue())
    if not jobs and not trains:
        say(f"{run_dir} has no job in the queue")
        return 0
    pending = [job for job in jobs if job.state == "PENDING"]
    # The numbers stand in a file of the run folder, which may be a stranger's.
    waiting = [job.number for job in pending if job.name == job_name(run_dir)]
    if waiting:
        ask_slurm("scancel", *waiting, refusal="SLURM does not cancel the jobs: {}")
        say(f"taken out of the queue: job {', '.join(waiting)}")
    for job in pending:
        if job.number not in waiting:
            say(f"job {job.number} ({job.name}) has not the run's name: if it is the run's, scancel {job.number}")
    if len(pending) < len(jobs) or trains:
        open_in_place(run_dir / STOP_FILE).close()
        say(f"{run_dir} saves at its next step and stops (`status` shows when); the same command continues it")
    return 0


def in_training(run_dir: Path) -> bool:
    """Whether a session trains the run now, one of its jobs' or any other."""
    return (read_status(run_dir) or {}).get("status") == "running" and is_held(run_dir)


def print_status(argv: Sequence[str]) -> int:
    """`status [FOLDER]`: a line for every run below the folder."""
    parser = CommandLine("python -m launch.slurm status", "Prints a line for every run below a folder.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"))
    folder = parser.parse_args(argv).folder
    runs = sorted(Path(place) for place, _, files in os.walk(folder) if not {"status.json", JOBS}.isdisjoint(files))
    if not runs:
        raise UserError(f"there is no run below {folder}")
    queued: list[Queued] = []
    try:
        queued = queue()
    except UserError as error:
        warn(f"no jobs are shown: {error}")
    rows: list[tuple[str, ...]] = [COLUMNS]
    for run_dir in runs:
        try:
            rows.append(row(run_dir, jobs_of(run_dir, queued)))
        except (ValueError, TypeError, KeyError, ArithmeticError, OSError) as error:
            # A run whose files say odd things must not hide the others.
            rows.append((str(run_dir), f"unreadable: {type(error).__name__}", *[""] * (len(COLUMNS) - 2)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for each in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(each, widths, strict=True))
        say(line.rstrip().replace("\n", "\\n"))
    return 0


def row(run_dir: Path, jobs: Sequence[Queued]) -> tuple[str, ...]:
    """What `status` says about a run, column by column. jobs: those of the run in the queue."""
    status, sessions = read_status(run_dir) or {}, read_sessions(run_dir)
    last = _last_train_line(run_dir)
    state = _state(run_dir, status, jobs)
    step, steps = max(status.get("step", 0), last.get("step", 0)), status.get("steps")
    step_s = next((pace for session in reversed(sessions) if (pace := pace_s(session))), None)
    end = ""
    if step_s is not None and steps is not None and state != "finished":
        left_s = (steps - step) * step_s
        end = time.strftime("%m-%d %H:%M", time.localtime(time.time() + left_s)) if state == "running" else ""
        end = end or f"{format_duration(left_s)} to go"
    return (
        str(run_dir),
        state,
        f"{step:,} of {steps:,}" if steps is not None else "",
        str(len(sessions)),
        f"{step_s:.3g}" if step_s is not None else "",
        f"{last['tokens_per_s']:,.0f}" if "tokens_per_s" in last else "",
        f"{share:.0%}" if (share := goodput(where_hours_went(sessions))[1]) else "",
        end,
        ", ".join(f"{job.number} {job.state.lower()} {job.reason}" for job in jobs),
    )


def _state(run_dir: Path, status: dict[str, Any], jobs: Sequence[Queued]) -> str:
    if not status:
        return ("starting" if any(job.state == "RUNNING" for job in jobs) else "waiting") if jobs else "not begun"
    if status["status"] == "failed":
        return _failed(status["reason"])
    if status["status"] == "resumable":
        if jobs:
            return f"resumable, job {jobs[0].state.lower()}"
        last = next(reversed(read_events(run_dir)), None)
        if last is not None and last["outcome"] == "failed" and last["step"] >= last_step(run_dir):
            return _failed(last["reason"])
    if status["status"] != "running":
        return str(status["status"])
    # "running" may be the last word of a session that was killed.
    return "running" if is_held(run_dir) or any(job.state == "RUNNING" for job in jobs) else "interrupted"


def _failed(reason: str) -> str:
    return f"failed: {' '.join(reason.split())[:60]}"


def _last_train_line(run_dir: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError), open_plain(run_dir / METRICS) as file:
        file.seek(-min(_TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        for text in reversed(file.read().splitlines()):
            line = metrics_line(text)
            if line is not None and line["kind"] == "train":
                return line
    return {}
