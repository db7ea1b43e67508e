"""Muon (Jordan et al. 2024): a matrix steps in the direction of its mean gradient, made orthogonal.

Matrices are the weights of linear and recurrent layers; those that a layer stacks (query, key and value, the gates of a
GRU) are taken apart. All else, embeddings, biases and norms, is AdamW's. A matrix's step is scaled to the size that
AdamW's has (Liu et al. 2025, section 2.2), so that one learning rate serves both.

Every rank keeps all state and has the whole gradient, so only the costly part is shared out: each matrix is made
orthogonal by one rank, always alone, and sent to the others. No bit depends on which rank that was.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from training.engine.cluster import Cluster
from training.engine.precision import has_bf16

MOMENTUM = 0.95

# Each iteration maps a singular value s to a s + b s^3 + c s^5. After five, all between 0.01 and 1 lie between 0.68 and
# 1.13: steep at 0 instead of exact at 1 (Jordan et al. 2024).
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5

_ADAMW_RMS = 0.2  # the usual root mean square of a step of AdamW, as a share of its learning rate


def stacked_matrices(model: nn.Module) -> dict[Tensor, int]:
    """The weights that are Muon's among those that are trained, and how many matrices are stacked in each."""
    found: dict[Tensor, int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found[module.weight] = getattr(module, "stacked", 1)  # of a `StackedLinear`
        elif isinstance(module, nn.RNNBase):
            weights = (each for each in module.parameters() if each.dim() == 2)
            found |= {each: len(each) // module.hidden_size for each in weights}
    return {parameter: stacked for parameter, stacked in found.items() if parameter.requires_grad}


class Muon(torch.optim.Optimizer):
    """See the module's docstring. A group with `stacked` matrices in each parameter is Muon's, one with 0 AdamW's."""

    def __init__(self, groups: list[dict[str, Any]], cluster: Cluster | None, *, lr: float, betas: tuple[float, float]):
        """cluster: whose ranks share the work; None: this process is alone."""
        # fused: torch then keeps the count of steps where AdamW's kernel wants it when a state is loaded.
        super().__init__(groups, {"lr": lr, "betas": betas, "fused": True})
        self._cluster = cluster

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Every parameter's step, all ranks together."""
        steps: list[tuple[Tensor, float]] = []  # matrices, and how far each goes
        towards: list[Tensor] = []
        for group in self.param_groups:
            trained = [each for each in group["params"] if each.grad is not None]
            if not group["stacked"]:
                self._adamw(trained, group)
                continue
            for parameter in trained:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                towards += parameter.grad.lerp(state["momentum"], MOMENTUM).chunk(group["stacked"])  # Nesterov's
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                matrices = parameter.chunk(group["stacked"])
                steps += [(each, group["lr"] * _ADAMW_RMS * math.sqrt(max(each.shape))) for each in matrices]
        apart = map(orthogonal, towards) if self._cluster is None else self._cluster.computed_apart(towards, orthogonal)
        for (matrix, length), direction in zip(steps, apart, strict=True):
            matrix.add_(direction, alpha=-length)

    def _adamw(self, trained: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in trained:
            if not self.state[parameter]:
                moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update(step=torch.zeros((), device=parameter.device), **moments)
        exp_avgs, exp_avg_sqs, counts = (
            [self.state[each][kind] for each in trained] for kind in ("exp_avg", "exp_avg_sq", "step")
        )
        adamw(
            trained,
            [each.grad for each in trained],  # type: ignore[misc]  # those that have one
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs=[],
            state_steps=counts,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def orthogonal(matrix: Tensor) -> Tensor:
    """U S' V^T of a `matrix` U S V^T, the singular values S' near 1 (see `_COEFFICIENTS`), by Newton-Schulz iterations.

    In bf16 where the device has it, else in fp32; the result is fp32.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16() if has_bf16(matrix.device) else matrix.float()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).float().contiguous()
