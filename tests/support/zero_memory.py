"""Real steps of a QLoRA under ZeRO on two ranks, to measure what they take: see `tests.training.test_qlora_zero`.

    torchrun --standalone --nproc-per-node=2 -m tests.support.zero_memory FOLDER '[{"stage": 3}]'

Prints a JSON object a case: the bytes of all tensors at the peak of a step, of the base model's storages on this rank,
of the base model whole, and of all tensors at the most while it was loaded. What is there between steps is found by
asking the garbage collector for tensors, what a step takes besides by torch's own allocator: nothing of the estimate
takes part.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from tests.bench.common import held_bytes, peak_of_tensors
from tests.support.base_models import make_model
from tests.support.steps import run_micro_batches
from training.engine.cluster import Cluster
from training.engine.optim import OptimOptions, build_optimizer
from training.engine.precision import choose_precision
from training.engine.zero import Spreading, Zero, ZeroOptions
from training.models.adapted_model import AdaptedModel, LoraOptions, add_adapters, spread_by_layer
from training.models.base_model import QuantisationOptions, load_base_model
from training.models.memory_estimate import Shape
from training.qlora import COMPUTE_TYPES

WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 1024}
SHAPE = Shape(2, 64, 60)
LORA = LoraOptions(rank=8, dropout=0.1)


def held_tensors() -> int:
    """Bytes of all storages in this process that a tensor known to Python has."""
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) or type(each).__name__ == "Params4bit":
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def measure(
    folder: Path, cluster: Cluster, *, stage: int, precision: str = "fp32", tied: bool = True
) -> dict[str, object]:
    model_folder = folder / f"model-{tied}"
    cluster.on_first(lambda: model_folder.exists() or make_model(model_folder, {**WIDE, "tie_word_embeddings": tied}))
    gc.collect()
    before = held_tensors()
    loading = 0
    spreading = Spreading(ZeroOptions(stage=3), cluster) if stage == 3 else None

    def take(weight: torch.nn.Parameter) -> None:
        nonlocal loading
        loading = max(loading, held_tensors() - before)
        spreading.take(weight)

    base = load_base_model(
        model_folder, QuantisationOptions(), COMPUTE_TYPES[precision], cluster.device, spreading and take
    )
    frozen = list(base.parameters())
    scales = held_bytes(base) - sum(each.untyped_storage().nbytes() for each in frozen)
    whole = scales + sum(getattr(each, "ds_numel", each.numel()) * each.element_size() for each in frozen)
    torch.manual_seed(1)
    adapted = add_adapters(base, LORA)
    if stage == 3:
        spread_by_layer(adapted)
    model = AdaptedModel(adapted, logits_tokens=50, checkpoint_layers=True)
    optimizer = build_optimizer(model, OptimOptions(warmup_steps=0), steps=4)
    chosen = choose_precision(precision, cluster.device)
    engine = Zero(model, optimizer, cluster, chosen, 1.0, None, ZeroOptions(stage=stage))
    tokens = torch.randint(1000, (SHAPE.sequences, SHAPE.tokens))
    scored, labels = torch.arange(SHAPE.supervised), torch.randint(1000, (SHAPE.supervised,))
    batches = [(tokens, scored, labels), (tokens.clone(), scored, labels)]

    def step() -> None:
        run_micro_batches(engine, cluster, batches, 4.0 * SHAPE.supervised, lambda m, b: m(*b)[0].sum())
        engine.step(1e-3)

    for _ in range(4):  # DeepSpeed fetches ahead once it knows the order of modules
        step()
    gc.collect()
    held = held_tensors() - before
    own = scales + sum(each.untyped_storage().nbytes() for each in frozen)  # with ZeRO 3, of what is whole
    own += sum(each.ds_tensor.nbytes for each in frozen if hasattr(each, "ds_tensor"))
    sizes = {"base": own, "whole": whole, "loading": loading}
    return {"model": str(model_folder), "peak": held + peak_of_tensors(step), **sizes}


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    with Cluster() as cluster:
        for case in cases:
            found = measure(folder, cluster, **case)
            if cluster.is_first:
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
