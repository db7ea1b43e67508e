"""AdamW and the learning rate, which is a function of the step and therefore needs no state."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from training.base.console import UserError
from training.base.options import Options


class OptimOptions(Options):
    """AdamW (Loshchilov and Hutter 2019); weight decay 0 makes it Adam."""

    kind: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = Field(
        "adamw",
        description="state in fp32, or 8 bits (bitsandbytes); a paged one leaves a full GPU, in a run's first session",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean gradient")
    beta2: float = Field(0.98, ge=0, lt=1, description="decay of the mean squared gradient")
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay of matrices; never of biases and norms")
    clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how lr falls after the warm-up")
    warmup_steps: int = Field(100, ge=0, description="steps of linear rise from 0 to lr")
    final_lr_share: float = Field(0.02, ge=0, le=1, description="lr at the last step, as a share of the peak")
    epochs: float = Field(10, gt=0, description="length of the training in passes over the data")
    steps: int | None = Field(None, ge=1, description="length in optimizer steps instead; null: epochs count")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keep a moving average of the weights too, to be evaluated; null: none"
    )


def learning_rate(step: int, steps: int, options: OptimOptions) -> float:
    """Learning rate of optimizer step `step` (from 0) out of `steps`."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    done = (step - options.warmup_steps) / max(1, steps - 1 - options.warmup_steps)
    falling = (1 + math.cos(math.pi * done)) / 2 if options.schedule == "cosine" else 1 - done
    return options.lr * (options.final_lr_share + (1 - options.final_lr_share) * falling)


def build_optimizer(model: nn.Module, options: OptimOptions, steps: int) -> torch.optim.Optimizer:
    """AdamW over all parameters that are trained; matrices decay, vectors (biases, norms) do not.

    Raises UserError if the warm-up is longer than the run.
    """
    if options.warmup_steps >= steps:
        raise UserError(
            f"optim.warmup_steps is {options.warmup_steps}, but the whole run has {steps} steps: "
            f"shorten the warm-up or train longer (--optim.warmup_steps {steps // 10} fits, or raise optim.epochs, "
            "optim.steps)"
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in trained if each.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [each for each in trained if each.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (options.beta1, options.beta2)
    if options.kind == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)
    import bitsandbytes  # slow to import, and only these need it

    kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    optimizer: torch.optim.Optimizer = kinds[options.kind](groups, lr=options.lr, betas=betas)
    return optimizer
