"""metrics.jsonl shown in wandb: one wandb run for all sessions of a run.

Promises: every step of metrics.jsonl stands once in wandb's history, in order, whatever kills or fallbacks lie between
sessions; a training never waits for wandb nor fails because of it, not at its start, not at its end, not when the
server dies in between. Without a server the visits are kept in the run folder, for `wandb sync` later; the next one
that finds a server uploads them first.

Each session reads back which steps wandb already holds, and logs the other lines of metrics.jsonl. A step's row is
logged when the run has come to a later step, or to its end: until then its validation may be missing.

One gap is left: when a session dies while it is online and the next one is offline, nobody can say which rows arrived;
all are logged again then, so that none is lost, and a step may stand twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from training.base.console import warn
from training.engine.status import numbers_of
from training.engine.wandb.options import WandbOptions, is_disabled, mode_of, same_run
from training.engine.wandb.visit import Visit, abandon, first_line, holds

__all__ = ["WandbOptions", "WandbTracker", "publish_evaluation", "send_the_rest"]

CLOSE_LIMIT_S = 15.0
PUBLISH_LIMIT_S = 60.0  # an evaluation waits for its upload, but not for ever


@dataclass(frozen=True)
class _End:
    status: str
    reason: str
    summary: Mapping[str, Any]


class WandbTracker:
    """Shows a run in wandb. One a session, on the first rank only; a thread of its own does all that may wait."""

    def __init__(
        self,
        options: WandbOptions,
        run_dir: Path,
        *,
        run_id: str | None,
        config: dict[str, Any],
        lines: list[dict[str, Any]],
    ):
        """run_id: wandb's id of the run as the checkpoint has it, see `same_run`. config: the resolved options, shown
        with the run. lines: those of metrics.jsonl so far, oldest first.

        Raises UserError if wandb is asked for and not installed, or the run folder cannot be written.
        """
        self._run_id: str | None = None
        if mode_of(options.mode) == "disabled":
            return
        self._visit = Visit(options, run_dir, run_id, config)
        self._run_id = self._visit.run_id
        self._left = False
        self._queue: SimpleQueue[dict[str, Any] | _End] = SimpleQueue()
        for line in lines:
            self._queue.put(line)
        self._thread = Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """wandb's id of the run, for the checkpoint; None if disabled."""
        return self._run_id

    def add(self, line: dict[str, Any]) -> None:
        """Takes in a new line: `kind`, `step`, values, `time`. Microseconds; never raises."""
        if self._run_id is not None:
            self._queue.put(line)

    def close(self, status: str, reason: str, summary: Mapping[str, Any]) -> None:
        """Ends the visit within CLOSE_LIMIT_S. status: finished, resumable or failed. summary: final scores."""
        if self._run_id is None:
            return
        self._queue.put(_End(status, reason, summary))
        self._thread.join(CLOSE_LIMIT_S)
        if self._thread.is_alive():
            self._left = True
            abandon()
            warn("wandb did not come to an end in time and was left; what it lacks follows with the next session")

    def _work(self) -> None:
        try:
            self._visit.start()
            row: dict[str, Any] = {}
            while not isinstance(item := self._queue.get(), _End):
                if row and item["step"] > row["step"]:
                    self._visit.log(row)
                    row = {}
                row |= _values(item)
            if row and item.status == "finished":
                self._visit.log(row)
            self._visit.summarise({"status": item.status, "reason": item.reason, **item.summary})
            self._visit.finish(item.status)
        except Exception as error:  # whatever wandb does, the training must not notice
            if not self._left:
                warn(f"wandb failed ({first_line(error)}); the training goes on, and metrics.jsonl has everything")


def send_the_rest(
    options: WandbOptions,
    run_dir: Path,
    run_id: str | None,
    config: dict[str, Any],
    lines: list[dict[str, Any]],
    summary: Mapping[str, Any],
) -> None:
    """Brings to wandb what the last session of a finished run could not; does nothing if nothing is missing."""
    if mode_of(options.mode) == "disabled" or not lines:
        return
    if not holds(run_dir, same_run(options, run_dir, run_id), lines[-1]["step"]):
        WandbTracker(options, run_dir, run_id=run_id, config=config, lines=lines).close(
            "finished", "all steps done", summary
        )


def publish_evaluation(
    run_dir: Path,
    options: WandbOptions,
    scores: dict[str, Any],
    examples: Sequence[tuple[str, ...]],
    report: Path,
    *,
    part: str = "test",
) -> None:
    """Adds an evaluation to the run in wandb: scores (`test/bleu`), a table of examples, and the report as a file.

    examples: source, reference, translation, note. Returns within PUBLISH_LIMIT_S and never raises: what goes wrong is
    a warning, since the evaluation itself is on the disk. The history stays as it is, so the run can still go on.
    """
    # The config is that of the run, which may be a stranger's: whoever sets the variables here has the last word.
    if "disabled" in (mode_of(options.mode), os.environ.get("WANDB_MODE")) or is_disabled():
        return

    def work() -> None:
        try:
            import wandb

            visit = Visit(options, run_dir, None, config=None)
            visit.start()
            try:
                visit.summarise({f"{part}/{key}": value for key, value in scores.items()})
                visit.attach(report)
                columns = ["source", "reference", "translation", "note"]
                table = wandb.Table(columns=columns, data=[list(example) for example in examples])
                visit.summarise({f"{part}/examples": table})
            finally:
                visit.finish("finished")
        except Exception as error:
            warn(f"wandb did not get this evaluation ({first_line(error)}); its report is {report}")

    thread = Thread(target=work, name="wandb", daemon=True)
    thread.start()
    thread.join(PUBLISH_LIMIT_S)
    if thread.is_alive():
        abandon()
        warn(f"wandb did not come to an end in time and was left; the evaluation's report is {report}")


def _values(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl as part of a history row. What is null there leaves a gap."""
    return {"step": line["step"], "_timestamp": line.get("time", time.time()), **numbers_of(line)}
