"""How long a run takes from its command to its first step: resumed at step 100,000 against started at step 0.

Both are `configs/gpt/plain.yaml` as users start it; the clock runs until the step's line stands in metrics.jsonl. The
resumed run verifies and loads its checkpoint, reads a record of 10,000 lines and finds its place in the data, all of
which a new run has no need of. Its checkpoint is a real one of an early step under a later number: where a run stands
is a number to it. With --quick the steps are a quarter as large: they are the same for both.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.bench.common import (
    PLAIN,
    PLAIN_DATA,
    ROOT,
    Figure,
    environment,
    prepare,
    ratio_by_rounds,
    read_arguments,
    report,
)
from training.base.console import UserError, run_main, say
from training.base.processes import family_of, kill_all
from training.engine.checkpoint import checkpoints, publish
from training.engine.metrics import read_metrics
from training.engine.status import METRICS

STEP = 100_000
TRAINING = ("--optim.steps", 2 * STEP, "--checkpoint.every_steps", 2, "--log.every_steps", 1)


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("resume_time", __doc__, words)
    rounds, batch = arguments.sized(whole=(7, ()), quick=(1, ("--batch.tokens_per_micro_batch", 256)))
    new: list[float] = []
    resumed: list[float] = []
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
        say(f"preparing {arguments.about_data}")
        data = prepare(arguments, Path(folder, "data"), *PLAIN_DATA)
        training = [PLAIN, *batch, *TRAINING, "--data", data.folder]
        far = run_at_step(training, Path(folder, "far"))
        for number in range(rounds):
            for times, name in ((new, "new"), (resumed, "resumed")):
                run_dir = Path(folder, f"{name}-{number}")
                if times is resumed:
                    shutil.copytree(far, run_dir)
                times.append(seconds_to_first_step(training, run_dir, STEP if times is resumed else 0))
                shutil.rmtree(run_dir)
            say(f"round {number + 1} of {rounds}: step 0 {new[-1]:.2f} s, step {STEP:,} {resumed[-1]:.2f} s")
    report(
        "resume_time",
        arguments,
        [
            Figure("ratio", ratio_by_rounds(resumed, new), "start to first step, at step 100,000 over step 0", "< 1.1"),
            Figure("resumed_s", median(resumed), "resumed at step 100,000"),
            Figure("new_s", median(new), "at step 0"),
        ],
    )
    return 0


def seconds_to_first_step(training: list[object], run_dir: Path, done: int) -> float:
    """From the start of the process until the record holds a step beyond `done`; the run is killed then."""
    command = [sys.executable, "-m", "training.gpt", *map(str, training), "--run_dir", str(run_dir)]
    began = time.monotonic()
    with (run_dir.parent / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(2), stdout=output, stderr=output)
    # The record of 10,000 lines is read by its end only: the bench must not compete with what it measures.
    record, size = run_dir / METRICS, None
    while size is None or not last_step(record) > done:
        size = record.stat().st_size if record.exists() else None
        if process.poll() is not None:
            raise UserError(f"the training ended by itself: {(run_dir.parent / 'output.txt').read_text('utf-8')}")
        time.sleep(0.01)
    seconds = time.monotonic() - began
    kill_all(family_of(process.pid))
    process.wait()
    return seconds


def last_step(record: Path) -> int:
    if not record.exists():
        return -1
    with record.open("rb") as file:
        file.seek(max(0, record.stat().st_size - 2000))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else -1


def run_at_step(training: list[object], run_dir: Path) -> Path:
    """A run folder that stands at step 100,000."""
    seconds_to_first_step(training, run_dir, 3)
    early = checkpoints(run_dir)[-1]
    tensors = {"model.safetensors": early.model_state(), "optimizer.safetensors": early.optimizer_state()}
    about = {key: early.manifest[key] for key in ("task", "config", "data", "versions")}
    state = {**early.state(), "validated_step": STEP, "window_losses": []}
    publish(run_dir, STEP, tensors, state=state, about=about, keep=1)
    line = read_metrics(run_dir)[-1]
    record = "".join(json.dumps({**line, "step": step}) + "\n" for step in range(10, STEP + 1, 10))
    (run_dir / METRICS).write_text(record, encoding="utf-8")
    return run_dir


if __name__ == "__main__":
    run_main(main)
