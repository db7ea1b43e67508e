"""Runs and their folders: commands, records, checkpoints, and when two runs are the same."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.support.commands import Result, launching
from tests.support.once import once
from training.base.options import parse
from training.data.prepared import open_prepared
from training.engine.batch_plan import BatchPlan
from training.engine.checkpoint import Checkpoint, checkpoints
from training.engine.metrics import read_metrics
from training.engine.status import read_status
from training.gpt import GPTConfig, Sequences
from training.translation import plan_of as plan_of_pairs

MODEL = ("--model.width", 32, "--model.layers", 2, "--model.heads", 2, "--model.context", 64, "--log.every_steps", 1)

SHORT_RUN = (*MODEL, "--batch.tokens_per_micro_batch", 256, "--optim.warmup_steps", 2)


def command_of(run_dir: Path, data: Path, *words: object) -> tuple[object, ...]:
    return ("--run_dir", run_dir, "--data", data, *words)


def config_of(command: tuple[object, ...]) -> GPTConfig:
    return parse(GPTConfig, [str(word) for word in command], prog="", about="")[0]


def plan_of(command: tuple[object, ...]) -> BatchPlan:
    """The plan that the run itself has."""
    config = config_of(command)
    return plan_of_pairs(config, Sequences.of(open_prepared(config.data), "train", config.model.context))


def train_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir) if line["kind"] == "train"]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in train_lines(run_dir)]


def status_of(run_dir: Path) -> dict[str, Any]:
    status = read_status(run_dir)
    assert status is not None
    return status


def last_checkpoint(run_dir: Path) -> Checkpoint:
    last = checkpoints(run_dir)[-1]
    assert last.verify() is None
    return last


def content_of(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` and every byte in it, save who held the lock last and the time in status.json."""
    content = {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    content.pop(str(folder / "lock"), None)
    if (folder / "status.json").exists():
        status = {**status_of(folder), "time": None}
        content[str(folder / "status.json")] = json.dumps(status).encode()
    return content


def assert_same_model(run_dir: Path, uninterrupted: Path) -> None:
    """The end of both runs is the same: weights, optimizer, scaler, moving average, bit for bit."""
    assert status_of(run_dir)["status"] == "finished"
    last, expected = last_checkpoint(run_dir), last_checkpoint(uninterrupted)
    assert last.step == expected.step
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= set(last.manifest["files"])
    for name in last.manifest["files"]:
        assert (last.folder / name).read_bytes() == (expected.folder / name).read_bytes(), name


def assert_same_record(run_dir: Path, uninterrupted: Path) -> None:
    """Every step stands once, in order, and says what the uninterrupted run's says, to the last digit."""
    steps = [line["step"] for line in train_lines(run_dir)]
    assert all(later > earlier for earlier, later in pairwise(steps))
    times = {"tokens_per_s", "flops_per_s", "memory_mb", "time"}
    records = [
        [{key: value for key, value in line.items() if key not in times} for line in read_metrics(folder)]
        for folder in (run_dir, uninterrupted)
    ]
    assert records[0] == records[1]


def assert_only_one_line_is_said(result: Result, *parts: str) -> None:
    """The ranks say what is wrong in one line, once; none ends with a traceback, and no library adds a warning."""
    assert result.status == 1, result
    (line,) = result.error_lines
    for part in parts:
        assert part in line
    assert not re.search(r'File ".*(training|launch|data_prep)/', result.err), result.err
    assert "Warning: " not in result.err


def damage(checkpoint: Checkpoint) -> None:
    """Flips one bit of the weights."""
    path = checkpoint.folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def reference(data: Path, *words: object, module: str = "training.gpt", ranks: int = 1) -> Path:
    """The folder of an uninterrupted run on so many ranks (1: a plain process), which nobody may change."""

    def train(folder: Path) -> None:
        with launching(folder) as launch:
            command = command_of(folder / "run", data, *words)
            result = launch(*command, module=module, ranks=ranks if ranks > 1 else None).wait()
        assert result.status == 0, result

    name = hashlib.sha256(repr((str(data), *map(str, words), module, ranks)).encode()).hexdigest()[:16]
    return once(f"run-{name}", train) / "run"
