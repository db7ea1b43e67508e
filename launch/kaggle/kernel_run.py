"""One kernel run on Kaggle: goes on from the newest output among the inputs, and leaves an output to go on from.

    python -m launch.kaggle run CONFIG [--key value ...]

The notebook's cell starts this as a process of its own, which trains as `launch.run` does (on a CPU by RANKS
processes). Promises: the training has saved and is gone before Kaggle's limit; the output stays below Kaggle's quota;
at the end this program has left nothing in /kaggle/working but the run's folder and kernel_run.json, which says
how it went, whatever happened. The exit status is 0 when the run is finished, 75 when another kernel run is needed, 1
when none would help.

A training that fails but may go on by itself is started again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launch.scripts import micro_batches_of, read_options, script_of
from launch.supervisor import Ending, Layout, Session, Supervisor, layout
from training.base.console import Terminated, TryLaterError, UserError, run_main, say, warn
from training.base.durations import format_duration
from training.base.environment import (
    kaggle_input,
    kaggle_output_bytes,
    kaggle_run_type,
    kaggle_working,
    process_age_s,
    ranks_without_gpus,
    time_left,
)
from training.base.files import write_atomically, writing_to
from training.base.options import CommandLine
from training.engine.status import EXIT_RESUMABLE, end_killed_saves, read_sessions, read_status, saved_steps

SUMMARY = "kernel_run.json"

# Between the end of the training and the limit, for the notebook to end and Kaggle to take its output. How long that
# takes, and whether it counts, is not documented.
_MARGIN_S = 300.0

# The part of the quota that is kept for what grows beside the checkpoints and for what Kaggle adds to the output.
_RESERVE = 0.05

# After so many attempts in a row without a checkpoint of a later step the kernel run gives up.
_ATTEMPTS_WITHOUT_PROGRESS = 3

# NCCL hangs where the driver says that two GPUs reach each other's memory (P2P) but a virtual machine lets nothing
# through. The gradients of these trainings are small, so that the way by the host's memory costs next to nothing.
_NCCL = {"NCCL_P2P_DISABLE": "1"}

# What an S3 bucket's library reads.
_SECRETS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"}


@dataclass(frozen=True)
class Retention:
    """How many checkpoints the training keeps: the newest ones, and the best."""

    keep: int
    keep_best: int
    can_be_longer: bool = False  # as many again are then kept from where the learning rate begins to fall

    @property
    def most(self) -> int:
        """Checkpoints on the disk at once: an old one is removed only when the new one is complete."""
        return (self.keep + self.keep_best) * (1 + self.can_be_longer) + 1


def retention(wanted: Retention, checkpoint_bytes: int, room_bytes: int) -> Retention:
    """As much of `wanted` as there is room for. Raises UserError if that is less than three checkpoints.

    The larger number shrinks first; of equal ones that of the best, because a second newest is worth more: the newest
    may be damaged. checkpoint_bytes: the size of one, 0 while nobody knows.
    """
    kept = wanted
    while kept.most * checkpoint_bytes > room_bytes:
        if kept.keep == kept.keep_best == 1:
            raise UserError(
                f"a checkpoint has {checkpoint_bytes / 1e9:.3g} GB, and there is room for {room_bytes / 1e9:.3g} GB of "
                f"them in the output: {kept.most} need to fit, the newest, the best"
                f"{', as many from where the learning rate begins to fall,' if kept.can_be_longer else ''} and the one "
                "that is being written"
            )
        newest = kept.keep > kept.keep_best
        kept = replace(kept, keep=kept.keep - newest, keep_best=kept.keep_best - (not newest))
    return kept


def margin_s(left_s: float) -> float:
    """What is kept free of the seconds left until the limit; in a rehearsal of a minute that is less."""
    return min(_MARGIN_S, left_s / 6)


# What is among the inputs.


def _folders(root: Path) -> Iterator[Path]:
    for folder, _, _ in os.walk(root):
        yield Path(folder)


def previous_run(root: Path, name: str, kernels: Sequence[str]) -> Path | None:
    """The folder of the run `name` that has come furthest; None if there is none with a checkpoint.

    kernels: OWNER/SLUG of those whose outputs may hold it; without, it may be anywhere among the inputs `root`.
    """
    places = [root / place for each in kernels for place in (each.partition("/")[2], f"notebooks/{each}")] or [root]
    folders = [folder for place in places for folder in _folders(place)]
    found = [folder for folder in folders if folder.name == name and saved_steps(folder)]
    return max(found, key=lambda folder: max(saved_steps(folder)), default=None)


def prepared_data(root: Path, wanted: Path) -> Path:
    """The prepared data: where the config says, or unpacked beside the code, or among the inputs, by its name there.

    Raises UserError where it is in none of these places.
    """
    for folder in (wanted, Path("prepared", wanted.name)):
        if (folder / "meta.json").is_file():
            return folder
    for folder in _folders(root):
        if folder.name == wanted.name and (folder / "meta.json").is_file():
            return folder
    raise UserError(f"there is no prepared data {wanted.name} below {root}: add its data set to the notebook's input")


# The disk.


def bytes_below(folder: Path, but: Path | None = None) -> int:
    """The size of all files below a folder in which another process may be writing; not of those below `but`."""
    total = 0
    for place, folders, names in os.walk(folder):
        if but is not None and Path(place) == but:
            folders.clear()
            continue
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(place, name).lstat().st_size
    return total


def _largest_checkpoint(run_dir: Path) -> int:
    return max(map(bytes_below, saved_steps(run_dir).values()), default=0)


@dataclass(frozen=True)
class Disk:
    """The output: what the run has in it, and how much room there is below the quota."""

    working: Path
    run_dir: Path
    source: Path | None  # the run folder among the inputs

    def checkpoint_bytes(self) -> int:
        """The size of the run's largest checkpoint, 0 if it has none."""
        return max(self._source_bytes, _largest_checkpoint(self.run_dir))

    @cached_property
    def _source_bytes(self) -> int:
        return _largest_checkpoint(self.source) if self.source is not None else 0

    def room_bytes(self) -> int:
        """What all checkpoints together may take, including those that are there."""
        others = bytes_below(self.working, but=self.run_dir / "checkpoints")
        return int(kaggle_output_bytes() * (1 - _RESERVE)) - others

    def tidy(self) -> None:
        """Removes what a training that was killed left unfinished, and checkpoints that were set aside as damaged."""
        end_killed_saves(self.run_dir)
        for pattern in ("removing-*", "invalid-*"):
            for path in (self.run_dir / "checkpoints").glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


# The training.


def reach_address(url: str) -> None:
    """Gives the library that serves the run's address its credentials, the notebook's secrets by the variables' names.

    A library that the image lacks is installed. A secret that is not there is not missed: another may do.
    """
    from training.engine.address.store import CLIENTS

    with suppress(ImportError):
        from kaggle_secrets import UserSecretsClient

        for name in _SECRETS - os.environ.keys():
            with suppress(Exception):  # it has classes of its own
                os.environ[name] = UserSecretsClient().get_secret(name)
    client = CLIENTS.get(urlsplit(url).scheme)
    if client is not None and find_spec(client.partition("==")[0]) is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", client], check=False)  # else the run says so


@dataclass
class Training:
    """The sessions of a training, which watch the clock and the disk."""

    words: tuple[str, ...]  # the module and its options, without those that say which checkpoints to keep
    processes: int
    disk: Disk
    wanted: Retention  # what it would keep if there were room
    margin: float  # seconds that are to be left until the limit

    def run(self, supervisor: Supervisor) -> Ending:
        """Trains once; raises UserError where the quota is too small."""
        kept = retention(self.wanted, self.disk.checkpoint_bytes(), self.disk.room_bytes())
        words = ("--checkpoint.keep", str(kept.keep), "--checkpoint.keep_best", str(kept.keep_best))
        too_large = False

        def look(session: Session) -> None:
            nonlocal too_large
            left = time_left()
            if left is not None and left[0] < self.margin / 4:
                warn("the training has not ended in time: it is killed, so that the output is not lost")
                session.kill()
            elif not too_large and kept.most * self.disk.checkpoint_bytes() > self.disk.room_bytes():
                too_large = True
                session.signal(signal.SIGTERM)

        around = {**_NCCL, **os.environ}
        ending = supervisor.run((*self.words, *words), self.processes, environment=around, look=look)
        self.disk.tidy()
        left = time_left()
        if left is not None and left[0] < 2 * self.margin and ending.outcome == "crashed":
            return Ending("stopped")  # another attempt would have no time
        if too_large and ending.outcome == "stopped" and not supervisor.asked:
            return Ending("crashed", "checkpoints turn out too large to keep as many")
        return ending


class ThisKernelRun:
    """The kernel run that this process is, from what it finds to what it leaves."""

    def __init__(self, script: str, words: Sequence[str], expected_step: int, previous: Sequence[str]):
        self.working = kaggle_working()
        self.options = read_options(script, words)
        if self.options.run_at is not None:
            reach_address(self.options.run_at)
        self.run_dir = self.working / self.options.run_dir.name
        self.source = previous_run(kaggle_input(), self.run_dir.name, previous)
        self.disk = Disk(self.working, self.run_dir, self.source)
        places = (self.run_dir, *([self.source] if self.source else []))
        self._known = {each["started"] for place in places for each in read_sessions(place)}
        self._first_step = max((step for place in places for step in saved_steps(place)), default=0)
        if self._first_step < expected_step:
            found = f"only step {self._first_step:,} of it" if self._first_step else "nothing of it"
            raise TryLaterError(
                f"{self.run_dir.name} has come to step {expected_step:,}, but {found} is below {kaggle_input()}: the "
                "last output is not among the inputs, and the training would begin anew"
            )
        left = time_left()
        self.margin = max(self.options.session.margin, margin_s(left[0])) if left else self.options.session.margin
        self._asked: list[int] = []  # the signals that asked it to stop
        self._layout = _layout(micro_batches_of(self.options, words, self.source or self.run_dir))
        self.training = Training(
            words=(script, *words, *self._own_words()),
            processes=self._layout.processes,
            margin=self.margin,
            disk=self.disk,
            wanted=Retention(
                self.options.checkpoint.keep,
                self.options.checkpoint.keep_best,
                can_be_longer=self.options.optim.can_be_longer,
            ),
        )

    def _own_words(self) -> tuple[str, ...]:
        """The options that follow, and so override, the user's words on the training's command line."""
        words = ["--run_dir", str(self.run_dir), "--data", str(prepared_data(kaggle_input(), self.options.data))]
        words += ["--session.margin", f"{self.margin:g}"]
        return (*words, *(["--resume_from", str(self.source)] if self.source else []))

    def run(self) -> dict[str, Any]:
        """Trains, as often as it takes and helps; returns what kernel_run.json says."""
        say(f"{self.run_dir.name}: {self._layout}")
        if kaggle_run_type() == "Interactive":
            say("this notebook is interactive: its output is kept only when you save a version of it")
        say(f"going on from {self.source}" if self.source else "no earlier output among the inputs: a new run")
        if self.source is not None and bytes_below(self.source) > kaggle_output_bytes() * (1 - _RESERVE):
            raise UserError(f"{self.source} is too large for an output: remove some of its checkpoints first")
        self.working.mkdir(parents=True, exist_ok=True)
        supervisor = Supervisor()
        self._asked = supervisor.asked
        ending = supervisor.run_to_the_end(
            lambda: self.training.run(supervisor), self._step, failure_limit=_ATTEMPTS_WITHOUT_PROGRESS
        )
        return self.summary(ending.reason if ending.outcome == "to mend" else None)

    def _step(self) -> int:
        return max(saved_steps(self.run_dir), default=self._first_step)

    def summary(self, failure: str | None = None) -> dict[str, Any]:
        """How the kernel run went. failure: why it is over, where the run's own status does not say."""
        status = read_status(self.run_dir) or {}
        sessions = [each for each in read_sessions(self.run_dir) if each["started"] not in self._known]
        state, reason = status.get("status", "failed"), status.get("reason", "the training did not begin")
        if state == "running":
            state, reason = "resumable", "killed, or it could not say why it ended"
        if failure is not None:
            state, reason = "failed", failure
        elif not status and self._asked:
            state, reason = "resumable", f"signal {signal.Signals(self._asked[0]).name}, before it began"
        return {
            "status": state,
            "reason": reason,
            "restart": failure is None and state != "finished" and status.get("restart", True),
            "run": self.run_dir.name,
            "step": self._step(),
            "from_step": self._first_step,
            "steps": status.get("steps"),
            "seconds": round(process_age_s(), 1),
            "training_seconds": round(sum(each["seconds"] for each in sessions), 1),
            "margin_seconds": round(self.margin, 1),
            "output_bytes": bytes_below(self.working),
        }


def _layout(micro_batches: int) -> Layout:
    """A process for each GPU; on a CPU, RANKS if set. Raises UserError where Kaggle has given no GPU."""
    chosen, ranks = layout(micro_batches), ranks_without_gpus()
    if not chosen.gpus and ranks is None and kaggle_run_type() is not None:
        raise UserError("there is no GPU here: choose the accelerator GPU T4 x2 in the notebook's settings")
    return chosen if chosen.gpus or ranks is None else layout(micro_batches, ranks)


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        "python -m launch.kaggle run", __doc__, usage="%(prog)s CONFIG.yaml [--script MODULE] [--key value ...]"
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--script", help="module that trains (default: what the config says)")
    parser.add_argument(
        "--expect-step", type=int, default=0, metavar="N", help="end at once where the run has not come to step N yet"
    )
    parser.add_argument(
        "--previous", action="append", default=[], metavar="OWNER/SLUG", help="go on only from this kernel's output"
    )
    arguments, words = parser.parse_known_args(argv)
    script, kernel_run = arguments.script or script_of(arguments.config), None
    try:
        words = [str(arguments.config), *words]
        kernel_run = ThisKernelRun(script, words, arguments.expect_step, arguments.previous)
        summary = kernel_run.run()
    except (Exception, KeyboardInterrupt, Terminated) as error:
        reason = str(error) or f"{type(error).__name__}, before the training began"
        again = isinstance(error, TryLaterError)
        nothing = {"status": "failed", "reason": reason, "restart": again, "step": 0, "steps": None}
        _leave(kernel_run.summary(reason) if kernel_run is not None else nothing)
        raise
    _leave(summary)
    step = f"step {summary['step']:,}" + (f" of {summary['steps']:,}" if summary["steps"] else "")
    trained = f"trained {format_duration(summary['training_seconds'])} of {format_duration(summary['seconds'])}"
    output = f"{summary['output_bytes'] / 1e9:.3g} GB of output"
    say(f"{summary['status']} at {step}: {summary['reason']}; {trained}, {output}")
    return {"finished": 0, "resumable": EXIT_RESUMABLE}.get(summary["status"], 1)


def _leave(summary: dict[str, Any]) -> None:
    with writing_to(kaggle_working()):
        kaggle_working().mkdir(parents=True, exist_ok=True)
        write_atomically(kaggle_working() / SUMMARY, json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
