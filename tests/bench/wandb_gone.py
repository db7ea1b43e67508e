"""What wandb costs a training when its server goes away in the middle of a run, against the same run without wandb.

One process with one thread trains a small GPT and logs every tenth step, the default. A stand-in for the server
(loopback) takes the first rows and then refuses every connection for as long as the run lasts. What counts
is the time behind that: everything that threads beside the training's and wandb's own process compute there, as if each
of their seconds were taken from the training. That can be told to a thousandth, and bounds what wandb can add to a
step; how long the steps themselves took, with and without wandb in turns, varies by more than that and is told beside
it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from tests.bench.common import (
    PLAIN_DATA,
    ROOT,
    Figure,
    environment,
    prepare,
    ratio_by_rounds,
    read_arguments,
    report,
)
from tests.support.wandb_server import KEY, WandbServer
from training.base.console import UserError, run_main, say
from training.base.processes import family_of
from training.engine.metrics import read_metrics

EVERY = 10  # steps between lines of the record
TRAINING = (
    *("--model.width", 128, "--model.layers", 2, "--model.heads", 4),
    *("--optim.warmup_steps", 0, "--log.every_steps", EVERY),
    *("--log.validate_every_steps", 10**9, "--checkpoint.every_steps", 10**9),
)


@dataclass(frozen=True)
class Run:
    """Per step, over the last part of a run, in seconds: its duration, and what was computed beside the training."""

    step_s: float
    beside_s: float


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("wandb_gone", __doc__, words)
    rounds, steps, tokens, batches = arguments.sized(whole=(5, 400, 512, 4), quick=(1, 200, 256, 1))
    without: list[Run] = []
    gone: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
        say(f"preparing {arguments.about_data}")
        data = prepare(arguments, Path(folder, "data"), *PLAIN_DATA)
        batch = "--batch.tokens_per_micro_batch", tokens, "--batch.micro_batches_per_step", batches
        training = [*TRAINING, "--data", data.folder, *batch]
        for number in range(rounds):
            without.append(train(training, Path(folder, f"without-{number}"), steps, None))
            with WandbServer() as server:
                gone.append(train(training, Path(folder, f"gone-{number}"), steps, server))
            say(f"round {number + 1} of {rounds}: without {without[-1]}, server gone {gone[-1]}")
    step_s = median(run.step_s for run in without)
    added_s = median(run.beside_s for run in gone) - median(run.beside_s for run in without)
    ratio = ratio_by_rounds([run.step_s for run in gone], [run.step_s for run in without])
    report(
        "wandb_gone",
        arguments,
        [
            Figure("added_share", added_s / step_s, "computed for wandb per step, over a step", "< 0.01"),
            Figure("added_s", added_s, "the same in seconds"),
            Figure("step_s", step_s, "a step without wandb"),
            Figure("step_ratio", ratio, "a step with the server gone over one without wandb; noisy"),
        ],
    )
    return 0


def train(training: list[object], run_dir: Path, steps: int, server: WandbServer | None) -> Run:
    """A run of which about the last half counts; the server, if any, goes away before it."""
    words = [*map(str, training), "--run_dir", str(run_dir), "--optim.steps", str(steps)]
    own = {}
    if server is not None:
        words += ["--wandb.mode", "online"]
        own = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
        own["WANDB__FILE_STREAM_TRANSMIT_INTERVAL"] = "1"  # not 15 s until the first row is sent
    command = [sys.executable, "-m", "training.gpt", *words]
    with (run_dir.parent / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(1, **own), stdout=output, stderr=output)

    def wait_for(step: int) -> int:
        while not (lines := read_metrics(run_dir)) or lines[-1]["step"] < step:
            if process.poll() is not None:
                raise UserError(f"the training ended early: {(run_dir.parent / 'output.txt').read_text('utf-8')}")
            time.sleep(0.02)
        return lines[-1]["step"]

    wait_for(steps // 5)
    if server is not None:
        while not any(run.history for run in server.runs.values()):
            time.sleep(0.02)
        server.die()
    first = wait_for(wait_for(2 * steps // 5) + EVERY)
    before = beside(process.pid)
    last = wait_for(steps - EVERY)
    computed = beside(process.pid) - before
    if process.wait():
        raise UserError(f"the training failed: {(run_dir.parent / 'output.txt').read_text('utf-8')}")
    if last - first < steps // 5:
        raise UserError(f"only {last - first} of {steps} steps are left without the server: too few to tell anything")
    times = [
        line["time"] for line in read_metrics(run_dir) if line["kind"] == "train" and first <= line["step"] <= last
    ]
    seconds = median(after - before for before, after in pairwise(times)) / EVERY
    return Run(round(seconds, 4), round(computed / (last - first), 6))


def beside(pid: int) -> float:
    """Processor seconds so far of a process's threads but the first, and of all processes below it, ended ones too."""
    while True:
        try:
            files = [Path(f"/proc/{each}/stat") for each in family_of(pid)]
            # Of each process, all its threads and the children it waited for; then the first thread off again.
            ticks = sum(sum(ticks_of(file)) for file in files) - sum(ticks_of(Path(f"/proc/{pid}/task/{pid}/stat"))[:2])
            return ticks / os.sysconf("SC_CLK_TCK")
        except (FileNotFoundError, ProcessLookupError):
            if not Path(f"/proc/{pid}").exists():
                raise
            # A process below ended while it was read: its seconds are now its parent's.


def ticks_of(stat: Path) -> list[int]:
    """Clock ticks in a process's `stat`: its own in user and system mode, then the same of children waited for."""
    return [int(word) for word in stat.read_text().rpartition(")")[2].split()[11:15]]


if __name__ == "__main__":
    run_main(main)
