"""One session of a run: from start or resume to the next stop, agreed by all ranks.

A signal handler sets a flag and does nothing else; the step boundary acts on it. Ranks agree before anyone leaves the
loop, so none is left waiting in a collective. How the session ended stands in `status.json`: launchers turn it into an
exit status, since `torchrun` cannot pass a worker's on.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from data_prep.files import write_atomically
from training.engine.cluster import Cluster

EXIT_RESUMABLE = 75  # EX_TEMPFAIL: try again later

# Ranks agree on stopping at every step that takes longer than this, and about this often where steps are shorter.
_AGREE_EVERY_S = 0.2

STOP_FILE = "STOP"


class StopFlag:
    """Whether to stop, and why: SIGTERM, SIGINT, or a file named STOP in the run folder."""

    def __init__(self, run_dir: Path, cluster: Cluster):
        self._cluster = cluster
        self._file = run_dir / STOP_FILE
        self._signal = 0
        self._next_step = 0
        self._last_time: float | None = None
        self._last_step = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: leave at once, the last checkpoint stands
        self._signal = number

    def agreed(self, step: int) -> str | None:
        """The reason to stop before `step`, the same on every rank, or None. To be called by all ranks, every step.

        Costs one small reduction on the host at every step, or at every k-th when steps are short.
        """
        if step < self._next_step:
            return None
        now = time.monotonic()
        step_s = 0.0 if self._last_time is None else (now - self._last_time) / max(1, step - self._last_step)
        stop_file = self._cluster.is_first and self._file.exists()
        number, asked, slowest_s = self._cluster.maximum([self._signal, stop_file, step_s])
        # Every rank computes the same next step from the same numbers. An unknown step time means the next one.
        self._next_step = step + max(1, min(100, int(_AGREE_EVERY_S / slowest_s))) if slowest_s else step + 1
        self._last_time, self._last_step = now, step
        if number:
            return f"signal {signal.Signals(int(number)).name}"
        if asked:
            return f"the file {self._file}"
        return None

    def clear(self) -> None:
        """Removes the STOP file, so that the next session does not stop at once."""
        if self._cluster.is_first:
            self._file.unlink(missing_ok=True)


def write_status(
    run_dir: Path, status: Literal["running", "finished", "resumable", "failed"], reason: str, **more: Any
) -> None:
    """Writes status.json: how the run stands and why."""
    content = {"status": status, "reason": reason, **more, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_atomically(run_dir / "status.json", json.dumps(content, indent=2) + "\n")


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What `write_status` wrote last, or None."""
    try:
        return json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
