"""Trainings under DeepSpeed: the same curve, the same accidents, the same checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from tests.support.commands import Launch
from tests.support.lives import RUN, Life, assert_all_gone, assert_stopped, resumed_at
from tests.support.runs import (
    assert_only_one_line_is_said,
    assert_same_model,
    command_of,
    config_of,
    damage,
    last_checkpoint,
    losses,
    reference,
    status_of,
)
from training.base.console import UserError
from training.engine.batch_plan import in_rounds
from training.engine.checkpoint import checkpoints, newest_valid
from training.engine.metrics import read_metrics
from training.engine.zero import ZeroOptions, state_bytes

STEPS = 24
OWN = ("--optim.steps", STEPS, "--optim.warmup_steps", 3, "--log.every_steps", 1, "--log.validate_every_steps", 8)


def zero(stage: int, offload: str = "none") -> tuple[object, ...]:
    return ("--parallel", "deepspeed", "--zero.stage", stage, "--zero.offload", offload)


@pytest.fixture
def whole(sample_data: Path) -> Callable[..., Path]:
    """The run folder of an uninterrupted run on two ranks, with such options."""

    def run(*words: object) -> Path:
        run_dir = reference(sample_data, *RUN, *OWN, *words, ranks=2)
        said = [(run_dir.parent / "output-0" / name).read_text() for name in ("out", "err")]
        assert "Warning" not in said[1] and "[WARNING]" not in said[0], said
        return run_dir

    return run


# The curve.


# The other stages' curves are also measured where a run goes on with another stage.
@pytest.mark.parametrize(
    "words",
    [*(pytest.param(zero(stage), marks=pytest.mark.whole) for stage in (1, 2)), zero(3), zero(3, "all")],
    ids=str,
)
def test_loss_curve_is_that_of_ddp_at_every_step(whole, words):
    expected, found = losses(whole()), losses(whole(*words))
    assert len(expected) == STEPS and expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, rel=1e-4)
    for key in ("grad_norm", "accuracy"):  # of the whole gradient before it is clipped; of all held-out data
        both = [[line[key] for line in read_metrics(run) if key in line] for run in (whole(), whole(*words))]
        assert both[1] == pytest.approx(both[0], rel=1e-3), key


def test_every_rank_counts_for_its_share_of_the_state():
    assert [state_bytes(ZeroOptions(stage=stage), ranks=4) for stage in (1, 2, 3)] == [10, 7, 4]
    assert state_bytes(ZeroOptions(stage=2, offload="optimizer"), ranks=4) == 5


# Accidents. More of them, at more places, are in test_faults.py: the loop that they meet is the same.


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.whole), 3])
def test_killed_stopped_and_damaged_run_ends_with_the_uninterrupted_ones_bits(
    whole, launch: Launch, sample_data, tmp_path, stage
):
    life, words = Life(launch, tmp_path, sample_data, ranks=2), (*OWN, *zero(stage))

    # In the middle of a save, which so remains unpublished.
    session = life.start({"at": "write", "step": 9, "do": "SIGKILL"}, words=words)
    assert session.wait().status != 0
    assert_all_gone(session)
    assert [each.verify() for each in checkpoints(life.run_dir)].count(None) == len(checkpoints(life.run_dir))

    # All at once, from outside.
    assert resumed_at(life.kill_at(14, words=words)) == 8  # where it was validated

    # A polite stop by one rank's signal, at once.
    session = life.start({"at": "forward", "step": 19, "rank": 1, "do": "SIGTERM"}, words=words)
    assert session.wait().status == 0
    assert_stopped(life.run_dir, "signal SIGTERM", step=19)
    damage(last_checkpoint(life.run_dir))

    session = life.start(words=words)
    result = session.wait()
    assert result.status == 0, result
    assert "step-0000000019 is damaged" in result.err and resumed_at(session) == 18
    uninterrupted = whole(*zero(stage))
    assert_same_model(life.run_dir, uninterrupted)
    assert losses(life.run_dir) == losses(uninterrupted)


def test_run_goes_on_with_another_stage_other_ranks_and_without_deepspeed(whole, launch, sample_data, tmp_path):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    for step, ranks, words in ((5, 2, zero(3)), (10, 0, zero(1, "optimizer")), (15, 4, ()), (20, 2, zero(2))):
        stop = {"at": "forward", "step": step, "rank": 0, "do": "SIGTERM"}
        assert life.start(stop, words=(*OWN, *words), ranks=ranks).wait().status in (0, 75)
        assert_stopped(life.run_dir, "signal SIGTERM", step=step)
    assert life.start(words=(*OWN, *zero(3, "all"))).wait().status == 0
    assert losses(life.run_dir) == pytest.approx(losses(whole()), rel=1e-4)


def test_fp16_keeps_its_scaler_and_resumes_to_the_same_bits(launch: Launch, sample_data, tmp_path):
    words = (*zero(2), "--precision", "fp16", "--optim.steps", 12, "--log.every_steps", 1)
    folders = [tmp_path / name for name in ("whole", "run", "ddp")]
    for folder in folders:
        folder.mkdir()
    whole, life, ddp = (Life(launch, folder, sample_data, ranks=2) for folder in folders)
    assert whole.start(words=words).wait().status == 0
    assert ddp.start(words=(*words, "--parallel", "ddp")).wait().status == 0
    session = life.start({"at": "write", "step": 9, "do": "SIGKILL"}, words=words)
    assert session.wait().status != 0
    assert life.start(words=words).wait().status == 0
    assert_same_model(life.run_dir, whole.run_dir)
    scalers = [last_checkpoint(each.run_dir).state()["scaler"] for each in (whole, life, ddp)]
    assert scalers[0] == scalers[1] == scalers[2]
    assert scalers[0]["_growth_tracker"] == 12, "it counts the steps since the start or the last overflow"
    assert losses(whole.run_dir) == pytest.approx(losses(ddp.run_dir), rel=1e-3)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.whole), 3])
def test_gradients_that_stay_not_finite_end_the_run_with_weights_that_are(launch, sample_data, tmp_path, stage):
    life = Life(launch, tmp_path, sample_data, ranks=2)
    wrong = ("--optim.lr", 1e30, "--optim.warmup_steps", 0, "--checkpoint.every_steps", 1)
    result = life.start(words=(*wrong, *zero(stage), "--log.every_steps", 1)).wait()
    assert_only_one_line_is_said(result, "gradients of 5 steps in a row were not finite", "lower optim.lr")
    assert status_of(life.run_dir)["status"] == "failed"
    saved = newest_valid(life.run_dir)
    assert saved is not None
    assert all(tensor.isfinite().all() for tensor in load_file(saved.folder / "model.safetensors").values())


# What comes out.


def test_evaluation_and_export_take_a_run_of_stage_3_as_any_other(whole, launch: Launch, tmp_path):
    run = whole(*zero(3))
    assert {path.name for path in last_checkpoint(run).folder.iterdir()} == {
        path.name for path in last_checkpoint(whole()).folder.iterdir()
    }
    result = launch(run, module="training.evaluation.evaluate").wait()
    assert result.status == 0 and (run / "report.html").is_file(), result
    result = launch(run, "--output", tmp_path / "model", module="training.evaluation.export").wait()
    assert result.status == 0, result


def test_dry_run_prints_what_deepspeed_is_told_and_writes_nothing(launch: Launch, sample_data, tmp_path):
    command = command_of(tmp_path / "run", sample_data, "--optim.clip_norm", 0.5, *zero(3, "all"))
    result = launch(*command, "--dry-run").wait()
    assert result.status == 0, result
    told = yaml.safe_load(result.out.partition("derived from it, for DeepSpeed:\n")[2].partition("\n\n")[0])
    assert told["zero_optimization"]["stage"] == 3 and told["gradient_clipping"] == 0.5
    assert told["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert "dry run: loss" in result.out
    assert not (tmp_path / "run").exists()


# What does not go together.


def test_what_does_not_go_together_is_refused_with_the_reason(launch: Launch, sample_data, tmp_path):
    for message, words in (
        ("offload all needs zero.stage 3", zero(2, "all")),
        ("whole copy of the weights", (*zero(3), "--optim.ema_decay", 0.9)),
        ("take --optim.kind adamw", (*zero(1), "--optim.kind", "adamw8bit")),
    ):
        with pytest.raises(UserError, match=message):
            config_of(command_of(tmp_path, sample_data, *words))
    config_of(command_of(tmp_path, sample_data, "--optim.kind", "adamw8bit"))  # without DeepSpeed it is welcome
    result = launch(*command_of(tmp_path / "run", sample_data, *zero(3)), module="training.seq2seq").wait()
    assert_only_one_line_is_said(result, "calls its layers once a word", "--zero.stage 2")


def test_held_out_batches_keep_ranks_in_step_and_lose_no_sample():
    batches = [np.arange(0, 5), np.arange(5, 6), np.arange(6, 9)]
    for ranks in (1, 2, 3, 4, 8):
        found = in_rounds(batches, ranks)
        assert len(found) % ranks == 0 and all(len(batch) for batch in found)
        assert sorted(np.concatenate(found)) == list(range(9))
    with pytest.raises(UserError, match="start fewer ranks"):
        in_rounds([np.arange(3)], 4)
