"""The second training keeps the engine's promises too: two vocabularies, its own words as inputs, a moving average."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.commands import ROOT, Launch
from tests.support.lives import Life
from tests.support.runs import (
    assert_only_one_line_is_said,
    assert_same_model,
    assert_same_record,
    command_of,
    last_checkpoint,
    losses,
    reference,
    status_of,
)
from training.base.console import UserError
from training.engine.checkpoint import checkpoints
from training.evaluation.translations.trained import open_trained

STEPS = 60
DECAY = 0.9
RUN = (
    *("--model.embedding_width", 24, "--model.hidden_width", 32, "--model.layers", 2, "--model.dropout", 0.2),
    *("--loss.teacher_forcing", 0.9, "--loss.label_smoothing", 0.1, "--optim.ema_decay", DECAY),
    *("--batch.tokens_per_micro_batch", 300, "--batch.micro_batches_per_step", 4),
    *("--optim.steps", STEPS, "--optim.warmup_steps", 5, "--optim.lr", 2.5e-2, "--log.every_steps", 1),
    *("--log.validate_every_steps", 15, "--checkpoint.every_steps", 5, "--checkpoint.keep_best", 3),
)
CPU = torch.device("cpu")


@pytest.fixture
def data(two_vocabularies: Path) -> Path:
    return two_vocabularies


@pytest.fixture
def uninterrupted(data: Path) -> Callable[[int], Path]:
    return lambda ranks: reference(data, *RUN, module="training.seq2seq", ranks=ranks)


@pytest.mark.whole
@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_curve_does_not_depend_on_the_number_of_ranks(uninterrupted, ranks):
    alone, together = losses(uninterrupted(1)), losses(uninterrupted(ranks))
    assert len(alone) == STEPS and alone[-1] < 0.8 * alone[0]
    assert together == pytest.approx(alone, rel=1e-4)


def test_killed_and_damaged_run_ends_with_the_same_weights_and_moving_average(
    uninterrupted, launch: Launch, data: Path, tmp_path: Path
):
    life = Life(launch, tmp_path, data, ranks=2, run=RUN, module="training.seq2seq")
    for step in (13, 28):
        life.kill_at(step)
    run_dir = life.run_dir
    average = checkpoints(run_dir)[-1].folder / "ema.safetensors"
    content = bytearray(average.read_bytes())
    content[-1] ^= 1
    average.write_bytes(content)
    result = life.start().wait()
    assert result.status == 0 and "ema.safetensors has changed" in result.err
    assert_same_model(run_dir, uninterrupted(2))
    assert_same_record(run_dir, uninterrupted(2))
    assert "ema.safetensors" in last_checkpoint(run_dir).manifest["files"]


def test_moving_average_is_that_of_the_weights_after_every_step(launch: Launch, data: Path, tmp_path: Path):
    command = command_of(tmp_path / "run", data, *RUN, "--optim.steps", 12, "--checkpoint.every_steps", 1)
    assert launch(*command, "--checkpoint.keep", 12, module="training.seq2seq").wait().status == 0
    found = checkpoints(tmp_path / "run")
    assert [each.step for each in found] == [*range(1, 13)]
    average = found[0].model_state()
    for each in found[1:]:
        weights = each.model_state()
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in weights}
    for name, tensor in found[-1].ema_state().items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-4, atol=1e-6)


def test_weights_are_those_asked_for(uninterrupted):
    run_dir = uninterrupted(2)

    def weights(name: str) -> dict[str, torch.Tensor]:
        return open_trained(run_dir, name, device=CPU).model.state_dict()

    found = checkpoints(run_dir)
    validated = [each for each in found if each.state()["scores"]]
    validated.sort(key=lambda each: -each.state()["scores"]["accuracy"])
    assert len(validated) == 3 and status_of(run_dir)["best_step"] == validated[0].step
    for name, chosen in (("best", validated[:1]), ("best:3", validated), ("last:2", found[-2:]), ("last", found[-1:])):
        files = [load_file(each.folder / "model.safetensors") for each in chosen]
        for key, tensor in weights(name).items():
            expected = torch.stack([file[key] for file in files]).double().mean(0).float()
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(tensor, found[-1].ema_state()[key]) for key, tensor in weights("ema").items())


@pytest.mark.parametrize("name", ["none", "best:0", "last:x", "ema:2", "best:", ""])
def test_weights_that_do_not_exist_are_refused(uninterrupted, name):
    with pytest.raises(UserError, match=r"names no weights: best, last, step-N, best:N"):
        open_trained(uninterrupted(2), name, device=CPU)


def test_more_checkpoints_than_there_are_and_a_run_without_average_are_answered(
    uninterrupted, launch: Launch, sample_data: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=r"--checkpoint\.keep_best 9"):
        open_trained(uninterrupted(2), "best:9", device=CPU)
    command = command_of(tmp_path / "plain", sample_data, *RUN, "--optim.ema_decay", "null", "--optim.steps", 6)
    assert launch(*command, module="training.seq2seq").wait().status == 0
    with pytest.raises(UserError, match=r"--optim\.ema_decay"):
        open_trained(tmp_path / "plain", "ema", device=CPU)


def test_run_of_another_training_in_the_same_folder_is_refused(uninterrupted, launch: Launch, data: Path):
    result = launch("--run_dir", uninterrupted(2), "--data", data, module="training.seq2seq", ranks=None).wait()
    assert_only_one_line_is_said(result, "model", "loss")


@pytest.mark.parametrize("module, bound, least", [("seq2seq", "max_length", 1), ("gpt", "context", 4)])
def test_a_bound_that_no_pair_fits_is_refused_at_the_start(module, bound, least, launch: Launch, sample_data, tmp_path):
    words = ("--run_dir", tmp_path / "run", "--data", sample_data, f"--model.{bound}", least)
    result = launch(*words, module=f"training.{module}").wait()
    assert_only_one_line_is_said(result, "train part", "none that fits", f"model.{bound} ({least})")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_all_of_the_model_trains_in_mixed_precision(precision: str, launch: Launch, data: Path, tmp_path: Path):
    command = command_of(tmp_path / "run", data, *RUN, "--optim.steps", 12, "--log.every_steps", 3)
    assert launch(*command, "--precision", precision, module="training.seq2seq").wait().status == 0
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs/seq2seq").glob("*.yaml")))
def test_every_config_trains(config: str, launch: Launch, data: Path, tmp_path: Path):
    words = ("--data", data, "--run_dir", tmp_path / "run", "--precision", "fp32", "--dry-run")
    result = launch(ROOT / "configs/seq2seq" / config, *words, module="training.seq2seq").wait()
    assert result.status == 0 and "dry run: loss" in result.out, result
    figures = json.loads(result.out.splitlines()[-1])
    assert figures["steps"] > 0 and 0 < figures["step_s"] < 60
