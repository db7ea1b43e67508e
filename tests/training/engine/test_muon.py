"""Muon, against its definition by singular values and against plain, slow code; and the work shared out over ranks."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.ranks import on_ranks
from training.engine.cluster import Cluster
from training.engine.muon import MOMENTUM, Muon, orthogonal
from training.engine.optim import OptimOptions, build_optimizer
from training.models.attention_gru import ContextGRU
from training.models.gpt import GPT, GPTOptions, Vocabularies

OPTIONS = OptimOptions(kind="muon", lr=0.02, beta2=0.9, weight_decay=0.3, warmup_steps=0)


@pytest.fixture
def in_fp32(monkeypatch):
    """As on a device without bf16, so that plain code comes to the same."""
    monkeypatch.setattr("training.engine.muon.has_bf16", lambda device: False)


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96), (1, 40), (40, 1)])
def test_a_matrix_keeps_its_singular_vectors_and_gets_singular_values_near_1(shape):
    matrix = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonal(matrix) @ right.T
    torch.testing.assert_close(found, found.diag().diag(), atol=1e-4, rtol=0)
    near = found.diag()[values > 0.01 * matrix.norm()]
    assert len(near) > 0.8 * len(values)
    assert 0.65 < near.min() <= near.max() < 1.15
    assert orthogonal(matrix).is_contiguous()


def test_in_bf16_the_singular_values_are_near_1_too(monkeypatch):
    monkeypatch.setattr("training.engine.muon.has_bf16", lambda device: True)
    found = orthogonal(torch.randn(48, 96, generator=torch.Generator().manual_seed(0)))
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() <= values.max() < 1.2


def test_nothing_has_no_direction():
    assert torch.equal(orthogonal(torch.zeros(4, 3)), torch.zeros(4, 3))


def gpt() -> GPT:
    torch.manual_seed(1)
    return GPT(GPTOptions(layers=2, heads=2, width=16, context=8, dropout=0), Vocabularies(20))


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(each.shape, generator=generator) for each in model.parameters()]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    """Steps with gradients of chance; the parameters behind them."""
    for step in range(steps):
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def plainly(weights: Tensor, parts: int, steps: list[Tensor]) -> Tensor:
    """Matrix by matrix, from the whole history of gradients, with the singular values that the iteration gives them."""
    for step in range(len(steps)):
        mean = sum((1 - MOMENTUM) * MOMENTUM ** (step - then) * steps[then] for then in range(step + 1))
        ahead = MOMENTUM * mean + (1 - MOMENTUM) * steps[step]
        moved = []
        for matrix, towards in zip(weights.chunk(parts), ahead.chunk(parts), strict=True):
            left, values, right = torch.linalg.svd(towards, full_matrices=False)
            values = values / towards.norm()
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            length = OPTIONS.lr * 0.2 * math.sqrt(max(matrix.shape))
            moved.append((1 - OPTIONS.lr * OPTIONS.weight_decay) * matrix - length * left @ values.diag() @ right)
        weights = torch.cat(moved)
    return weights


@pytest.mark.usefixtures("in_fp32")
def test_block_matrices_are_muons_query_key_and_value_apart_and_all_else_is_adamws():
    model = gpt()
    names = [name for name, _ in model.named_parameters()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = train(model, build_optimizer(model, OPTIONS, 10))
    as_adamw = gpt()
    plain = OPTIONS.model_copy(update={"kind": "adamw"})
    by_adamw = train(as_adamw, build_optimizer(as_adamw, plain, 10))
    muons = {name for name in names if "blocks" in name and name.endswith("weight") and "norm" not in name}
    assert len(muons) == 2 * 4
    for place, name in enumerate(names):
        expected = by_adamw[place]
        if name in muons:
            history = [gradients(model, step)[place] for step in range(3)]
            expected = plainly(before[place], 3 if "query_key_value" in name else 1, history)
        torch.testing.assert_close(found[place], expected, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("model", [nn.GRU(6, 5, bidirectional=True), ContextGRU(6, 7, 5)], ids=["encoder", "decoder"])
def test_the_gates_of_a_recurrent_layer_are_taken_apart(model):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = train(model, build_optimizer(model, OPTIONS, 10))
    for place, (name, _) in enumerate(model.named_parameters()):
        if "weight" in name:
            history = [gradients(model, step)[place] for step in range(3)]
            torch.testing.assert_close(found[place], plainly(before[place], 3, history), atol=1e-5, rtol=1e-5)


def of_rank(rank: int, ranks: int) -> Any:
    return SimpleNamespace(computed_apart=partial(Cluster.computed_apart, SimpleNamespace(rank=rank, world_size=ranks)))


def train_on_rank(rank: int, ranks: int) -> list[Tensor]:
    model = gpt()
    return train(model, build_optimizer(model, OPTIONS, 10, of_rank(rank, ranks)))


def test_three_ranks_share_the_work_and_no_bit_depends_on_who_did_it(tmp_path):
    shared = on_ranks(3, tmp_path, train_on_rank)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = gpt()
        alone = train(model, build_optimizer(model, OPTIONS, 10))
    finally:
        torch.set_num_threads(threads)
    for found in shared:
        assert all(map(torch.equal, found, alone))


def test_what_is_frozen_or_has_no_gradient_stays():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OPTIONS, 10)
    assert isinstance(optimizer, Muon)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert not optimizer.state or not any(optimizer.state.values())
