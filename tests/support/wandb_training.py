"""A training as wandb sees it: nothing but the lines of a record. A process of its own, so that it can be killed.

    python -m tests.support.wandb_training '{"run_dir": ..., "options": {...}, "from": 0, "to": 20, ...}'

Prints what it measured as its last line, a JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from training.engine.wandb import tracker as wandb_tracker
from training.engine.wandb import visit as wandb_visit
from training.engine.wandb.tracker import WandbOptions, WandbTracker, publish_evaluation

CONFIG = {"optim": {"lr": 1e-3, "epochs": 2}, "seed": 7}
VALIDATE_EVERY = 5
SUMMARY = {"best_step": 15, "best_score": 0.75}
SCORES = {"bleu": 28.4, "loss": 2.1}
EXAMPLES = [("你好。", "Hello.", "Hallo.", "")]


def lines_of(step: int) -> list[dict[str, Any]]:
    """The record's lines of a step, the same in every session that trains it."""
    lines = [{"kind": "train", "step": step, "loss": 1 / step, "lr": 1e-3, "time": 1.7e9 + step}]
    if step % VALIDATE_EVERY == 0:
        lines.append(
            {"kind": "validation", "step": step, "loss": 2 / step, "accuracy": 0.5, "time": 1.7e9 + step + 0.5}
        )
    return lines


def row_of(step: int) -> dict[str, Any]:
    """The history row that a step comes to, without wandb's own keys."""
    lines = lines_of(step)
    values = {f"{line['kind']}/{key}": line[key] for line in lines for key in ("loss", "lr", "accuracy") if key in line}
    return {"step": step, **values}


def main(about: dict[str, Any]) -> None:
    """`from`: step of the checkpoint; `to`: last step; `end`: status, "kill" or "hang"; `pause`: seconds between lines.

    `interrupt`: the last line is not reached; `interrupted`: nor was it in the session before. `hold`: the step before
    which it waits for a file `go` in the run folder. `limits`: constants of the tracker to be other than they are.
    `evaluate`: an evaluation of this part instead of a training.
    """
    for name, seconds in about.get("limits", {}).items():
        setattr(wandb_visit if hasattr(wandb_visit, name) else wandb_tracker, name, seconds)
    run_dir = Path(about["run_dir"])
    options = WandbOptions(**about["options"])
    if about.get("evaluate"):
        began = time.monotonic()
        publish_evaluation(run_dir, options, SCORES, EXAMPLES, run_dir / "report.html", part=about["evaluate"])
        print(json.dumps({"seconds": time.monotonic() - began}))
        return
    lines = [line for step in range(1, about["from"] + 1) for line in lines_of(step)]
    fresh = [line for step in range(about["from"] + 1, about["to"] + 1) for line in lines_of(step)]
    if about.get("interrupted"):
        fresh.insert(0, lines.pop())
    if about.get("interrupt"):
        fresh.pop()
    began = time.monotonic()
    tracker = WandbTracker(options, run_dir, run_id=about.get("run_id"), config=CONFIG, lines=lines)
    made = time.monotonic() - began
    print("begun", flush=True)
    adds = []
    for line in fresh:
        while line["step"] == about.get("hold") and not (run_dir / "go").exists():
            time.sleep(0.01)
        began = time.perf_counter()
        tracker.add(line)
        adds.append(time.perf_counter() - began)
        time.sleep(about.get("pause", 0.0))
    if about["end"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while about["end"] == "hang":  # until it is killed
        time.sleep(3600)
    began = time.monotonic()
    tracker.close(about["end"], "because", SUMMARY if about["end"] == "finished" else {})
    closed = time.monotonic()  # the same clock in all processes
    add = sorted(adds)[len(adds) // 2] if adds else 0
    measured = {"made": made, "add": add, "close": closed - began, "closed": closed}
    print(json.dumps({"run_id": tracker.run_id, "wandb": "wandb" in sys.modules, **measured}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
