"""A step without a run around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from training.engine.batch_plan import MicroBatch
from training.engine.cluster import Cluster
from training.engine.loop import forward_backward
from training.engine.parallel import Parallel


def run_micro_batches(
    engine: Parallel, cluster: Cluster, batches: Sequence[Any], weight: float, loss: Callable[[nn.Module, Any], Tensor]
) -> Tensor:
    """The gradient of a step of these micro-batches, by the loop itself: this rank's part of the loss, a scalar."""
    numbered = [MicroBatch(samples, number) for number, samples in enumerate(batches)]
    plan = SimpleNamespace(micro_batches_of=lambda step, rank, world_size: numbered, weight=lambda step: weight)
    return forward_backward(SimpleNamespace(seed=0), SimpleNamespace(plan=plan, loss=loss), engine, cluster, 0)
