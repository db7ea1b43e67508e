"""`training.gpt`, to which accidents happen at exact places, or the training that the first word names.

    ACCIDENTS='{"folder": "/tmp/x", "list": [{"at": "forward", "step": 20, "rank": 1, "do": "SIGTERM"}]}' \\
        torchrun --standalone --nproc-per-node=2 -m tests.support.faulty_training [training.qlora] --run_dir ...

at: begin (the command has done nothing; step 0), plan (the ranks have met, and nothing else has begun; step 0), forward
(before a forward pass of the step), batch (behind each batch of the validation after the step), validated (behind that
validation), or write (when the weights of the step's checkpoint are being written).
step, rank: where; without, at each. do: what, see `happen`. always: at every such place, not only at the first. saved:
hold once the checkpoint that is being written is published.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import training.gpt as gpt
from training.base.console import UserError, run_main
from training.base.environment import adopt_srun_task, own_rank
from training.engine import checkpoint, watchdog
from training.engine.batch_plan import BatchPlan

_ACCIDENTS = json.loads(os.environ["ACCIDENTS"])
_FOLDER = Path(_ACCIDENTS["folder"])
adopt_srun_task()
_RANK = int(own_rank())
if "RELAY_DEAD_AFTER_S" in os.environ:  # for tests that wait for a claim to die
    from training.engine.address import claim

    claim.DEAD_AFTER_S = float(os.environ["RELAY_DEAD_AFTER_S"])
_real_time = time.time


class FaultyConfig(gpt.GPTConfig):
    """The GPT's options, for launchers that look for them in the training's module."""


class PlantedError(Exception):
    """Stands for a mistake in a model."""


def sleep_for_ever() -> None:
    while True:
        time.sleep(3600)


def hold(name: str) -> None:
    """Says that this place is reached, and waits for leave to go on."""
    (_FOLDER / f"at-{name}-{_RANK}").touch()
    while not (_FOLDER / f"go-{name}").exists():
        time.sleep(0.005)


def happen(about: dict[str, Any], name: str) -> None:
    """The accident itself: hold, pause, sleep, lock, raise, mend, clock, a signal to itself, or a disk's error."""
    what = about["do"]
    if what == "hold":
        if about.get("saved"):
            for thread in threading.enumerate():
                if thread.name == "saving":
                    thread.join()
        hold(name)
    elif what == "pause":
        time.sleep(about["seconds"])
    elif what == "sleep":
        sleep_for_ever()
    elif what == "lock":  # a library that hangs and does not let go of Python's lock
        watchdog._REPORT_PATIENCE_S = 1.0
        time.sleep(1)  # so that the sentry hears of it
        while True:
            ctypes.PyDLL(None).sleep(3600)
    elif what == "raise":
        raise PlantedError("a planted mistake")
    elif what == "mend":
        raise UserError("a planted mistake that the user can mend")
    elif what == "clock":  # jumps to and fro
        ahead = time.time() - _real_time() > about["seconds"] / 2
        time.time = (lambda: _real_time() - about["seconds"]) if ahead else (lambda: _real_time() + about["seconds"])
    elif what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    else:
        number = getattr(errno, what)
        raise OSError(number, os.strerror(number))


def reach(place: str, step: int) -> None:
    """Lets happen what is to happen here."""
    for about in _ACCIDENTS["list"]:
        here = about["at"] == place and about.get("step") in (None, step) and about.get("rank") in (None, _RANK)
        if here and (about.get("always") or not about.get("done")):
            about["done"] = True
            happen(about, f"{place}-{step}")


class _Traps:
    """Puts `reach` in front of the product's functions; what they do stays theirs."""

    def __init__(self, training: Any) -> None:
        self.step = 0
        self._micro_batches_of, self._save_file, self._train = (
            BatchPlan.micro_batches_of,
            checkpoint.save_file,
            training.train,
        )

        def micro_batches_of(plan: BatchPlan, step: int, rank: int, world_size: int) -> Any:
            self.step = step + 1
            return self._micro_batches_of(plan, step, rank, world_size)

        BatchPlan.micro_batches_of, checkpoint.save_file, training.train = micro_batches_of, self.save_file, self.train

    def train(self, config: Any, task: Any, *others: Any, **more: Any) -> int:
        reach("plan", 0)
        self._loss, self._validate, self._generate = task.loss, task.validate, task.generate
        self._answers = bool(task.generated)  # which comes last in a validation
        task.loss, task.validate, task.generate = self.loss, self.validate, self.generate
        return self._train(config, task, *others, **more)

    def loss(self, *arguments: Any) -> Any:
        reach("forward", self.step)
        return self._loss(*arguments)

    def validate(self, model: Any, own_part: Any) -> Any:
        result = self._validate(model, self._trapped(own_part))
        if not self._answers:
            reach("validated", self.step)
        return result

    def generate(self, own_part: Any) -> Any:
        result = self._generate(self._trapped(own_part))
        reach("validated", self.step)
        return result

    def _trapped(self, own_part: Any) -> Any:
        def shared(batches: Any) -> Iterator[Any]:
            for batch in own_part(batches):
                yield batch
                reach("batch", self.step)

        return shared

    def save_file(self, tensors: Any, path: Path) -> None:
        if path.name == "model.safetensors":
            path.write_bytes(b"half a file")
            reach("write", int("".join(filter(str.isdigit, path.parent.name))))
        self._save_file(tensors, path)


if __name__ == "__main__":
    named = sys.argv[1:2] if sys.argv[1:2] and sys.argv[1].startswith("training.") else []
    del sys.argv[1 : 1 + len(named)]
    training = importlib.import_module(*named or ["training.gpt"])
    _Traps(training)
    sys.argv[0] = training.__file__

    def main() -> int | None:
        reach("begin", 0)
        return training.main()

    run_main(main)
