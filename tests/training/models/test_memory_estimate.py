"""The memory estimate of a LoRA training: against real steps with real 4-bit layers, and for true shapes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import transformers

from tests.bench.common import Arguments
from tests.bench.qlora import prepare_records
from tests.support.base_models import SMALL, WIDE, make_model
from tests.support.commands import Launch
from tests.support.step_memory import compared
from training.models.adapted_model import LoraOptions
from training.models.base_model import QuantisationOptions
from training.models.memory_estimate import MemoryEstimate, Shape, estimate

TALKATIVE = {**SMALL, "vocab_size": 8192}

MANY, FEW = Shape(2, 128, 100), Shape(2, 32, 20)

# Model, micro-batch, and options that differ from what `measured` says; each dominated by what its name says.
CASES = {
    "activations": (SMALL, MANY, {"checkpoint_layers": False}),
    "activations, checkpointed": (SMALL, MANY, {}),
    "activations, not in 4 bits": (SMALL, MANY, {"kind": "none"}),
    "activations, bf16": (SMALL, MANY, {"precision": "bf16", "checkpoint_layers": False}),
    "activations, bf16, checkpointed": (SMALL, MANY, {"precision": "bf16"}),
    "activations, fp16": (SMALL, MANY, {"precision": "fp16", "checkpoint_layers": False}),
    "activations, fp16, not in 4 bits": (SMALL, FEW, {"precision": "fp16", "kind": "none"}),
    "activations, bf16, not in 4 bits": (SMALL, FEW, {"precision": "bf16", "kind": "none"}),
    "logits": (TALKATIVE, Shape(2, 64, 100), {"logits_tokens": 64}),
    "logits, bf16": (TALKATIVE, Shape(2, 64, 100), {"precision": "bf16", "logits_tokens": 64}),
    "weights": (WIDE, Shape(1, 32, 20), {}),
    "weights, not in 4 bits": (WIDE, Shape(1, 32, 20), {"kind": "none"}),
    "weights, bf16, not in 4 bits": (WIDE, Shape(1, 32, 20), {"precision": "bf16", "kind": "none"}),
    "weights, untied, single quantisation": ({**WIDE, "tie_word_embeddings": False}, FEW, {"double": False}),
    "adapters": (SMALL, FEW, {"rank": 64}),
    "adapters, muon": (SMALL, FEW, {"rank": 64, "optimizer": "muon"}),
    "adapters, adamw8bit": (SMALL, FEW, {"rank": 64, "optimizer": "adamw8bit"}),
    "small adapters, adamw8bit, dropout": (SMALL, FEW, {"dropout": 0.1, "optimizer": "adamw8bit"}),
}


@pytest.mark.parametrize("name", CASES)
def test_estimate_is_what_a_real_step_takes(name: str, tmp_path: Path) -> None:
    model, shape, options = CASES[name]
    estimated, measured, parts = compared(make_model(tmp_path / "model", model), shape, **options)
    assert estimated.weights == pytest.approx(parts["weights"], rel=0.01)
    assert estimated.adapters == parts["adapters"]
    assert estimated.optimizer == pytest.approx(parts["optimizer"], rel=0.02)
    assert estimated.tensors == pytest.approx(measured, rel=0.1)


QWEN = {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True}
QWEN_3B = {**QWEN, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}


def of_true_shape(
    shape: dict[str, object], micro_batch: Shape, kind: str = "nf4", compute_type: torch.dtype = torch.float16
) -> MemoryEstimate:
    """The estimate with the recipe's adapters, unless told otherwise on a T4."""
    return estimate(
        transformers.Qwen2Config(**shape),
        QuantisationOptions(kind=kind),
        LoraOptions(),
        micro_batch,
        compute_type=compute_type,
        optimizer="adamw",
        checkpoint_layers=True,
        logits_tokens=256,
    )


def test_three_billion_parameters_train_in_less_than_ten_gb() -> None:
    memory = of_true_shape(QWEN_3B, Shape(4, 1024, 4 * 700))
    print(memory)
    assert memory.trained == 29_933_568  # what rank 16 on all linear layers comes to
    assert memory.tensors < 10e9
    assert memory.fits(15e9)


@pytest.mark.whole
def test_seven_billion_parameters_train_on_a_card_of_fifteen_gb() -> None:
    memory = of_true_shape(QWEN_7B, Shape(2, 1024, 2 * 700))
    print(memory)
    assert memory.fits(15e9)


@pytest.mark.whole
def test_seven_billion_parameters_in_bf16_train_on_a_card_of_24_gb() -> None:
    memory = of_true_shape(QWEN_7B, Shape(4, 1024, 4 * 700), "none", torch.bfloat16)
    print(memory)
    assert memory.weights > 15e9
    assert memory.fits(24e9) and not memory.fits(20e9)


def test_dry_run_tells_what_to_change_before_anything_is_loaded(tmp_path: Path, launch: Launch) -> None:
    data = prepare_records(Arguments(quick=True, data="sample", more=argparse.Namespace()), tmp_path)
    base = make_model(tmp_path / "model", SMALL)
    words = "--data", data.folder, "--base_model", base, "--run_dir", tmp_path / "run", "--optim.warmup_steps", 1
    options = *words, "--batch.micro_batches_per_step", 1, "--dry-run", "--memory.card_gb"

    fitting = launch(*options, 2, module="training.qlora").wait()
    assert fitting.status == 0, fitting
    assert "GB of tensors a process" in fitting.out
    assert "dry run: loss" in fitting.out

    (base / "model.safetensors").write_bytes(b"no weights")
    small = launch(*options, 0.91, "--memory.checkpoint_layers", "false", module="training.qlora").wait()
    assert small.status == 1
    (line,) = small.error_lines
    assert "a card of 0.9 GB is too small" in line
    (base / "model.safetensors").unlink()
    without = launch(*options, 2, module="training.qlora").wait()
    assert "a card of 2.0 GB has room for it" in without.out and "model.safetensors is missing" in without.err, without
    assert "--memory.checkpoint_layers true" in line
    assert not (tmp_path / "run").exists()
