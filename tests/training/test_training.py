"""Whole trainings, started, killed, stopped and resumed as it happens to people.

The measure of all of them is an uninterrupted run: the model after any accident is the same bit for bit, on as many
ranks, and on another number of ranks the same up to the order of floating-point sums.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.support.commands import ROOT, Launch, Result, prepare
from tests.support.lives import Life, resumed_at
from tests.support.once import once
from tests.support.runs import (
    MODEL,
    SHORT_RUN,
    assert_only_one_line_is_said,
    assert_same_model,
    assert_same_record,
    command_of,
    config_of,
    content_of,
    damage,
    last_checkpoint,
    losses,
    plan_of,
    reference,
    status_of,
    train_lines,
)
from training.base.options import to_yaml
from training.data.prepared import open_prepared
from training.engine.checkpoint import checkpoints, newest_valid
from training.engine.metrics import read_metrics

STEPS = 50
# 161 micro-batches an epoch: it ends in the middle of a step, and the run goes on behind it.
WHOLE_RUN = (
    *MODEL,
    *("--batch.sentences_per_micro_batch", 32, "--batch.tokens_per_micro_batch", 1024),
    *("--batch.micro_batches_per_step", 4, "--optim.epochs", 1.24, "--optim.warmup_steps", 5, "--optim.lr", 1e-2),
    *("--log.validate_every_steps", 10, "--checkpoint.every_steps", 8),
)


@pytest.fixture
def uninterrupted(sample_data: Path) -> Callable[[int], Path]:
    """The run folder of `WHOLE_RUN` on so many ranks, trained when it is first asked for."""
    return lambda ranks: reference(sample_data, *WHOLE_RUN, ranks=ranks)


@pytest.fixture
def other_data() -> Path:
    """The sample corpus, split otherwise."""
    return once("other", lambda folder: prepare(folder, "--source", "sample", "--seed", 5)) / "data"


# The order of sums is all that the number of ranks changes.


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.whole)])
def test_loss_curve_does_not_depend_on_the_number_of_ranks(uninterrupted, ranks):
    alone, shared = losses(uninterrupted(1)), losses(uninterrupted(ranks))
    assert len(alone) == STEPS
    assert shared == pytest.approx(alone, rel=1e-4)
    assert alone[-1] < 0.7 * alone[0], "a curve that does not fall would prove little"


def test_a_finished_run_is_complete(uninterrupted):
    run_dir = uninterrupted(2)
    assert {path.name for path in run_dir.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "data.json",
        "lock",
        "metrics.jsonl",
        "report.html",
        "sessions.json",
        "status.json",
        "summary.json",
        "tokenizer",
    }
    status = status_of(run_dir)
    assert (status["status"], status["step"], status["steps"]) == ("finished", STEPS, STEPS)
    validations = {line["step"]: line["accuracy"] for line in read_metrics(run_dir) if line["kind"] == "validation"}
    assert list(validations) == [10, 20, 30, 40, 50]
    assert status["best_score"] == max(validations.values()) == validations[status["best_step"]]
    assert [path.name for path in run_dir.rglob(".*")] == [], "temporary files"


def test_same_command_twice_gives_the_same_weights(uninterrupted, launch: Launch, sample_data, tmp_path):
    result = launch(*command_of(tmp_path / "run", sample_data, *WHOLE_RUN), ranks=2).wait()
    assert result.status == 0, result
    assert_same_model(tmp_path / "run", uninterrupted(2))
    assert_same_record(tmp_path / "run", uninterrupted(2))


# What happens to a run, and what it costs.


@pytest.fixture
def life(launch: Launch, tmp_path: Path, sample_data: Path) -> Callable[..., Life]:
    """A life of `WHOLE_RUN` on so many ranks."""
    return lambda ranks, **how: Life(launch, tmp_path, sample_data, ranks, run=WHOLE_RUN, **how)


def test_killed_rank_killed_machine_and_flipped_bit_cost_nothing_but_time(uninterrupted, life):
    life = life(2)
    first = life.start({"at": "forward", "step": 12, "rank": 1, "do": "SIGKILL"})
    assert first.wait().status != 0

    second = life.start({"at": "forward", "step": 27, "do": "hold"})
    life.wait_at(second, "forward-27")
    assert resumed_at(second) == 10  # the best so far
    second.kill_all()
    assert len(checkpoints(life.run_dir)) >= 2
    damaged = checkpoints(life.run_dir)[-1]
    damage(damaged)

    third = life.finish(uninterrupted(2))
    assert f"checkpoint {damaged.folder} is damaged" in third.err


@pytest.mark.whole
def test_four_killed_ranks_resume_to_the_same_weights(uninterrupted, life):
    """Four, since from three ranks on the order of DDP's sums can change in the middle of a process's life."""
    life = life(4)
    first = life.start({"at": "forward", "step": 19, "rank": 3, "do": "hold"})
    life.wait_at(first, "forward-19", rank=3)
    first.kill_all()
    assert "resuming at step" in life.finish(uninterrupted(4)).out


def test_signal_to_one_rank_or_to_torchrun_stops_all_and_the_same_command_continues(uninterrupted, life):
    life = life(2)
    first = life.start({"at": "forward", "step": 12, "rank": 0, "do": "hold"})
    life.wait_at(first, "forward-12")
    os.kill(first.rank(1), signal.SIGTERM)
    life.go_on("forward-12")
    result = first.wait()
    assert result.status == 0, result
    assert_stopped(life.run_dir, result, "signal SIGTERM")

    # Another person's session: how often to save and to report may change at any time.
    words = ("--checkpoint.every_steps", 7, "--log.every_steps", 2, "--checkpoint.keep", 3)
    second = life.start({"at": "forward", "step": 30, "rank": 0, "do": "hold"}, words=words, real=True)
    life.wait_at(second, "forward-30")
    second.process.terminate()
    life.go_on("forward-30")
    result = second.wait()
    assert_stopped(life.run_dir, result, "signal SIGTERM")

    third = life.start().wait()
    assert third.status == 0, third
    assert_same_model(life.run_dir, uninterrupted(2))


def assert_stopped(run_dir: Path, result: Result, reason: str) -> None:
    """A stop on request: the step it came to is saved, and status.json says how to go on."""
    status = status_of(run_dir)
    assert (status["status"], status["reason"], status["steps"]) == ("resumable", reason, STEPS), result
    assert f"stopped by {reason} at step {status['step']} of {STEPS}; the same command continues" in result.out
    assert last_checkpoint(run_dir).step == status["step"]
    assert status["step"] - 2 < train_lines(run_dir)[-1]["step"] <= status["step"]
    assert result.error_lines == []


def test_stopped_plain_process_exits_75_refuses_another_run_and_goes_on_with_two_ranks(
    uninterrupted, launch: Launch, life, sample_data, other_data
):
    life = life(None)
    run_dir, command = life.run_dir, life.command
    first = life.start({"at": "forward", "step": 15, "do": "hold"})
    life.wait_at(first, "forward-15")
    (run_dir / "STOP").touch()
    life.go_on("forward-15")
    result = first.wait()
    assert result.status == 75, result
    assert_stopped(run_dir, result, f"the file {run_dir / 'STOP'}")
    assert not (run_dir / "STOP").exists(), "the next session would stop at once"

    before = content_of(run_dir)
    changed = launch(*command, "--seed", 4, "--optim.lr", 1e-3, "--model.layers", 3, "--loss.label_smoothing", 0.1)
    other = launch(*command, "--data", other_data)
    parts = ["seed: 1234 -> 4", "optim.lr: 0.01 -> 0.001", "model.layers: 2 -> 3", "loss.label_smoothing: 0.0 -> 0.1"]
    assert_only_one_line_is_said(changed.wait(), "another definition", *parts, "nothing was changed")
    assert_only_one_line_is_said(other.wait(), "was trained on other data than --data", "nothing was changed")
    assert content_of(run_dir) == before

    second = launch(*command, ranks=2).wait()
    assert second.status == 0, second
    assert f"resuming at step {status_of_step(before, run_dir)}" in second.out
    assert losses(run_dir) == pytest.approx(losses(uninterrupted(1)), rel=1e-4)


def status_of_step(content: dict[str, bytes | None], run_dir: Path) -> int:
    return json.loads(content[str(run_dir / "status.json")] or b"")["step"]


def test_finished_run_says_so_refuses_another_model_and_changes_nothing(
    uninterrupted, launch: Launch, sample_data, tmp_path
):
    """Even if the process was killed right behind its last checkpoint, before it could write that it has finished."""
    run_dir = shutil.copytree(uninterrupted(2), tmp_path / "run")
    before = content_of(run_dir)
    status = run_dir / "status.json"
    status.write_text(status.read_text(encoding="utf-8").replace('"finished"', '"running"'), encoding="utf-8")
    result = launch(*command_of(run_dir, sample_data, *WHOLE_RUN)).wait()
    assert result.status == 0, result
    assert f"{run_dir} is finished" in result.out
    assert content_of(run_dir) == before
    other = launch(*command_of(run_dir, sample_data, *WHOLE_RUN), "--model.layers", 3).wait()
    assert_only_one_line_is_said(other, "another definition", "model.layers: 2 -> 3", "nothing was changed")
    assert content_of(run_dir) == before


def test_fp16_keeps_its_scaler_and_resumes_to_the_same_weights(launch: Launch, sample_data, tmp_path):
    options = (*SHORT_RUN, "--precision", "fp16", "--optim.epochs", 0.4, "--checkpoint.every_steps", 10)
    whole = launch(*command_of(tmp_path / "whole", sample_data, *options))
    life = Life(launch, tmp_path, sample_data, None, run=options)
    first = life.start({"at": "forward", "step": 17, "do": "hold"})
    life.wait_at(first, "forward-17")
    first.kill_all()
    assert life.start().wait().status == 0
    assert whole.wait().status == 0
    scaler = last_checkpoint(tmp_path / "run").state()["scaler"]
    assert scaler["_growth_tracker"] >= 30, "it counts the steps since the start or the last overflow"
    assert_same_model(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.whole)])
def test_muon_resumes_to_the_same_weights(ranks, launch, two_vocabularies, tmp_path):
    options = (*SHORT_RUN, "--optim.kind", "muon", "--optim.epochs", 0.4)
    options = (*options, "--checkpoint.every_steps", 5, "--batch.micro_batches_per_step", 4)
    whole = reference(two_vocabularies, *options, ranks=ranks)
    life = Life(launch, tmp_path, two_vocabularies, ranks, run=options)
    first = life.start({"at": "forward", "step": 12, "rank": 1, "do": "SIGKILL"})
    assert first.wait().status != 0
    second = life.start({"at": "forward", "step": 17, "rank": 0, "do": "SIGKILL"})
    assert second.wait().status != 0
    assert resumed_at(second) >= 5
    assert "resuming at step" in life.finish(whole).out
    other_ranks = reference(two_vocabularies, *options)
    assert losses(life.run_dir) == pytest.approx(losses(other_ranks), rel=1e-3)


def test_gradients_that_stay_not_finite_end_the_run_on_all_ranks_with_a_valid_checkpoint(
    launch: Launch, sample_data, tmp_path
):
    run_dir = tmp_path / "run"
    options = ("--optim.lr", 1e30, "--optim.warmup_steps", 0, "--optim.epochs", 1, "--checkpoint.every_steps", 1)
    result = launch(*command_of(run_dir, sample_data, *SHORT_RUN, *options), ranks=2).wait()
    assert_only_one_line_is_said(result, "gradients of 5 steps in a row were not finite", "lower optim.lr")
    status = status_of(run_dir)
    assert status["status"] == "failed"
    assert "lower optim.lr" in status["reason"]
    assert status["step"] < status["steps"]
    saved = newest_valid(run_dir)
    assert saved is not None
    assert all(tensor.isfinite().all() for tensor in load_file(saved.folder / "model.safetensors").values())
    assert "is damaged" not in result.err


# What a run says about itself.


def test_padding_is_not_counted_as_tokens(launch: Launch, sample_data, tmp_path):
    """Micro-batches of many sentences, in which a good part is padding; the clock is that of the lines themselves."""
    options = (
        *MODEL,
        *("--batch.sentences_per_micro_batch", 1100, "--batch.tokens_per_micro_batch", "null"),
        *("--batch.micro_batches_per_step", 1, "--optim.epochs", 1.6, "--optim.warmup_steps", 0),
    )
    command = command_of(tmp_path / "run", sample_data, *options)
    result = launch(*command).wait()
    assert result.status == 0, result
    plan, lines = plan_of(command), train_lines(tmp_path / "run")
    assert len(lines) == plan.steps == 8
    real, computed = [], []
    for step in range(plan.steps):
        lengths = [plan.lengths[batch.samples] for batch in plan.step(step)]
        real.append(sum(int(each.sum()) for each in lengths))
        computed.append(sum(len(each) * int(each.max()) for each in lengths))
    assert [line["padding_share"] for line in lines] == pytest.approx(1 - np.divide(real, computed), abs=1e-4)
    counted = sum(line["tokens_per_s"] * (line["time"] - before["time"]) for before, line in pairwise(lines))
    assert sum(computed[1:]) > 1.1 * sum(real[1:]), "too little padding for this test to test anything"
    assert counted == pytest.approx(sum(real[1:]), rel=0.05)


@pytest.mark.whole
def test_memory_beyond_model_and_optimizer_stays_below_a_gigabyte_on_real_data(launch: Launch, real_data, tmp_path):
    options = ("--optim.steps", 3, "--optim.warmup_steps", 0, "--log.every_steps", 1)
    command = command_of(tmp_path / "run", real_data, *options, "--log.validate_every_steps", 2)
    result = launch(ROOT / "configs/gpt/base.yaml", *command).wait()
    assert result.status == 0, result
    line = train_lines(tmp_path / "run")[-1]
    assert line["step"] > 2, "the line must come after a validation"
    weights = last_checkpoint(tmp_path / "run").model_state()
    state_mb = 16 * sum(tensor.numel() for tensor in weights.values()) / 1e6  # weights, gradients, two moments, fp32
    assert line["memory_mb"] - state_mb < 1000


def test_memory_is_the_processs_own_and_not_that_of_what_started_it():
    ballast = b"x" * 1_500_000_000
    says = "import torch; from training.engine.metrics import memory_mb; print(memory_mb(torch.device('cpu')))"
    result = subprocess.run([sys.executable, "-c", says], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 50 < float(result.stdout) < len(ballast) / 1e6 - 500


def test_dry_run_prints_config_steps_and_arithmetic_and_writes_nothing(launch: Launch, sample_data, tmp_path):
    command = command_of(tmp_path / "run", sample_data, *WHOLE_RUN)
    before = content_of(tmp_path)
    result = launch(*command, "--dry-run").wait()
    assert result.status == 0, result
    plan = plan_of(command)
    for part in (
        to_yaml(config_of(command)),
        "5,130 samples",
        f"{plan.lengths.sum():,} tokens an epoch in 161 micro-batches",
        f"{plan.padding_share():.1%} padding",
        "a step: 1 rank x 4 micro-batches",
        f"50 steps in {plan.epoch(50):.2f} epochs",
        "nothing was written",
        "a checkpoint every 8 steps is one every",
        "a kill costs half of that and a start;",
        "would lose least; a start takes",
    ):
        assert part in result.out
    loss = re.search(r"loss (\d+\.\d+)", result.out)
    assert loss and abs(float(loss[1]) - math.log(open_prepared(sample_data).source_tokenizer.vocabulary_size)) < 0.5
    after = {path: content for path, content in content_of(tmp_path).items() if "/output-" not in path}
    assert after == before


# What cannot be started is answered in one line, before anything is made.


def test_ranks_that_cannot_share_a_step_are_told_what_fits(launch: Launch, sample_data, tmp_path):
    command = command_of(tmp_path / "run", sample_data, *SHORT_RUN, "--batch.micro_batches_per_step", 9)
    result = launch(*command, ranks=2).wait()
    assert_only_one_line_is_said(result, "2 ranks cannot share the 9 micro-batches", "1 or 3 or 9 ranks")
    assert not (tmp_path / "run").exists()


def test_run_that_cannot_start_is_one_clear_line(launch: Launch, sample_data, two_vocabularies, tmp_path):
    run_dir = tmp_path / "run"
    missing = launch(*command_of(run_dir, tmp_path / "nowhere", *SHORT_RUN))
    separate = launch(*command_of(run_dir, two_vocabularies, *SHORT_RUN, "--loss.source_weight", 0.1))
    late = launch(*command_of(run_dir, sample_data, *SHORT_RUN, "--optim.epochs", 0.1, "--optim.warmup_steps", 500))
    for started, parts in (
        (missing, (f"there is no prepared data set {tmp_path / 'nowhere'}", "python -m data_prep.pairs")),
        (separate, ("has two vocabularies", "--vocabularies joint")),
        (late, ("optim.warmup_steps is 500", "shorten the warm-up or train longer (--optim.warmup_steps ")),
    ):
        result = started.wait()
        assert_only_one_line_is_said(result, *parts)
        assert len(result.err.splitlines()) == 1, result
    assert not run_dir.exists()
