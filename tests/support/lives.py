"""A run through all of its sessions, with an accident in each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import PATIENCE_S, Launch, Result, Started
from tests.support.runs import (
    assert_same_model,
    assert_same_record,
    command_of,
    last_checkpoint,
    status_of,
    train_lines,
)
from training.engine import checkpoint
from training.engine.checkpoint import checkpoints
from training.engine.status import read_sessions

STEPS, LOG_EVERY, SAVE_EVERY, VALIDATE_EVERY = 60, 5, 3, 20

EPOCH = 32  # steps: 128 micro-batches an epoch, four a step

RUN = (
    *("--model.width", 32, "--model.layers", 1, "--model.heads", 2, "--model.context", 64),
    *("--batch.tokens_per_micro_batch", 784, "--batch.micro_batches_per_step", 4),
    *("--optim.steps", STEPS, "--optim.warmup_steps", 10, "--optim.lr", 3e-3),
    *("--log.every_steps", LOG_EVERY, "--log.validate_every_steps", VALIDATE_EVERY),
    *("--checkpoint.every_steps", SAVE_EVERY),
)

# A step then takes longer than the ranks' interval of agreement, so that they agree at every one; and a run that is to
# be caught from outside does not end before it is.
SLOW = {"at": "forward", "do": "pause", "seconds": 0.03, "always": True}

# For what is to happen by itself "within seconds", on a machine that has other things to do as well.
SECONDS = 60


class Life:
    """One run from its first session to its last; `start` begins the next one, with its accidents."""

    def __init__(
        self,
        launch: Launch,
        folder: Path,
        data: Path,
        ranks: int | None,
        run_dir: Path | None = None,
        run: Sequence[object] = RUN,
        real: bool | None = None,
        module: str = "training.gpt",
    ):
        self._launch, self._folder, self.ranks, self._real, self._module = launch, folder, ranks, real, module
        self.run_dir = run_dir or folder / "run"
        self.command = command_of(self.run_dir, data, *run)
        self._sessions = 0
        self.places = folder

    def start(
        self,
        *accidents: dict[str, Any],
        words: tuple[object, ...] = (),
        environment: dict[str, str] | None = None,
        torchrun: tuple[str, ...] = (),
        ranks: int | None = None,
        real: bool | None = None,
        **how: Any,
    ) -> Started:
        self._sessions += 1
        self.places = self._folder / f"places-{self._sessions}"
        self.places.mkdir()
        about = {"folder": str(self.places), "list": accidents}
        named = (self._module,) if accidents and self._module != "training.gpt" else ()
        return self._launch(
            *named,
            *self.command,
            *words,
            module="tests.support.faulty_training" if accidents else self._module,
            ranks=self.ranks if ranks is None else ranks or None,
            environment={**(environment or {}), "ACCIDENTS": json.dumps(about)},
            torchrun=torchrun,
            real=self._real if real is None else real,
            **how,
        )

    def wait_at(self, started: Started, place: str, rank: int = 0) -> None:
        """Waits until the rank is held at the place."""
        wait_until(started, lambda: (self.places / f"at-{place}-{rank}").exists(), f"at {place}")

    def kill_at(self, step: int, **how: Any) -> Started:
        """A session that is killed from outside, all of it at once, while the first rank is held before the step.

        What it was saving is published by then: a busy machine would else decide where the next session begins.
        """
        session = self.start({"at": "forward", "step": step, "rank": 0, "do": "hold", "saved": True}, **how)
        self.wait_at(session, f"forward-{step}")
        session.kill_all()
        return session

    def go_on(self, place: str) -> None:
        (self.places / f"go-{place}").touch()

    def finish(self, uninterrupted: Path, *accidents: dict[str, Any]) -> Result:
        """The last session, and what all this is about. How it starts makes no difference any more."""
        result = self.start(*accidents, real=False).wait()
        assert result.status == 0, result
        assert_same_model(self.run_dir, uninterrupted)
        assert_same_record(self.run_dir, uninterrupted)
        assert not list(self.run_dir.rglob(".*")), "temporary files"
        return result


def wait_until(started: Started, condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        if started.process.poll() is not None and not condition():
            pytest.fail(f"ended with {started.process.returncode}, not {what}:\n{started.printed()}")
        if time.monotonic() > end:
            pytest.fail(f"not {what} after {patience_s} s:\n{started.printed()}")
        time.sleep(0.01)


def wait_for(happened: Callable[[], object]) -> None:
    """Waits for what takes a moment, without a command that may end meanwhile."""
    end = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def assert_all_gone(started: Started) -> None:
    """Nothing of the command is left, or only for a few seconds more."""
    end = time.monotonic() + SECONDS
    while started.living():
        assert time.monotonic() < end, f"still there: {started.living()}\n{started.printed()}"
        time.sleep(0.05)


def assert_stopped(run_dir: Path, reason: str, step: int | None = None) -> int:
    """The status says it, and the checkpoint of the very step at which it stopped is there. Returns the step."""
    status = status_of(run_dir)
    assert (status["status"], status["reason"]) == ("resumable", reason)
    assert last_checkpoint(run_dir).step == status["step"]
    assert step is None or status["step"] == step
    session = read_sessions(run_dir)[-1]
    assert (session["reason"], session["step"]) == (reason, status["step"])
    return status["step"]


def tell_otherwise(run_dir: Path, told: object, instead: object) -> None:
    """As if the run's config had named another path: its checkpoints stay valid."""
    for each in checkpoints(run_dir):
        path = each.folder / checkpoint.MANIFEST
        text = path.read_text("utf-8")
        assert json.dumps(str(told)) in text
        path.write_text(checkpoint._manifest_text(json.loads(text.replace(str(told), str(instead)))), "utf-8")
    assert [each.verify() for each in checkpoints(run_dir)] == [None] * len(checkpoints(run_dir))


def resumed_at(started: Started) -> int:
    words = started.printed().partition("resuming at step ")[2].split()
    assert words, started.printed()
    return int(words[0])


def assert_little_is_lost(run_dir: Path) -> int:
    """After a kill: what is published is whole, and nothing before it is lost. Returns the newest step."""
    published = checkpoints(run_dir)
    assert [each.verify() for each in published] == [None] * len(published)
    assert checkpoint.main([str(run_dir)]) == 0
    # One save may be in flight when the next is due; that one waits, and the training with it.
    assert train_lines(run_dir)[-1]["step"] <= published[-1].step + 2 * SAVE_EVERY
    return published[-1].step
