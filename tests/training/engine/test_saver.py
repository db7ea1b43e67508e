"""Saving beside the training: what it saves, what it waits for, and what it does when it cannot."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from training.base import environment
from training.base.console import UserError
from training.engine import saver as saver_module
from training.engine.checkpoint import checkpoints, newest_valid
from training.engine.saver import FAILED_SAVES_LIMIT, CheckpointOptions, Saver, best_interval, best_interval_s

STATE = {"scores": {}}
TORCHRUN = "torchrun, unless its --shutdown-timeout is raised"


def tensors(value: float, size: int = 1000) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model.safetensors": {"weight": torch.full((size,), value), "turned": torch.full((3, 5), value).t()},
        "optimizer.safetensors": {"step/weight": torch.tensor(value)},
    }


def saver(run_dir: Path, **options: Any) -> Saver:
    about: dict[str, object] = {"task": "test", "config": {}, "data": {}, "versions": {}}
    return Saver(run_dir, CheckpointOptions(**options), about)


def value_of(run_dir: Path) -> float:
    """What the newest checkpoint holds; the same everywhere."""
    newest = newest_valid(run_dir)
    assert newest is not None
    values = {float(each) for tensor in newest.model_state().values() for each in tensor.flatten()}
    (value,) = values | {float(newest.optimizer_state()["step/weight"])}
    return value


class Gate:
    """Holds every publication up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._open, self.running, self.most = threading.Event(), 0, 0
        real = saver_module.publish

        def publish(*words: Any, **more: Any) -> None:
            self.running += 1
            self.most = max(self.most, self.running)
            self._open.wait(60)
            real(*words, **more)
            self.running -= 1

        monkeypatch.setattr(saver_module, "publish", publish)

    def open(self) -> None:
        self._open.set()


def test_a_kill_behind_a_save_does_not_leave_one_checkpoint_too_many_for_the_next(tmp_path, monkeypatch):
    first = saver(tmp_path, keep=9, background=False)  # as if none had been retired yet
    for step in range(1, 6):
        first.save(step, tensors(step), STATE)
    gate, ours = Gate(monkeypatch), saver(tmp_path, keep=2)
    ours.save(6, tensors(6), STATE)
    assert [each.step for each in checkpoints(tmp_path)] == [4, 5], "while the next one is written"
    gate.open()
    ours.drain()
    assert [each.step for each in checkpoints(tmp_path)] == [5, 6]


@pytest.mark.parametrize("prepared", [True, False])
def test_what_is_saved_is_the_state_of_the_step_whatever_training_does_meanwhile(tmp_path, monkeypatch, prepared):
    gate, ours, state = Gate(monkeypatch), saver(tmp_path), tensors(1)
    if prepared:
        ours.prepare(state)
    ours.save(1, state, STATE)
    assert ours.is_busy
    for part in state.values():
        for tensor in part.values():
            tensor.fill_(2)  # the next step
    gate.open()
    ours.drain()
    assert value_of(tmp_path) == 1


def test_one_save_is_in_flight_at_most_and_none_is_left_out(tmp_path, monkeypatch):
    gate, ours = Gate(monkeypatch), saver(tmp_path, keep=5)
    ours.save(1, tensors(1), STATE)
    second = threading.Thread(target=lambda: [ours.save(step, tensors(step), STATE) for step in (2, 3)])
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second save waits for the first"
    gate.open()
    second.join()
    ours.drain()
    assert gate.most == 1
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [1, 2, 3]


def test_without_background_the_checkpoint_stands_when_save_returns(tmp_path):
    ours = saver(tmp_path, background=False)
    ours.save(1, tensors(1), STATE)
    assert not ours.is_busy and value_of(tmp_path) == 1


def test_what_comes_first_is_done_before_the_checkpoint_stands(tmp_path):
    there = []
    saving = saver(tmp_path)
    saving.save(1, tensors(1.0), STATE, first=lambda: there.append(len(checkpoints(tmp_path))))
    saving.drain()
    assert there == [0] and len(checkpoints(tmp_path)) == 1


@pytest.mark.parametrize("background", [True, False])
def test_before_the_first_save_its_time_is_estimated_by_its_size(tmp_path, background):
    saving = saver(tmp_path, background=background)
    saving.prepare(tensors(1.0, size=25_000_000))
    saving.drain()
    assert saving.seconds == pytest.approx(3, rel=0.01)  # 100 MB


def test_state_of_another_shape_is_saved_too(tmp_path):
    """At step 0 an optimizer has no tensors yet."""
    ours = saver(tmp_path)
    ours.save(0, {"model.safetensors": tensors(0)["model.safetensors"], "optimizer.safetensors": {}}, STATE)
    ours.save(1, tensors(1), STATE)
    ours.drain()
    assert [checkpoint.verify() for checkpoint in checkpoints(tmp_path)] == [None, None]
    assert value_of(tmp_path) == 1


def failing(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> list[int]:
    """Makes the next `times` publications fail with this error of the system; gives back the attempts."""
    attempts: list[int] = []
    real = saver_module.publish

    def publish(run_dir: Path, step: int, *words: Any, **more: Any) -> None:
        attempts.append(step)
        if len(attempts) <= times:
            raise OSError(number, os.strerror(number))
        real(run_dir, step, *words, **more)

    monkeypatch.setattr(saver_module, "publish", publish)
    monkeypatch.setattr(saver_module, "_PAUSES_S", (0.01, 0.01, 0.01))
    return attempts


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_error_that_passes_is_only_a_delay(tmp_path, monkeypatch, capsys, number):
    attempts, ours = failing(monkeypatch, number, 3), saver(tmp_path)
    ours.save(1, tensors(1), STATE)
    ours.drain()
    assert attempts == [1, 1, 1, 1]
    assert value_of(tmp_path) == 1
    assert (ours.failures, ours.error) == (0, None)
    assert capsys.readouterr().err.count("trying again") == 3


def test_error_that_stays_is_not_tried_for_ever_and_the_old_checkpoint_stands(tmp_path, monkeypatch, capsys):
    ours = saver(tmp_path)
    ours.save(1, tensors(1), STATE)
    ours.drain()
    attempts = failing(monkeypatch, errno.EIO, 100)
    for number in range(1, FAILED_SAVES_LIMIT + 1):
        assert not ours.gives_up
        ours.save(1 + number, tensors(1 + number), STATE)
        ours.drain()
        assert ours.failures == number
    assert ours.gives_up
    assert len(attempts) == 4 * FAILED_SAVES_LIMIT
    ours.check()  # something stands: no error
    assert value_of(tmp_path) == 1
    assert f"failed saves in a row: {FAILED_SAVES_LIMIT}" in capsys.readouterr().err


def test_a_full_disk_is_not_tried_again_and_one_good_save_makes_up_for_it(tmp_path, monkeypatch):
    ours = saver(tmp_path)
    ours.save(1, tensors(1), STATE)
    ours.drain()
    attempts = failing(monkeypatch, errno.ENOSPC, 1)
    ours.save(2, tensors(2), STATE)
    ours.drain()
    assert attempts == [2] and ours.failures == 1
    ours.save(3, tensors(3), STATE)
    ours.drain()
    assert (ours.failures, ours.error) == (0, None)
    assert value_of(tmp_path) == 3


def test_failed_save_without_any_checkpoint_gives_up_at_once(tmp_path, monkeypatch):
    failing(monkeypatch, errno.ENOSPC, 1)
    ours = saver(tmp_path)
    ours.save(1, tensors(1), STATE)
    ours.drain()
    assert ours.gives_up
    with pytest.raises(UserError, match="step 1 could not be written"):
        ours.check()


def test_recommended_interval_loses_least_of_all():
    def lost_share(interval_s: float, save_s: float, between_kills_s: float) -> float:
        return save_s / interval_s + interval_s / 2 / between_kills_s

    for save_s, between_kills_s in ((0.2, 86400), (30, 3600 * 4)):
        best_s = best_interval_s(save_s, between_kills_s)
        least = lost_share(best_s, save_s, between_kills_s)
        assert all(lost_share(best_s * factor, save_s, between_kills_s) > least for factor in (0.5, 0.9, 1.1, 2))
    # sqrt(2 x 2 s x 4 hours) = 240 s; but saves of 300 s would hold each other up; and a step may be longer than that.
    for step_s, published_s, steps in ((3, 2, 80), (3, 300, 100), (900, 2, 1)):
        assert best_interval(step_s, 2, published_s, 4, "cuda") == steps
    assert best_interval(3, 0.01, 2, 4, "cpu") == 80, "there, what writes holds the steps up, too"


def test_a_save_that_takes_longer_than_the_launcher_leaves_for_it_is_told_once(tmp_path, monkeypatch, capsys):
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment.time_to_leave() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert environment.time_to_leave() == (30, TORCHRUN)
    words = ["python", "-m", "torch.distributed.run", "--shutdown-timeout=240", "-m", "training.gpt"]
    monkeypatch.setattr(environment, "command_line", lambda pid: words)
    assert environment.time_to_leave() == (240, TORCHRUN)
    words[3:4] = ["--shutdown_timeout", "0"]
    saving = saver(tmp_path)
    for step in (1, 2):
        saving.save(step, tensors(step), STATE)
        saving.drain()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is killed after 0s by {TORCHRUN}: save more often (--checkpoint.every_steps)" in line
    # SLURM's kill comes first.
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'KillOnBadExit           = 0'\necho 'KillWait                = 20 sec'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words[4] = "30"
    assert environment.time_to_leave() == (20, "SLURM, by its KillWait")
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    assert environment.time_to_leave() == (30, TORCHRUN)
