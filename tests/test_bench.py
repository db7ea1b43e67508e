"""The benches, run as people run them: a table, then one JSON line with the promised figures. No speed is asserted."""

import json
import math
from pathlib import Path

import pytest
import torch

from data_prep.prepared import open_prepared
from launch.console import UserError
from launch.prove import ACCIDENTS
from tests.bench import joeynmt
from tests.bench.common import BASE, SEQ2SEQ, config_of
from tests.bench.peers import tokens_a_sentence
from tests.support.commands import PATIENCE_S, Launch
from training.gpt import Sequences
from training.gpt import plan_of as gpt_plan
from training.seq2seq import TwoSides
from training.seq2seq import plan_of as seq2seq_plan

ZERO = ("zero1", "zero2", "zero3")

PROMISED = {
    "gpt_training": [
        "sentences_ratio",
        "relay_sentences_per_s",
        "relay_one_process_sentences_per_s",
        "notebook_sentences_per_s",
        "padding_share",
        "notebook_padding_share",
        "peak_share",
        "peak_share_exact",
        "base_tokens_per_s",
    ],
    "seq2seq_training": [
        "sentences_ratio",
        "relay_sentences_per_s",
        "relay_one_process_sentences_per_s",
        "tutorial_sentences_per_s",
        "padding_share",
        "tutorial_padding_share",
    ],
    "qlora": [
        "samples_ratio",
        "relay_samples_per_s",
        "trainer_samples_per_s",
        "memory_ratio",
        "relay_memory_mb",
        "trainer_memory_mb",
        "activation_ratio",
        "padding_share",
        "trainer_padding_share",
        "operations_ratio",
        "operations_ratio_3b",
    ],
    "decoding": [
        "gpt_ratio",
        "gpt_batched_sentences_per_s",
        "gpt_plain_sentences_per_s",
        "gpt_same_share",
        "seq2seq_ratio",
        "seq2seq_tutorial_ratio",
        "seq2seq_batched_sentences_per_s",
        "seq2seq_plain_sentences_per_s",
        "seq2seq_same_share",
    ],
    "scaling": ["ddp_ratio", "two_ranks_one_thread_tokens_per_s", "one_rank_two_threads_tokens_per_s"],
    "save_stall": ["stall_ratio", "background_stall_s", "synchronous_stall_s", "published_after_s"],
    "resume_time": ["ratio", "resumed_s", "new_s"],
    "deepspeed": [
        "optimizer_memory_ratio",
        *(f"{side}_step_ratio" for side in ZERO),
        *(f"{side}_memory_ratio" for side in ZERO),
    ],
    "wandb_gone": ["added_share", "added_s", "step_s", "step_ratio"],
    "peers": [
        "gpt_vs_trainer",
        "gpt_vs_joeynmt",
        "seq2seq_vs_joeynmt",
        "gpt_parameters",
        "joeynmt_transformer_parameters",
        "seq2seq_parameters",
        "joeynmt_gru_parameters",
        "loss_difference",
    ],
    "quality": ["minutes"],  # after as few steps the scores may be 0
    "verify_speed": ["verify_gb_per_s", "from_disk_gb_per_s", "plain_gb_per_s", "verify_ratio"],
}


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("name", PROMISED)
def test_quick_bench_ends_with_the_promised_figures(name: str, launch: Launch) -> None:
    if name in ("peers", "quality"):
        try:
            joeynmt.python()
        except UserError as error:
            pytest.skip(str(error))
    # The sample corpus, so that the test is the same on every machine.
    result = launch("--quick", "--data", "sample", module=f"tests.bench.{name}").wait()
    assert result.status == 0, result
    *table, last = result.out.strip().splitlines()
    figures = json.loads(last)
    assert figures["bench"] == name
    for promised in PROMISED[name]:
        assert math.isfinite(figures[promised]) and figures[promised] > 0, promised
        assert any(promised in line for line in table), f"{promised} is missing from the table"
    # These do not depend on the machine's speed.
    peer = {"gpt_training": "notebook", "seq2seq_training": "tutorial", "qlora": "trainer"}.get(name)
    if peer:
        assert figures["loss_difference"] <= 1e-5
        assert figures["padding_share"] < 0.03 < figures[f"{peer}_padding_share"]
    if name == "qlora":
        assert figures["memory_ratio"] < 0.7
        assert abs(figures["estimate_error"]) < 0.1
    if name == "deepspeed":
        assert figures["optimizer_memory_ratio"] <= 0.55
        assert max(figures[f"{side}_loss_difference"] for side in ZERO) <= 1e-4
    if name == "decoding":
        assert min(figures["gpt_same_share"], figures["seq2seq_same_share"]) >= 0.98


@pytest.mark.parametrize(("bench", "config"), [("gpt", BASE), ("seq2seq", SEQ2SEQ)])
def test_sentences_are_counted_once_whether_their_sides_are_read_together_or_apart(bench, config, sample_data):
    data = open_prepared(sample_data)
    options = config_of(bench, [config], data)
    part = data.part("train")
    rows = Sequences(part, options.model.context) if bench == "gpt" else TwoSides(part, options.model.max_length)
    plan = (gpt_plan if bench == "gpt" else seq2seq_plan)(options, rows)
    tokens = sum(plan.tokens(step)[0] for step in range(plan.steps))
    assert tokens / (tokens_a_sentence(plan) * len(part)) == pytest.approx(plan.epoch(plan.steps), rel=0.01)


@pytest.mark.timeout(PATIENCE_S)
def test_of_twenty_kills_at_random_moments_none_is_lost(launch: Launch) -> None:
    result = launch("--kills", 20, "--data", "sample", module="tests.bench.soak").wait()
    assert result.status == 0, result
    figures = json.loads(result.out.strip().splitlines()[-1])
    assert (figures["kills"], figures["lost"]) == (20, 0)
    assert set(figures["accidents"]) == set(ACCIDENTS), "every kind of accident happened"


@pytest.mark.parametrize("module", ["gpu", "as_t4"])
def test_a_bench_of_the_gpu_says_that_there_is_none(module: str, launch: Launch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    words = () if module == "gpu" else ("training.gpt",)
    result = launch(*words, module=f"tests.bench.{module}").wait()
    assert result.status == 1
    (line,) = result.error_lines
    assert "there is no GPU" in line


@pytest.mark.parametrize("name", PROMISED)
def test_bench_names_a_data_file_that_is_missing(name: str, launch: Launch, tmp_path: Path) -> None:
    result = launch("--data", tmp_path / "none.txt", module=f"tests.bench.{name}").wait()
    assert result.status == 1
    (line,) = result.error_lines
    assert "none.txt" in line
