"""What a real step of a LoRA training takes, beside what the estimate says of it.

Measured by torch's own allocator, and what is held by the sizes of the storages: nothing of the estimate takes part.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

import torch

from tests.bench.common import held_bytes, peak_of_tensors
from tests.support.steps import run_micro_batches
from training.engine.cluster import Cluster
from training.engine.optim import OptimOptions, build_optimizer
from training.engine.parallel import DataParallel
from training.engine.precision import choose_precision
from training.models.adapted_model import AdaptedModel, LoraOptions, add_adapters
from training.models.base_model import QuantisationOptions, load_base_model, read_config
from training.models.memory_estimate import MemoryEstimate, Shape, estimate
from training.qlora import COMPUTE_TYPES


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
