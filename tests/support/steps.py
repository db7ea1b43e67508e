"""A step without a run around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.engine.parallel import Parallel


def run_micro_batches(
    engine: Parallel, batches: Sequence[Any], weight: float, loss: Callable[[nn.Module, Any], Tensor]
) -> Tensor:
    """The gradient of a step as the loop makes it, without its dropout: this rank's part of the loss, a scalar."""
    total = torch.zeros(())
    for batch in batches:
        with engine.micro_batch(last=batch is batches[-1]):
            with engine.autocast():
                part = loss(engine.replica, batch) / weight
            engine.backward(part)
        total += part.detach().cpu()
    return total
