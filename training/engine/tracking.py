"""metrics.jsonl: the record of a run, one JSON object a line.

Lines are appended and flushed as they come. When a run resumes from an earlier step, the record is cut back to it, so
no step ever stands twice.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically

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
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Ends the record."""
        self._file.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first. A last line torn by a kill is left out."""
    path = Path(run_dir, METRICS)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
