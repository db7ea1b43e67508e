"""metrics.jsonl, the record of a run: one JSON object a line, and what is measured for it.

Lines are appended and flushed as they come. When a run resumes from an earlier step, the record is cut back to it, so
no step ever stands twice.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.files import write_atomically, writing_to
from training.engine.batch_plan import BatchPlan
from training.engine.cluster import Cluster

METRICS = "metrics.jsonl"


class Record:
    """Appends to `run_dir`/metrics.jsonl. Used on one rank only."""

    def __init__(self, run_dir: Path, *, resumed_step: int):
        self._path = run_dir / METRICS
        kept = [line for line in read_metrics(run_dir) if line["step"] <= resumed_step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line: what (`kind`: train, validation), after how many optimizer steps, the values, and the time."""
        line = {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}
        with writing_to(self._path, option="--run_dir"):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Ends the record."""
        self._file.close()


@dataclass(frozen=True)
class Figures:
    """Means over a window of steps. Tokens are real ones over all ranks; padding is counted apart."""

    loss: float
    tokens_per_s: float
    padding_share: float


class Window:
    """The steps since the last line of the record: their losses and tokens, and the time that went into training."""

    def __init__(self, plan: BatchPlan):
        self._plan = plan
        self._start()

    def _start(self) -> None:
        self._losses: list[Tensor] = []
        self._tokens = self._positions = 0
        self._began = time.monotonic()

    def add(self, step: int, loss: Tensor) -> None:
        """Takes in one step: its loss on this rank, left on the device, and the tokens of all ranks."""
        self._losses.append(loss)
        for batch in self._plan.step(step):
            lengths = self._plan.lengths[batch.samples]
            self._tokens += int(lengths.sum())
            self._positions += len(lengths) * int(lengths[-1])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around whatever is not training: it does not count in the speed."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def close(self, cluster: Cluster) -> Figures:
        """The figures of the window, its losses summed over ranks; a new window begins. To be called by all ranks."""
        losses = cluster.sum(torch.stack(self._losses)).tolist()
        figures = Figures(
            loss=sum(losses) / len(losses),
            tokens_per_s=round(self._tokens / (time.monotonic() - self._began), 1),
            padding_share=round(1 - self._tokens / self._positions, 5),
        )
        self._start()
        return figures


def memory_mb(device: torch.device) -> float:
    """Most memory this process has used so far, in MB: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # Linux counts in KiB


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first. A last line torn by a kill is left out."""
    path = Path(run_dir, METRICS)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
