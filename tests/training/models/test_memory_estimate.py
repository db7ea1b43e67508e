"""The memory estimate of a LoRA training: against real steps with real 4-bit layers, and for true shapes.

What a step takes is measured by torch's own allocator, what is held by the sizes of the storages: nothing of the
estimate takes part.
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

import pytest
import torch
import transformers

from tests.bench.common import Arguments, held_bytes, peak_of_tensors
from tests.bench.qlora import prepare_records
from tests.support.base_models import SMALL, WIDE, make_model
from tests.support.commands import Launch
from tests.support.steps import run_micro_batches
from training.engine.cluster import Cluster
from training.engine.optim import OptimOptions, build_optimizer
from training.engine.parallel import DataParallel
from training.engine.precision import choose_precision
from training.models.adapted_model import AdaptedModel, LoraOptions, add_adapters
from training.models.base_model import QuantisationOptions, load_base_model, read_config
from training.models.memory_estimate import MemoryEstimate, Shape, estimate
from training.qlora import COMPUTE_TYPES

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
    "logits": (TALKATIVE, Shape(2, 64, 100), {"logits_tokens": 64}),
    "logits, bf16": (TALKATIVE, Shape(2, 64, 100), {"precision": "bf16", "logits_tokens": 64}),
    "weights": (WIDE, Shape(1, 32, 20), {}),
    "weights, not in 4 bits": (WIDE, Shape(1, 32, 20), {"kind": "none"}),
    "weights, untied, single quantisation": ({**WIDE, "tie_word_embeddings": False}, FEW, {"double": False}),
    "adapters": (SMALL, FEW, {"rank": 64}),
    "adapters, muon": (SMALL, FEW, {"rank": 64, "optimizer": "muon"}),
    "adapters, adamw8bit": (SMALL, FEW, {"rank": 64, "optimizer": "adamw8bit"}),
    "small adapters, adamw8bit, dropout": (SMALL, FEW, {"dropout": 0.1, "optimizer": "adamw8bit"}),
}


def compared(
    folder: Path,
    shape: Shape,
    *,
    precision: str = "fp32",
    kind: str = "nf4",
    double: bool = True,
    rank: int = 8,
    dropout: float = 0.0,
    optimizer: str = "adamw",
    checkpoint_layers: bool = True,
    logits_tokens: int = 256,
) -> tuple[MemoryEstimate, int, dict[str, int]]:
    """The estimate; the bytes that the second step of a real training has at its peak; and parts of these."""
    quantisation = QuantisationOptions(kind=kind, double=double)
    lora = LoraOptions(rank=rank, dropout=dropout)
    compute_type = COMPUTE_TYPES[precision]
    estimated = estimate(
        read_config(folder, quantisation),
        quantisation,
        lora,
        shape,
        compute_type=compute_type,
        optimizer=optimizer,
        checkpoint_layers=checkpoint_layers,
        logits_tokens=logits_tokens,
        device_type="cpu",
    )

    cluster = Cluster()
    base = load_base_model(folder, quantisation, compute_type, cluster.device)
    weights = held_bytes(base)
    model = AdaptedModel(add_adapters(base, lora), logits_tokens=logits_tokens, checkpoint_layers=checkpoint_layers)
    model.train()
    built = build_optimizer(model, OptimOptions(kind=optimizer, warmup_steps=0), steps=2)
    engine = DataParallel(model, built, cluster, choose_precision(precision, cluster.device), clip_norm=1.0)
    number = count()

    def batch() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(next(number))
        scored = torch.randperm(shape.sequences * shape.tokens)[: shape.supervised].sort().values
        return torch.randint(1000, (shape.sequences, shape.tokens)), scored, torch.randint(1000, (shape.supervised,))

    batches = [batch(), batch()]  # in the second one, gradients are there already

    def step() -> None:
        run_micro_batches(engine, cluster, batches, 2.0 * shape.supervised, lambda m, b: m(*b)[0].sum())
        engine.step(1e-3)

    step()
    states = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for state in built.state.values()
        for each in state.values()
        if isinstance(each, torch.Tensor)
    }
    parts = {"weights": weights, "adapters": held_bytes(model) - weights, "optimizer": sum(states.values())}
    return estimated, sum(parts.values()) + peak_of_tensors(step), parts


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


def of_true_shape(shape: dict[str, object], micro_batch: Shape) -> MemoryEstimate:
    """The estimate on a T4, with the recipe's adapters."""
    return estimate(
        transformers.Qwen2Config(**shape),
        QuantisationOptions(),
        LoraOptions(),
        micro_batch,
        compute_type=torch.float16,
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
    assert "--memory.checkpoint_layers true" in line
    assert not (tmp_path / "run").exists()
