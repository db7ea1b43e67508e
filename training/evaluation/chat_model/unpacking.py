"""A base model in 4 bits, unpacked where there is room: on a CPU, layers in 4 bits are unpacked for every token anew.

Promises: the weights are those that the 4 bits stand for, so that answers are the same up to rounding; no more than
half of the free memory is taken for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unpack_where_there_is_room(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replaces the layers in 4 bits of a model on a CPU, also below adapters, by plain ones in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    packed = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, Linear4bit)
    ]
    needed = sum(layer.weight.quant_state.shape.numel() for *_, layer in packed) * dtype.itemsize
    free = free_memory()
    if free is None or 2 * needed > free:
        return
    for parent, name, layer in packed:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        setattr(parent, name, plain)


def free_memory() -> int | None:
    """Bytes that processes can still take, where the system tells: Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
