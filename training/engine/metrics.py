"""metrics.jsonl, one JSON object a line, and what is measured for it.

Lines are appended and flushed as they come. When a run resumes from an earlier step, the file is cut back to it, so no
step ever stands twice. After any number of stops and kills it reads as if the run had never been interrupted.
A value that is no finite number, such as a loss that ran away, is written as null: JSON has no word for it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.base.console import warn
from training.base.files import NotPlainError, open_in_place, read_plain, write_atomically
from training.engine.batch_plan import BatchPlan
from training.engine.cluster import Cluster
from training.engine.status import METRICS, metrics_line


class MetricsFile:
    """Appends to `run_dir`/metrics.jsonl. Used on one rank only."""

    def __init__(self, run_dir: Path, *, resumed_step: int, validated_step: int):
        """Cuts the file back to the resumed step, but validations to `validated_step`: the next one was interrupted."""
        self._path = run_dir / METRICS
        found = read_metrics(run_dir)
        self.reached: int = found[-1]["step"] if found else 0  # the last step of all lines, also of those cut off
        self.last_sign: float | None = found[-1]["time"] if found else None  # and when it was written
        self.lines = lines_up_to(found, resumed_step, validated_step)
        if len(self.lines) < len(found) or not self._path.exists() or _is_torn(self._path):
            write_lines(run_dir, self.lines)
        self._file = open_in_place(self._path)
        self._waiting = b""  # lines for which there was no room

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """One line: its kind (train or validation), after how many optimizer steps, the values, and the time."""
        finite = {
            key: None if isinstance(value, float) and not isfinite(value) else value for key, value in values.items()
        }
        line = {"kind": kind, "step": step, **finite, "time": round(time.time(), 3)}
        self._waiting += json.dumps(line).encode() + b"\n"
        self._flush()
        return line

    def _flush(self) -> None:
        end = self._path.stat().st_size
        try:
            if self._file.write(self._waiting) == len(self._waiting):
                self._waiting = b""
                return
        except OSError as error:
            reason = error.strerror
        else:
            reason = os.strerror(errno.ENOSPC)
        self._file.truncate(end)  # half a line is none
        warn(f"{self._path} cannot be written ({reason}); its lines wait until it can")

    def sync(self) -> None:
        """Brings the lines to the disk, so that a checkpoint never stands without them."""
        with contextlib.suppress(OSError, ValueError):  # the disk is full, or the file is closed: training goes on
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, after a last try to write lines that wait."""
        if self._waiting:
            self._flush()
            self._waiting = b""
        self._file.close()


@dataclass(frozen=True)
class Figures:
    """Means over a window of steps. Tokens are real ones over all ranks; padding is counted apart."""

    loss: float
    tokens_per_s: float
    padding_share: float


class Window:
    """The steps since the last line of metrics.jsonl: their losses and tokens, and the time that went into training."""

    def __init__(self, plan: BatchPlan, step: int = 0, earlier: Sequence[float] = ()):
        """earlier: what `losses` gave an earlier session to save: the losses, summed over ranks, of the window's steps
        up to `step`. They count in the loss and in the padding, not in the speed.
        """
        self._plan = plan
        self._start(earlier)
        for done in range(step - len(earlier), step):
            self._count(done)
        self._tokens = 0

    def _start(self, earlier: Sequence[float] = ()) -> None:
        self._earlier = list(earlier)
        self._losses: list[Tensor] = []
        self._tokens = self._real = self._positions = 0
        self._drawn = np.zeros_like(self._plan.drawn_per_epoch)
        self._began = time.monotonic()

    def add(self, step: int, loss: Tensor) -> None:
        """Takes in one step: its loss on this rank, left on the device, and the tokens of all ranks."""
        self._losses.append(loss)
        self._tokens += self._count(step)

    def _count(self, step: int) -> int:
        tokens, positions = self._plan.tokens(step)
        self._real += tokens
        self._drawn += self._plan.drawn(step)
        self._positions += positions
        return tokens

    def losses(self, cluster: Cluster) -> list[float]:
        """The loss of each step so far, summed over ranks. To be called by all ranks."""
        if not self._losses:
            return list(self._earlier)
        # In fp64, where the sum of fp32 numbers is exact: the order in which ranks are added depends on how many steps
        # are added at once, and a window that a stop cuts in two must have the same sum.
        return [*self._earlier, *cluster.sum(torch.stack(self._losses).double()).tolist()]

    def drawn(self) -> dict[str, int]:
        """How many samples of each source of a mixture the window's steps have; none where there is no mixture."""
        mixture = self._plan.mixture
        if mixture is None:
            return {}
        return dict(zip(mixture.names, self._drawn.tolist(), strict=True))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training, so that it does not count in the speed."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def close(self, cluster: Cluster) -> Figures:
        """The figures of the window, its losses summed over ranks; a new window begins. To be called by all ranks."""
        losses = self.losses(cluster)
        figures = Figures(
            loss=sum(losses) / len(losses),
            tokens_per_s=round(self._tokens / (time.monotonic() - self._began), 1),
            padding_share=round(1 - self._real / self._positions, 5),
        )
        self._start()
        return figures


def memory_mb(device: torch.device) -> float:
    """The most memory that this process has used so far, in MB: the GPU's where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    # Not ru_maxrss on Linux, where a program inherits the peak of the process that started it.
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, on a Mac


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first, see `metrics_line`. What is damaged, or torn by a kill, is left out."""
    return _read(Path(run_dir, METRICS))[0]


def write_lines(run_dir: str | Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes metrics.jsonl anew, with these lines."""
    write_atomically(Path(run_dir, METRICS), "".join(json.dumps(line) + "\n" for line in lines))


def lines_up_to(lines: Sequence[dict[str, Any]], step: int, validated_step: int) -> list[dict[str, Any]]:
    """Those that a run had written when it came to `step`, and had validated at `validated_step`."""
    last = {"validation": validated_step}
    return [line for line in lines if line["step"] <= last.get(line["kind"], step)]


def is_damaged(path: Path) -> bool:
    """Whether there are lines in a metrics.jsonl that cannot be read; the last one may be torn by a kill."""
    return _read(path)[1]


def _read(path: Path) -> tuple[list[dict[str, Any]], bool]:
    lines = [line for line in _content(path).split(b"\n")[:-1] if line]
    found = [values for line in lines if (values := metrics_line(line)) is not None]
    return found, len(found) < len(lines)


def _content(path: Path) -> bytes:
    try:
        return read_plain(path, 1 << 30)
    except (FileNotFoundError, NotPlainError):
        return b""


def _is_torn(path: Path) -> bool:
    """Whether a kill left half a line at the end, which the next one must not be appended to."""
    content = _content(path)
    return bool(content) and not content.endswith(b"\n")
