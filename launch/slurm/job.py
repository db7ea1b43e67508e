"""Answers the batch scripts in slurm/ before and after a session: which run is it, and does its job go on?

    python -m launch.slurm.job run CONFIG [--key value ...]    prints script, run folder and data, a line each
    python -m launch.slurm.job begin RUN_DIR                   status 0: train; 3: there is nothing left to do
    python -m launch.slurm.job end RUN_DIR --status N [--taken] [--failure-limit N]

`end` answers by its exit status: 0 finished, 75 another session is needed, 76 resumable but not by itself, 1 failed.
`runs/NAME/slurm.jsonl` says what became of every job, a line per event.

Nothing here imports torch: that takes a minute on a node whose file system is slow.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from launch.scripts import last_step, note_killed, run_and_data, script_of
from launch.supervisor import read_error
from training.base.console import UserError, run_main, say
from training.base.environment import job_id, relay_error_file, time_left
from training.base.files import NotPlainError, open_in_place, read_plain, writing_to
from training.base.options import FLAG, CommandLine
from training.engine.status import EXIT_RESUMABLE, read_status

JOBS = "slurm.jsonl"
EXIT_NOTHING_TO_DO = 3
EXIT_RESTING = 76

Outcome = Literal["finished", "again", "resting", "failed", "taken"]
_FINAL: tuple[Outcome, ...] = ("finished", "resting", "failed")

# The exit status of `end`, and what it says behind the reason.
_ENDINGS: dict[Outcome, tuple[int, str]] = {
    "finished": (0, ""),
    "again": (EXIT_RESUMABLE, "; another session is needed"),
    "resting": (EXIT_RESTING, "; not continued by itself: submit it again when it is to go on"),  # the user stopped it
    "failed": (1, "; not continued by itself: submit it again when it is to go on"),  # another session would not help
    "taken": (EXIT_RESTING, ", and alone decides whether it is queued again"),
}


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job, and why."""

    outcome: Outcome
    reason: str


class _Event(BaseModel):
    """A line of slurm.jsonl: a job was submitted, or a session of it began or ended."""

    event: Literal["submitted", "began", "ended"]
    job: str
    step: int = 0  # of the newest checkpoint
    status_time: str | None = None  # of the status that it found when it began
    from_step: int = 0  # where the session that has ended had begun
    outcome: Outcome | None = None  # of one that has ended
    reason: str = ""


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first; a line that a crash cut off, or that is no event, is left out."""
    found: list[dict[str, Any]] = []
    with suppress(FileNotFoundError, NotPlainError):
        for line in read_plain(run_dir / JOBS).splitlines():
            with suppress(ValidationError):
                found.append(_Event.model_validate_json(line).model_dump())
    return found


def note(run_dir: Path, event: Literal["submitted", "began", "ended"], job: str, **more: Any) -> None:
    """Adds an event. Appended, since a job may be submitted while another one ends."""
    about = {"event": event, "job": job, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more}
    with writing_to(run_dir, option="--run_dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
        with open_in_place(run_dir / JOBS) as file:
            file.seek(0, os.SEEK_END)
            cut_off = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * cut_off + json.dumps(about).encode() + b"\n")


def begin(run_dir: Path, job: str) -> Verdict | None:
    """Notes that the job begins a session; or returns why there is nothing left for it to do.

    Nothing is left for the jobs of a chain that follow the end of the run: it is finished, has failed for good, or was
    stopped by the user. A job that was submitted after that end trains.
    """
    events = read_events(run_dir)
    submitted = [place for place, each in enumerate(events) if each["event"] == "submitted" and each["job"] == job]
    ends = [each for each in events[submitted[0] :] if each["outcome"] in _FINAL] if submitted else []
    if ends:
        return Verdict(ends[-1]["outcome"], f"job {ends[-1]['job']} ended it: {ends[-1]['reason']}")
    status = read_status(run_dir) or {}
    note(run_dir, "began", job, step=last_step(run_dir), status_time=status.get("time"))
    return None


def _began(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last beginning of a session: the step and the status that it found."""
    return next((event for event in reversed(events) if event["event"] == "began"), {"step": 0, "status_time": None})


def judge(
    run_dir: Path, *, exit_status: int, taken: bool = False, to_mend: str | None = None, failure_limit: int = 3
) -> Verdict:
    """What the session that has just ended means for its job.

    exit_status: of srun's step; only quoted, since status.json decides. taken: SLURM ends the job and decides what
    becomes of it. to_mend: an error that the user has to mend. failure_limit: so many sessions in a row without a
    checkpoint of a later step mean that the run has failed.
    """
    if to_mend is not None:
        return Verdict("failed", to_mend)
    events, status = read_events(run_dir), read_status(run_dir) or {}
    began = _began(events)
    wrote = status.get("time") is not None and status["time"] != began["status_time"]
    if wrote and status["status"] == "finished":
        return Verdict("finished", status["reason"])
    if wrote and not status["restart"]:
        return Verdict("resting" if status["status"] == "resumable" else "failed", status["reason"])
    if taken:
        return Verdict("taken", "SLURM ended the job")
    if not wrote:
        reason = f"it ended with status {exit_status} before it came to train"
    elif status["status"] == "running":
        reason = f"it ended with status {exit_status} and could not say why"
    else:
        reason = status["reason"]
    step = last_step(run_dir)
    fruitless = 1 + _sessions_without_progress(events) if step <= began["step"] else 0
    if fruitless < failure_limit:
        return Verdict("again", reason)
    return Verdict("failed", f"{fruitless} sessions in a row came no further than step {step:,}; the last: {reason}")


def _sessions_without_progress(events: Sequence[dict[str, Any]]) -> int:
    """How many sessions have ended without a checkpoint of a later step since the last that had one."""
    count = 0
    for event in reversed([event for event in events if event["event"] == "ended"]):
        if event["outcome"] in _FINAL or event["step"] > event["from_step"]:
            break
        count += event["outcome"] == "again"
    return count


def end(run_dir: Path, job: str, **what_happened: Any) -> int:
    """Judges the session (see `judge`), notes and says the verdict; returns it as the command's exit status."""
    verdict = judge(run_dir, **what_happened)
    from_step, step = _began(read_events(run_dir))["step"], last_step(run_dir)
    note(run_dir, "ended", job, outcome=verdict.outcome, reason=verdict.reason, from_step=from_step, step=step)
    note_killed(run_dir, verdict.reason)
    exit_status, what_next = _ENDINGS[verdict.outcome]
    say(f"{run_dir}, step {step:,}: {verdict.reason}{what_next}")
    return exit_status


def _error_to_mend() -> str | None:
    """The error of this session that the user has to mend, if any. It is told once."""
    path = relay_error_file()
    said = read_error(path) if path is not None else None
    if path is not None and said is not None:
        path.unlink()
    return said


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandLine("python -m launch.slurm.job", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("run", add_help=False)
    for verb in (verbs.add_parser("begin"), ending := verbs.add_parser("end")):
        verb.add_argument("run_dir", type=Path)
    ending.add_argument("--status", type=int, required=True)
    ending.add_argument("--taken", **FLAG)
    ending.add_argument("--failure-limit", type=int, default=3)
    arguments, words = parser.parse_known_args(argv)
    if arguments.verb == "run":
        if not words or words[0].startswith("--"):
            raise UserError("name a config file: sbatch slurm/run.sbatch configs/gpt/base.yaml [--key value ...]")
        for each in (script_of(Path(words[0])), *run_and_data(words)):
            say(str(each))
        return 0
    job = job_id()
    if job is None:
        raise UserError("there is no SLURM_JOB_ID: this is for the batch scripts in slurm/")
    if arguments.verb == "begin":
        over = begin(arguments.run_dir, job)
        if over is not None:
            say(f"{arguments.run_dir} is {over.outcome}: {over.reason}; nothing to do")
        return EXIT_NOTHING_TO_DO if over is not None else 0
    # A job that SLURM ended because of its time limit it never requeues by itself.
    taken = arguments.taken and ((left := time_left()) is None or left[0] > 0)
    how = {"exit_status": arguments.status, "failure_limit": arguments.failure_limit}
    return end(arguments.run_dir, job, taken=taken, to_mend=_error_to_mend(), **how)


if __name__ == "__main__":
    run_main(main)
