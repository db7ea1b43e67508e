"""A training as it runs on a T4 (sm_75), on a CPU: what asks for the card hears of a T4, and bf16 is an error.

    torchrun --standalone --nproc-per-node=2 -m tests.support.t4_training training.gpt --run_dir ... --data ...

Every operation is looked at, forward and backward. One whose result is in bf16 ends the training, but for those that
read a base model that is stored so. So does an attention that a T4 has no memory-saving kernel for: one whose queries
share heads of keys. At the end it says how many matrix products were computed in fp16.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.base.console import run_main, say
from training.engine import precision
from training.models import base_model

T4 = precision.GPU("Tesla T4", (7, 5))
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")

_attention, _load = F.scaled_dot_product_attention, base_model.load_base_model


class OnAT4(TorchDispatchMode):
    """Looks at the result of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.loading = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        types = {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        assert self.loading or torch.bfloat16 not in types, f"{function} gives bf16"
        name = str(function).split(".")[1]
        self.products += torch.float16 in types and name in PRODUCTS
        return result

    def load(self, *arguments: Any) -> Any:
        self.loading = True
        model = _load(*arguments)
        self.loading = False
        left = [name for name, tensor in model.state_dict().items() if tensor.dtype == torch.bfloat16]
        assert not left, f"still in bf16: {left}"
        return model


def attention(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
    assert query.shape[1] == key.shape[1] == value.shape[1] and not options.get("enable_gqa"), "shared heads of keys"
    return _attention(query, key, value, *arguments, **options)


def main() -> int:
    script = importlib.import_module(sys.argv.pop(1))
    mode = OnAT4()
    precision.gpu_of = base_model.gpu_of = lambda device: T4
    F.scaled_dot_product_attention = attention
    if hasattr(script, "load_base_model"):
        script.load_base_model = mode.load
    with mode:
        status = script.main()
    say(f"{mode.products} products in fp16")
    return status


if __name__ == "__main__":
    run_main(main)
