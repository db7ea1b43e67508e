"""QLoRA under ZeRO keeps the promises of QLoRA, spreads a base model in 4 bits, and says what memory it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.support.commands import Launch
from tests.support.legal_records import law_base, law_data
from tests.support.lives import Life
from tests.support.runs import (
    assert_only_one_line_is_said,
    command_of,
    last_checkpoint,
    losses,
    reference,
)
from training.engine.metrics import read_metrics
from training.engine.zero import ZeroOptions
from training.models.adapted_model import LoraOptions
from training.models.base_model import QuantisationOptions, read_config
from training.models.memory_estimate import Shape, estimate

RUN = (
    *("--lora.rank", 4, "--lora.alpha", 8, "--lora.dropout", 0.2, "--memory.logits_tokens", 50),
    *("--batch.tokens_per_micro_batch", 400, "--batch.micro_batches_per_step", 4),
    *("--optim.steps", 8, "--optim.warmup_steps", 3, "--optim.lr", 1e-3, "--log.every_steps", 1),
    *("--log.validate_every_steps", 4, "--checkpoint.every_steps", 3),
)
ZERO = ("--parallel", "deepspeed", "--zero.stage")


@pytest.fixture
def base() -> Path:
    """Wide enough that its weights are spread."""
    return law_base(width=512)


@pytest.fixture
def data() -> Path:
    return law_data()


@pytest.fixture
def replicated(data: Path, base: Path) -> Path:
    """The run without ZeRO."""
    return reference(data, "--base_model", base, *RUN, module="training.qlora", ranks=2)


def assert_same_curve(run_dir: Path, other: Path) -> None:
    """The same losses in training and validation, up to the order of sums."""
    assert losses(run_dir) == pytest.approx(losses(other), rel=1e-5)
    held_out = [
        [line["loss"] for line in read_metrics(each) if line["kind"] == "validation"] for each in (run_dir, other)
    ]
    assert len(held_out[0]) == 2 and held_out[0] == pytest.approx(held_out[1], rel=1e-5)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.whole), 3])
def test_run_killed_under_zero_is_the_uninterrupted_one_and_has_the_curve_of_ddp(
    stage: int, replicated: Path, launch: Launch, data: Path, base: Path, tmp_path: Path
):
    run = ("--base_model", base, *RUN, *ZERO, stage)
    whole = reference(data, *run, module="training.qlora", ranks=2)
    life = Life(launch, tmp_path, data, ranks=2, run=run, module="training.qlora")
    life.kill_at(6)
    life.finish(whole)
    assert_same_curve(whole, replicated)
    weights = last_checkpoint(whole).model_state()
    assert weights.keys() == last_checkpoint(replicated).model_state().keys()
    assert all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in weights.items())


# Fewer supervised tokens and a wide model, so that weights and what is trained count.
MEASURED = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 3, untied, fp16": {"stage": 3, "tied": False, "precision": "fp16"},
}


def measured(launch: Launch, folder: Path, cases: list[dict[str, object]]) -> list[dict[str, int]]:
    """What steps take on the first of two ranks: see `tests.support.zero_memory`."""
    result = launch(folder, json.dumps(cases), module="tests.support.zero_memory", ranks=2).wait()
    assert result.status == 0, result
    return [json.loads(line) for line in result.out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    "names", [["stage 3"], pytest.param([name for name in MEASURED if name != "stage 3"], marks=pytest.mark.whole)]
)
def test_estimate_is_what_a_real_step_of_two_ranks_takes_and_a_base_in_4_bits_is_spread(
    names: list[str], launch: Launch, tmp_path: Path
):
    from tests.support.zero_memory import LORA, SHAPE

    found = measured(launch, tmp_path, [MEASURED[name] for name in names])
    for case, name in zip(found, names, strict=True):
        options = MEASURED[name]
        compute_type = torch.float16 if options.get("precision") == "fp16" else torch.float32
        quantisation = QuantisationOptions()
        estimated = estimate(
            read_config(Path(case["model"]), quantisation),
            quantisation,
            LORA,
            SHAPE,
            compute_type=compute_type,
            optimizer="adamw",
            checkpoint_layers=True,
            logits_tokens=50,
            device_type="cpu",
            ranks=2,
            zero=ZeroOptions(stage=options["stage"]),
        )
        print(name, estimated, case)
        assert estimated.held + estimated.activations == pytest.approx(case["peak"], rel=0.1), name
        if options["stage"] == 3:
            assert estimated.weights == pytest.approx(case["base"], rel=0.02), name
            assert case["base"] < 0.65 * case["whole"], "the rest are scales, and weights too small to spread"
            assert 0.5 * case["base"] < case["loading"] < 0.85 * case["whole"], (
                "no rank has the base whole, not even while it is loaded"
            )
            assert case["loading"] <= estimated.loading


QWEN_14B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}


QWEN_32B = {**QWEN_14B, "intermediate_size": 27648, "num_hidden_layers": 64}


@pytest.mark.whole
@pytest.mark.parametrize(("shape", "ranks", "card_gb"), [(QWEN_14B, 2, 15), (QWEN_32B, 4, 16)], ids=["14B", "32B"])
def test_a_model_that_is_too_large_for_a_card_trains_on_several(shape: dict, ranks: int, card_gb: float) -> None:
    memory = estimate(
        transformers.Qwen2Config(**shape),
        QuantisationOptions(),
        LoraOptions(),
        Shape(1, 1024, 700),
        compute_type=torch.float16,
        optimizer="adamw",
        checkpoint_layers=True,
        logits_tokens=256,
        ranks=ranks,
        zero=ZeroOptions(stage=3),
    )
    print(memory)
    assert memory.fits(card_gb * 1e9)
    assert memory.loading < memory.held + memory.activations, "no rank has all of it, not even while it is loaded"


@pytest.mark.parametrize(
    "words, said",
    [
        (("--optim.kind", "adamw8bit"), ("adamw8bit", "--optim.kind adamw")),
        (("--lora.dora", "true"), ("lora.dora", "--zero.stage 2")),
        (("--memory.checkpoint_layers", "false"), ("memory.checkpoint_layers true", "--zero.stage 2")),
    ],
)
def test_what_zero_3_cannot_do_is_refused(words, said, launch: Launch, data: Path, base: Path, tmp_path: Path):
    command = command_of(tmp_path / "run", data, "--base_model", base, *RUN, *ZERO, 3, *words)
    assert_only_one_line_is_said(launch(*command, module="training.qlora").wait(), *said)
