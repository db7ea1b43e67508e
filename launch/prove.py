"""Proves on this machine that a run which is killed and resumed gives the same model as one that never stopped.

    python -m launch.prove configs/gpt/sample.yaml
    python -m launch.prove configs/gpt/base.yaml --steps 500 --kills 10 --processes 4 --model.dropout 0.3

It trains the config's first steps twice: once uninterrupted, and once with accidents at random moments, each followed
by the same command again. Then it compares the SHA-256 of weights, optimizer state and small values, and every loss on
the way. Options that it does not know go to the training. The config's own run folder is not touched.

On GPUs the training runs with `--deterministic true`, since some of their kernels add up in no fixed order.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.scripts import read_options, script_of
from launch.supervisor import layout
from training.base.console import UserError, counted, run_main, say
from training.base.durations import format_duration
from training.base.options import CommandLine, raw_values
from training.base.processes import children, family_of, is_alive, kill_all, signal_all
from training.engine.checkpoint import Checkpoint, checkpoints, newest_valid
from training.engine.metrics import read_metrics
from training.engine.status import CONFIG, METRICS, RECORDS, read_sessions, read_status

# Each of them happens once before any happens twice, in random order: who gets a signal, and which.
ACCIDENTS: dict[str, tuple[Literal["a rank", "all", "launcher"], signal.Signals]] = {
    "rank killed": ("a rank", signal.SIGKILL),
    "all killed": ("all", signal.SIGKILL),
    "launcher killed": ("launcher", signal.SIGKILL),
    "killed while saving": ("all", signal.SIGKILL),
    "record damaged": ("all", signal.SIGKILL),
    "rank told to stop": ("a rank", signal.SIGTERM),
    "terminal closed": ("launcher", signal.SIGHUP),
    # A session outlives these two; it is told to stop a moment later.
    "output unread": ("a rank", signal.SIGTERM),
    "all paused": ("a rank", signal.SIGTERM),
}
_PAUSE_S = 8.0

# What differs from machine to machine and from minute to minute; all else in metrics.jsonl must be equal.
_MEASURED = {"tokens_per_s", "flops_per_s", "memory_mb", "time"}


@dataclass(frozen=True)
class Training:
    """A training that can be started again and again."""

    words: tuple[str, ...]  # module and options
    run_dir: Path
    steps: int
    processes: int

    def start(self, pipe: int | None = None) -> subprocess.Popen[bytes]:
        """Starts a session; what it prints goes to `output`, or into a pipe."""
        launch = ["-m", "launch.run", "--processes", str(self.processes)]
        command = [sys.executable, *launch, "-m", *self.words, "--run_dir", str(self.run_dir)]
        with self.output.open("ab") as file:
            output = file.fileno() if pipe is None else pipe
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    @property
    def output(self) -> Path:
        """What all sessions print, beside the run folder."""
        return self.run_dir.with_name(f"{self.run_dir.name}-output.txt")

    def finish(self) -> None:
        """Trains to the end without an accident; raises UserError if that fails."""
        status = self.start().wait()
        if status or (read_status(self.run_dir) or {}).get("status") != "finished":
            tail = self.output.read_text("utf-8", "replace")[-3000:]
            raise UserError(f"the training did not finish (exit status {status}):\n{tail}")

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        lines = read_metrics(self.run_dir)
        return lines[-1]["step"] if lines else 0

    def last(self) -> Checkpoint:
        """The newest checkpoint; raises UserError if there is none or it is damaged."""
        found = newest_valid(self.run_dir, set_aside=False)
        if found is None:
            raise UserError(f"{self.run_dir} has no valid checkpoint")
        return found


@dataclass(frozen=True)
class Event:
    """An accident and what it left."""

    accident: str
    at: int  # the last step in metrics.jsonl
    saved: int  # the step of the newest published checkpoint
    lost: str | None  # what is damaged or gone that had been published


def have_accident(training: Training, accident: str, dice: random.Random) -> Event | None:
    """One session that ends by `accident`, at a random moment; None if the run was finished before."""
    began_at = max((checkpoint.step for checkpoint in checkpoints(training.run_dir)), default=0)
    sessions, (whose, number) = len(read_sessions(training.run_dir)), ACCIDENTS[accident]
    reader, writer = os.pipe()
    process = training.start(writer if accident == "output unread" else None)
    os.close(writer)

    def wait_for(happened: Callable[[], bool], pause_s: float = 0.01) -> None:
        while process.poll() is None and not happened():
            time.sleep(pause_s)

    wait_for(lambda: len(children(process.pid)) >= training.processes)
    ranks, family = children(process.pid)[: training.processes], family_of(process.pid)
    if accident in ("rank killed", "all killed", "all paused") and dice.random() < 0.125:
        time.sleep(dice.uniform(0, 6))  # perhaps before the first step
    else:
        # Somewhere before the end, but late enough for the run to get on.
        target = began_at + 1 + int(dice.random() * min(training.steps - began_at, max(2, training.steps // 4)))
        wait_for(lambda: len(read_sessions(training.run_dir)) > sessions)  # metrics.jsonl is now cut back
        wait_for(lambda: training.step() >= target)
        if accident == "killed while saving":
            saving = training.run_dir / "checkpoints"
            wait_for(lambda: bool(list(saving.glob(".step-*.partial"))), pause_s=0.0005)
        else:
            time.sleep(dice.random() * 0.1)
    ended_before = process.poll() is not None
    os.close(reader)
    if ended_before:
        return None
    with suppress(ProcessLookupError):  # it has just ended by itself
        if accident == "all paused":
            signal_all(family, signal.SIGSTOP)
            time.sleep(_PAUSE_S)
            signal_all(family, signal.SIGCONT)
        if accident in ("output unread", "all paused"):
            time.sleep(dice.random())
        if whose == "all":
            kill_all(family)
        else:
            os.kill(process.pid if whose == "launcher" else dice.choice(ranks), number)
    process.wait()
    _wait_until_gone(family)
    if accident == "record damaged":
        _damage_record(training.run_dir, dice)
    at = training.step()
    found = checkpoints(training.run_dir)
    problems = [f"{checkpoint.folder.name}: {problem}" for checkpoint in found if (problem := checkpoint.verify())]
    saved = found[-1].step if found else 0
    if saved < began_at:
        problems.append(f"step {began_at} was published before and is gone")
    return Event(accident, at, saved, "; ".join(problems) or None)


def _damage_record(run_dir: Path, dice: random.Random) -> None:
    """Damages one of the files beside the checkpoints: noise, half of it, or nothing at all is left."""
    name = dice.choice([name for name in (METRICS, CONFIG, *RECORDS) if (run_dir / name).exists()])
    content = (run_dir / name).read_bytes()
    if name == METRICS:  # what it holds cannot be made again, but for what comes behind the last checkpoint
        damaged = content + dice.randbytes(30)
    else:
        damaged = dice.choice([dice.randbytes(len(content)), content[: len(content) // 2], b""])
    (run_dir / name).write_bytes(damaged)


def _wait_until_gone(family: Sequence[int], patience_s: float = 90.0) -> None:
    """Waits for ranks, which may outlive their launcher to save; raises UserError if one stays."""
    end = time.monotonic() + patience_s
    while alive := [pid for pid in family if is_alive(pid)]:
        if time.monotonic() > end:
            raise UserError(f"process {alive[0]} still runs {patience_s:g} s after the accident")
        time.sleep(0.02)


def interrupt(training: Training, kills: int, dice: random.Random, waiting: list[str]) -> list[Event]:
    """Trains to the end with `kills` accidents, or with as many as fit before the run is finished.

    waiting: the next ones, taken from its end and filled up when it is empty.
    """
    events: list[Event] = []
    while len(events) < kills:
        if not waiting:
            waiting += dice.sample(list(ACCIDENTS), len(ACCIDENTS))
        event = have_accident(training, waiting[-1], dice)
        if event is None:
            break
        waiting.pop()
        events.append(event)
    training.finish()
    return events


def differences(one: Training, other: Training) -> list[str]:
    """What differs at the end of two trainings: files of the last checkpoint, lines of metrics.jsonl."""
    first, second = one.last(), other.last()
    found = [f"steps: {first.step} and {second.step}"] if first.step != second.step else []
    files, others = first.manifest["files"], second.manifest["files"]
    found += [name for name in files if files[name]["sha256"] != others[name]["sha256"]]
    lines, other_lines = (
        [{key: value for key, value in line.items() if key not in _MEASURED} for line in read_metrics(each.run_dir)]
        for each in (one, other)
    )
    if lines != other_lines:
        same = sum(line == twin for line, twin in zip(lines, other_lines, strict=False))
        found.append(f"{METRICS}: {same} of {len(lines)} lines are the same, {len(other_lines)} are there")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if both runs end the same, else 1."""
    parser = CommandLine("python -m launch.prove", __doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="for example configs/gpt/sample.yaml")
    parser.add_argument("--steps", type=int, default=300, help="steps to train (default %(default)s)")
    parser.add_argument("--kills", type=int, default=5, help="accidents (default %(default)s)")
    parser.add_argument("--processes", type=int, help="ranks on this machine (default: as launch.run)")
    parser.add_argument("--random-seed", type=int, default=0, help="of the moments (default %(default)s)")
    parser.add_argument("--script", help="module to run (default: what the config says)")
    arguments, options = parser.parse_known_args(argv)
    if not Path("/proc/self/stat").exists():
        raise UserError("this proof finds the processes to kill in /proc, which only Linux has")
    for name, least in (("steps", 20), ("kills", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} must be at least {least}")
    words = [str(arguments.config), *options]
    words += _shortened(arguments.steps, raw_values(words))
    script = arguments.script or script_of(arguments.config)
    chosen = layout(read_options(script, words).batch.micro_batches_per_step, arguments.processes)
    if chosen.gpus:
        words += ["--deterministic", "true"]
        say("GPUs: with --deterministic true (deterministic algorithms of torch, CUBLAS_WORKSPACE_CONFIG=:4096:8)")
    Path("runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="prove-", dir="runs"))
    whole, broken = (
        Training((script, *words), folder / name, arguments.steps, chosen.processes)
        for name in ("uninterrupted", "interrupted")
    )
    began = time.monotonic()
    say(f"uninterrupted: {arguments.steps} steps with {counted(chosen.processes, 'process')}")
    whole.finish()
    say(f"interrupted: the same with {counted(arguments.kills, 'accident')}")
    events = interrupt(broken, arguments.kills, random.Random(arguments.random_seed), [])
    different = differences(whole, broken)
    _print_proof(events, whole, broken)
    if different or any(event.lost for event in events):
        say(f"NOT the same: {'; '.join(different) or 'a published checkpoint was lost'}. Both runs are in {folder}")
        return 1
    say(
        f"the same, bit for bit: {counted(len(events), 'accident')}, all {len(read_metrics(whole.run_dir))} lines of "
        f"{METRICS} equal, {format_duration(time.monotonic() - began)}"
    )
    if len(events) < arguments.kills:
        say(f"(the run was finished before {arguments.kills} could happen; more --steps leave room for them)")
    shutil.rmtree(folder)
    return 0


def _shortened(steps: int, config: dict[str, Any]) -> list[str]:
    """Options that make a short run of any config, with every part of a long one."""
    decays = (config.get("optim") or {}).get("schedule") == "wsd"
    chosen: dict[str, Any] = {
        "optim.steps": steps,
        "optim.warmup_steps": steps // 10,
        **({"optim.decay_steps": steps // 5} if decays else {}),
        "optim.patience": "null",
        "checkpoint.every_steps": max(2, steps // 25),
        "log.every_steps": 1,
        "log.validate_every_steps": max(5, steps // 6),
        "wandb.mode": "disabled",
    }
    return [word for key, value in chosen.items() for word in (f"--{key}", str(value))]


def _print_proof(events: Sequence[Event], whole: Training, broken: Training) -> None:
    say(f"\n  {'accident':<22} {'at step':>8} {'resumed at':>11} {'done again':>11}")
    for event in events:
        verdict = f"  LOST: {event.lost}" if event.lost else ""
        say(f"  {event.accident:<22} {event.at:>8} {event.saved:>11} {event.at - event.saved:>11}{verdict}")
    say(f"\n  {'SHA-256 at the end':<24} {'uninterrupted':<18} {'interrupted':<18}")
    files, others = (each.last().manifest["files"] for each in (whole, broken))
    for name in files:
        one, other = files[name]["sha256"][:16], others[name]["sha256"][:16]
        say(f"  {name:<24} {one:<18} {other:<18} {'same' if one == other else 'DIFFERENT'}")


if __name__ == "__main__":
    run_main(main)
