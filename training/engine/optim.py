"""The optimizer, how long a run trains, and the learning rate, a function of the step that therefore needs no state.

With `wsd` or `constant` the rate does not depend on the run's length until its last steps: up to there a longer run is
the same, so a run can be made longer at any time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from training.base.console import UserError
from training.base.options import Options
from training.engine.cluster import Cluster
from training.engine.muon import Muon, stacked_matrices


class OptimOptions(Options):
    """AdamW (Loshchilov and Hutter 2019); weight decay 0 makes it Adam. Or Muon, and AdamW for what is no matrix."""

    kind: Literal["adamw", "adamw8bit", "paged_adamw8bit", "muon"] = Field(
        "adamw",
        description="state in fp32, or 8 bits (bitsandbytes); a paged one leaves a full GPU, in a run's first session; "
        "muon: orthogonal steps of matrices",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean gradient")
    beta2: float = Field(0.98, ge=0, lt=1, description="decay of the mean squared gradient")
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay of matrices; never of biases and norms")
    clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine",
        description="how lr falls after the warm-up; wsd: in the last decay_steps only; with wsd and constant, a run "
        "can be made longer",
    )
    decay_steps: int | None = Field(None, ge=1, description="steps of wsd's fall; a tenth to a fifth of a run is usual")
    warmup_steps: int = Field(100, ge=0, description="steps of linear rise from 0 to lr")
    final_lr_share: float = Field(0.02, ge=0, le=1, description="lr at the last step, as a share of the peak")
    epochs: float = Field(10, gt=0, description="length of the training in passes over the data")
    steps: int | None = Field(None, ge=1, description="length in optimizer steps instead; null: epochs count")
    patience: int | None = Field(
        None,
        ge=1,
        description="end (wsd: begin to decay) after so many validations in a row without a new best; null: never",
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keep a moving average of the weights too, to be evaluated; null: none"
    )

    @property
    def can_be_longer(self) -> bool:
        """Whether a run may get another length."""
        return self.schedule in EXTENDABLE

    @model_validator(mode="after")
    def _decays(self) -> OptimOptions:
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError(
                "optim.schedule wsd and optim.decay_steps belong together: set both, for example --optim.decay_steps "
                "to a fifth of the run, or neither (a --budget chooses decay_steps where the config file has it)"
            )
        return self


# Keys of `OptimOptions` that say how long a run is, and the schedules with which they may change.
LENGTH = ("epochs", "steps", "decay_steps")
EXTENDABLE = ("wsd", "constant")


@dataclass(frozen=True)
class Course:
    """How long a run is. Up to step `fork`, one that differs in its length alone is the same, the record too."""

    steps: int
    fork: int

    @classmethod
    def of(cls, options: OptimOptions, steps: int, ended: int | None = None) -> Course:
        """steps: as planned. ended: the step at which patience was at its end, None if it is not."""
        decay = options.decay_steps or 0
        if ended is not None:
            return cls(ended + decay, ended)
        # The last step has a line and a validation that it would not have in a longer run.
        return cls(steps, steps - max(1, decay)) if options.can_be_longer else cls(steps, steps)


def learning_rate(step: int, course: Course, options: OptimOptions) -> float:
    """Learning rate of optimizer step `step` (from 0) of a run.

    wsd (warm-up, stable, decay: Hu et al. 2024) falls with the square root, as Hägele et al. (2024) found best.
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.schedule == "constant" or (options.schedule == "wsd" and step < course.fork):
        return options.lr
    if options.schedule == "wsd":
        falling = 1 - math.sqrt((step + 1 - course.fork) / (course.steps - course.fork))
    else:
        done = (step - options.warmup_steps) / max(1, course.steps - 1 - options.warmup_steps)
        falling = (1 + math.cos(math.pi * done)) / 2 if options.schedule == "cosine" else 1 - done
    return options.lr * (options.final_lr_share + (1 - options.final_lr_share) * falling)


# The 8-bit optimizers of bitsandbytes keep the state of smaller parameters in fp32.
_SMALLEST_IN_8_BITS = 4096


def optimizer_bytes(model: nn.Module, kind: str) -> int:
    """What the optimizer of that kind keeps of all that is trained.

    Muon keeps one moment, AdamW two, in fp32 or in 8 bits with a scale per 256.
    """
    matrices = stacked_matrices(model) if kind == "muon" else {}
    total = 0
    for parameter in model.parameters():
        numbers = parameter.numel() if parameter.requires_grad else 0
        if parameter in matrices:
            total += 4 * numbers
        elif kind.endswith("8bit") and numbers >= _SMALLEST_IN_8_BITS:
            total += 2 * (numbers + 4 * -(-numbers // 256))
        else:
            total += 8 * numbers
    return total


def build_optimizer(
    model: nn.Module, options: OptimOptions, steps: int, cluster: Cluster | None = None
) -> torch.optim.Optimizer:
    """The optimizer of all parameters that are trained; matrices decay, vectors (biases, norms) do not.

    cluster: whose ranks share what they can of its work; None: this process is alone.
    Raises UserError if the run has no room for its warm-up and its decay.
    """
    if options.decay_steps is not None and options.warmup_steps + options.decay_steps >= steps:
        raise UserError(
            f"optim.warmup_steps {options.warmup_steps} and optim.decay_steps {options.decay_steps} leave nothing in "
            f"between of the run's {steps} steps: shorten them (--optim.decay_steps {max(1, steps // 5)} is a fifth), "
            "or train longer (optim.epochs, optim.steps)"
        )
    if options.warmup_steps >= steps:
        raise UserError(
            f"optim.warmup_steps is {options.warmup_steps}, but the whole run has {steps} steps: "
            f"shorten the warm-up or train longer (--optim.warmup_steps {steps // 10} fits, or raise optim.epochs, "
            "optim.steps), or let --budget 1h, or as long as you have, choose both"
        )
    stacked = stacked_matrices(model) if options.kind == "muon" else {}
    alike: dict[tuple[bool, int], list[nn.Parameter]] = defaultdict(list)  # by whether they decay, and `stacked`
    for parameter in model.parameters():
        if parameter.requires_grad:
            alike[parameter.dim() >= 2, stacked.get(parameter, 0)].append(parameter)
    groups = [
        {"params": alike[decays, count], "weight_decay": options.weight_decay if decays else 0.0, "stacked": count}
        for decays, count in sorted(alike, reverse=True)
    ]
    betas = (options.beta1, options.beta2)
    if options.kind == "muon":
        return Muon(groups, cluster, lr=options.lr, betas=betas)
    if options.kind == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)
    import bitsandbytes  # slow to import, and only these need it

    kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    optimizer: torch.optim.Optimizer = kinds[options.kind](groups, lr=options.lr, betas=betas)
    return optimizer
