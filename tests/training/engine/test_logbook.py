"""What is told of a run beside its record: TensorBoard's files, and the command at the end of a session."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Launch
from tests.support.lives import Life
from tests.support.runs import SHORT_RUN, damage, last_checkpoint
from training.base.console import UserError
from training.engine import logbook
from training.engine.metrics import read_metrics
from training.engine.tensorboard import Board


def test_command_at_the_end_of_each_session_hears_how_the_run_stands(launch: Launch, sample_data, tmp_path):
    said = tmp_path / "said"
    command = f'echo "$RELAY_STATUS|$RELAY_REASON|$RELAY_RUN_DIR|${{WORLD_SIZE:-alone}}" >> {said}; exit 3'
    run = (*SHORT_RUN, "--optim.steps", 4, "--session.on_end", command)
    life = Life(launch, tmp_path, sample_data, ranks=2, run=run)
    stopped = life.start({"at": "forward", "step": 3, "rank": 1, "do": "SIGTERM"}).wait()
    assert stopped.status == 0 and "session.on_end ended with status 3" in stopped.err, stopped
    assert life.start().wait().status == 0
    where = life.run_dir.resolve()
    assert said.read_text("utf-8").splitlines() == [
        f"resumable|signal SIGTERM|{where}|alone",
        f"finished|all steps done|{where}|alone",
    ]


def test_command_that_does_not_end_is_ended_with_all_it_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logbook, "ON_END_LIMIT_S", 0.2)
    logbook.Word(f"(sleep 1; touch {tmp_path}/late) & wait", tmp_path, "failed", "a reason").wait()
    assert "had not ended after 0.2 s" in capsys.readouterr().err
    time.sleep(1.2)
    assert not Path(tmp_path, "late").exists()


@pytest.mark.parametrize("reason", ["$(touch hole)", "`touch hole`", "'; touch hole; '"])
def test_reason_is_text_and_no_part_of_the_command(tmp_path, monkeypatch, reason):
    monkeypatch.chdir(tmp_path)
    logbook.Word('printf %s "$RELAY_REASON" > said', tmp_path, "failed", reason).wait()
    assert (tmp_path / "said").read_text("utf-8") == reason and not (tmp_path / "hole").exists()


def shown(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(each.step, each.value) for each in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_has_every_step_once_through_kills_and_a_fallback(launch: Launch, sample_data, tmp_path):
    run = (*SHORT_RUN, "--optim.steps", 12, "--checkpoint.every_steps", 3, "--log.validate_every_steps", 2)
    life = Life(launch, tmp_path, sample_data, ranks=2, run=(*run, "--log.tensorboard", "true"))
    life.kill_at(5)
    life.kill_at(11)
    damage(last_checkpoint(life.run_dir))
    assert life.start().wait().status == 0
    lines = read_metrics(life.run_dir)
    for name, values in shown(life.run_dir).items():
        kind, _, key = name.partition("/")
        expected: list[Any] = [(line["step"], line[key]) for line in lines if line["kind"] == kind]
        assert [step for step, _ in values] == [step for step, _ in expected]
        assert [value for _, value in values] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert {"train/loss", "train/lr", "validation/loss", "validation/accuracy"} <= shown(life.run_dir).keys()
    assert len(list((life.run_dir / "tensorboard").iterdir())) == 1


def test_missing_tensorboard_is_said_before_the_training_and_a_full_disk_is_no_reason_to_end(
    tmp_path, monkeypatch, capsys
):
    board = Board(tmp_path, [])
    monkeypatch.setattr(board._writer, "add_scalar", lambda *_: (_ for _ in ()).throw(OSError(28, "no room")))
    line = {"kind": "train", "step": 1, "loss": 1.0, "time": 1.0}
    board.add(line)
    board.add(line)
    board.close()
    assert capsys.readouterr().err.count("cannot be written") == 1
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("training.engine.tensorboard.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        Board(tmp_path, [])
