"""Saving without stopping the training.

At a step boundary the state is copied to buffers in host memory, which is all that the training waits for. Hashing,
writing and fsync happen in a thread (they release Python's lock). At most one save is in flight, and the process does
not end before it is done. After an error that may pass the save is tried again; if it fails for good, training goes on
as long as an older checkpoint stands, and is asked to stop when saves fail repeatedly.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from training.base.console import UserError, warn
from training.base.durations import format_duration
from training.base.environment import time_to_leave
from training.base.options import Options
from training.engine.checkpoint import Tensors, bytes_of, checkpoints, publish, retire

# Network file systems have bad moments. A save is tried so many times, with these pauses in seconds.
_PAUSES_S = (1.0, 5.0, 15.0)
_MAY_PASS = {
    errno.EIO,
    errno.EAGAIN,
    errno.EINTR,
    errno.EBUSY,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}

# After this many failed saves in a row the work at risk is worth more than what further training adds to it.
FAILED_SAVES_LIMIT = 3

# How fast a disk is taken to be before the first save was measured, bytes per second: a slow one.
_ASSUMED_SPEED = 50e6


EverySteps = Annotated[int, Field(ge=1)] | Literal["auto"]


class CheckpointOptions(Options):
    """How often to save and what to keep."""

    every_steps: EverySteps = Field(
        "auto",
        description="steps between checkpoints; auto: so many that least is lost, as steps and saves are found to take",
    )
    hours_between_kills: float = Field(24, gt=0, description="how often auto expects a session to be killed")
    keep: int = Field(2, ge=1, description="newest checkpoints to keep, besides the best ones")
    keep_best: int = Field(1, ge=1, description="checkpoints of the best validations to keep")
    best_by: str = Field(
        "accuracy",
        pattern=r"^[a-z][a-z0-9_]*$",
        description="the score that says which those are: accuracy, loss, or of what is generated bleu, chrf (score "
        "for QLoRA); may change",
    )
    background: bool = Field(
        True, description="write while training goes on, for a copy of the state in memory; false: wait for the disk"
    )


def best_interval_s(save_s: float, between_kills_s: float) -> float:
    """Seconds between two saves at which saving and lost work together cost least (Young 1974).

    save_s: how long a save holds the training up. between_kills_s: mean time between two failures.
    """
    return math.sqrt(2 * save_s * between_kills_s)


def best_interval(step_s: float, stall_s: float, published_s: float, hours_between_kills: float, device: str) -> int:
    """The steps between two saves that lose least.

    Seconds that a step takes, that a save holds the training up, and that pass until it is on the disk.
    """
    # On a CPU, what writes takes the processors from the steps.
    cost_s = published_s if device.startswith("cpu") else stall_s
    # At most one save is in flight: an interval shorter than it takes would hold the training up after all.
    best_s = max(published_s, best_interval_s(cost_s, 3600 * hours_between_kills))
    return max(1, round(best_s / step_s))


def price_of_a_kill(every_steps: int, best_steps: int, step_s: float, hours_between_kills: float) -> str:
    """What a kill costs with a checkpoint every so many steps, in words. best_steps: of `best_interval`."""
    return (
        f"a checkpoint every {every_steps:,} steps is one every {format_duration(every_steps * step_s)}, and a kill "
        f"costs half of that and a start; with a kill every {hours_between_kills:g} hours, one every {best_steps:,} "
        "steps would lose least"
    )


def copied_to_host(tensors: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Copies in host memory, ready to be written.

    Copied on a CPU, too: some optimizers share a table among all parameters, which cannot be written as such.
    """
    return {
        name: {key: tensor.to("cpu", copy=True).contiguous() for key, tensor in part.items()}
        for name, part in tensors.items()
    }


def write_s(tensors: Mapping[str, Tensors]) -> float:
    """A guess at how long such tensors take to the disk, in seconds, before the first save is measured."""
    return 1 + bytes_of(tensors) / _ASSUMED_SPEED


class Saver:
    """Saves a run's checkpoints; used on one rank only."""

    def __init__(
        self,
        run_dir: Path,
        options: CheckpointOptions,
        about: Mapping[str, Any],
        published: Callable[[], object] = lambda: None,
    ):
        """published: is called in the background when a checkpoint is."""
        self._run_dir, self._options, self._about, self._published = run_dir, options, about, published
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._estimate_s = 1.0
        self.stalls_s: list[float] = []  # how long each save kept the training waiting
        self.saves_s: list[float] = []  # how long each took until it was published
        self.failures = 0  # saves in a row, up to the last one
        self.error: str | None = None  # why the last save failed, None if it did not
        # A kill behind a save leaves one checkpoint too many, and there would be two while the next is written. Where
        # the newest cannot be read back nothing is removed; the next save says so if it is no better then.
        with suppress(OSError):
            for newest in checkpoints(run_dir)[-1:]:
                retire(run_dir, newest, options.keep, options.keep_best, options.best_by)

    def prepare(self, tensors: Mapping[str, Tensors]) -> None:
        """Makes the buffers for such tensors, in the background: what costs most is the first touch of their memory."""
        self._estimate_s = write_s(tensors)
        if not self._options.background:
            return
        self._buffers = {
            # Pinned, so that a copy from the GPU is asynchronous and takes no second buffer.
            name: {key: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for key, t in part.items()}
            for name, part in tensors.items()
        }
        buffers = [buffer for part in self._buffers.values() for buffer in part.values()]
        self._run(lambda: [buffer.zero_() for buffer in buffers])

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensors],
        state: Mapping[str, Any],
        first: Callable[[], object] = lambda: None,
    ) -> None:
        """Copies the state of `step` and begins to publish it; returns as soon as training may change the tensors.

        first: is called in the background before anything is written.
        """
        began = time.monotonic()
        self.drain()
        self._estimate_s = write_s(tensors)
        buffers, copied = self._copied(tensors)

        def work() -> None:
            if copied is not None:
                copied.synchronize()
            first()
            self._publish(step, buffers, state, began)

        self._run(work)
        if not self._options.background:
            self.drain()
        self.stalls_s.append(time.monotonic() - began)

    def drain(self) -> None:
        """Waits until nothing is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def is_busy(self) -> bool:
        """Whether something is in flight."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def seconds(self) -> float:
        """How long a save takes until it is published: the slowest of the last three, or a guess before the first."""
        return max(self.saves_s[-3:]) if self.saves_s else self._estimate_s

    @property
    def gives_up(self) -> bool:
        """Whether to train on makes no sense: saves fail repeatedly, or one failed and no checkpoint stands."""
        return self.failures >= FAILED_SAVES_LIMIT or (self.failures > 0 and not checkpoints(self._run_dir))

    def check(self) -> None:
        """Raises UserError if the last save failed and no checkpoint stands; to be called when drained."""
        if self.error is not None and not checkpoints(self._run_dir):
            raise UserError(self.error)

    def _copied(self, tensors: Mapping[str, Tensors]) -> tuple[Mapping[str, Tensors], torch.cuda.Event | None]:
        """A copy in host memory, and the event after which it is complete if a GPU is still copying."""
        if not self._options.background:
            return copied_to_host(tensors), None
        if _names(tensors) != _names(self._buffers):
            self.prepare(tensors)
            self.drain()
        for name, part in tensors.items():
            for key, tensor in part.items():
                self._buffers[name][key].copy_(tensor, non_blocking=True)
        if not any(tensor.is_cuda for part in tensors.values() for tensor in part.values()):
            return self._buffers, None
        # The GPU works in order: the next step changes the tensors only after they are copied.
        copied = torch.cuda.Event()
        copied.record()
        return self._buffers, copied

    def _run(self, work: Callable[[], object]) -> None:
        self.drain()
        # A daemon: when asked twice to stop, the process leaves at once, and an unpublished checkpoint is nothing.
        self._thread = threading.Thread(target=work, name="saving", daemon=True)
        self._thread.start()

    def _publish(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any], began: float) -> None:
        try:
            self._try_to_publish(step, tensors, state)
        except (UserError, OSError) as error:
            self.failures += 1
            self.error = f"the checkpoint of step {step:,} could not be written: {error}"
            if checkpoints(self._run_dir):
                warn(f"{self.error}. Older checkpoints stand, training goes on; failed saves in a row: {self.failures}")
            return
        except BaseException as error:  # if the thread died in silence, nobody would miss the save
            self.failures = FAILED_SAVES_LIMIT
            self.error = f"the checkpoint of step {step:,} could not be written: {error!r}"
            raise
        self.failures, self.error = 0, None
        self.saves_s.append(time.monotonic() - began)
        self._published()
        if len(self.saves_s) == 1:
            self._compare_with_time_to_leave()

    def _compare_with_time_to_leave(self) -> None:
        """Warns if a save takes longer than a launcher leaves for it: the last one would be cut off."""
        limit = time_to_leave()
        if limit is not None and self.seconds > limit[0]:
            warn(
                f"a save takes {format_duration(self.seconds)}, but a run that is told to leave is killed after "
                f"{format_duration(limit[0])} by {limit[1]}: save more often "
                "(--checkpoint.every_steps), so that less is done again then"
            )

    def _try_to_publish(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        for pause_s in (*_PAUSES_S, None):
            try:
                keep, keep_best = self._options.keep, self._options.keep_best
                publish(self._run_dir, step, tensors, state=state, about=self._about, keep=keep, keep_best=keep_best)
                return
            except OSError as error:
                if error.errno not in _MAY_PASS or pause_s is None:
                    raise
                warn(f"saving step {step:,}: {error}; trying again in {pause_s:g} s")
                time.sleep(pause_s)


def _names(tensors: Mapping[str, Tensors]) -> dict[str, set[str]]:
    return {name: set(part) for name, part in tensors.items()}
