"""Adapters merged into the base model that they were trained on: the one in 4 bits, not the one that it was made of.

The 4 bits are unpacked, the adapters' products are added in fp32, and the sum is rounded once to the type that is
wanted. Merging into the original weights gives another model, since the adapters have learned to live with what 4 bits
leave of them. Merging in 4 bits, as peft's merge_and_unload does, rounds away what was learned; and peft on a base that
was unpacked as a whole would hold all of it in fp32.

Promises: no weight exists twice for longer than its layer takes, so that memory is that of the merged model.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.base.console import UserError
from training.models.base_model import linear_layers, on_meta

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

# Rows of logits that are compared at a time.
_ROWS = 64

_M_MMAP_THRESHOLD = -3  # of malloc.h

# Python with torch, transformers, peft and bitsandbytes.
_PROCESS = 900_000_000


@dataclass(frozen=True)
class Difference:
    """How far logits are from others."""

    max: float
    mean: float
    same: float  # share of positions at which the same token has the largest one

    def __str__(self) -> str:
        return f"{self.max:.1e} at most, {self.mean:.1e} in the mean, the same token first at {self.same:.2%}"

    def rounded(self) -> dict[str, float]:
        """For export.json."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


def difference(ours: Tensor, theirs: Tensor) -> Difference:
    """Of two sets of logits [N, vocabulary]; nan where one of them is not finite."""
    most = total = same = 0.0
    for left, right in zip(ours.split(_ROWS), theirs.split(_ROWS), strict=True):
        apart = (left.float() - right.float()).abs()
        # Not max(), which loses a nan.
        most = torch.maximum(torch.tensor(most), apart.max()).item()
        total += apart.sum(dtype=torch.float64).item()
        same += (left.argmax(-1) == right.argmax(-1)).sum().item()
    return Difference(most, total / ours.numel(), same / len(ours))


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """The logits [N, vocabulary] at every token of the sequences ids [B, T], which are padded on the right."""
    inside = torch.arange(ids.shape[1]) < lengths[:, None]
    # Padding is behind what is asked for, and attention looks back only.
    return model(input_ids=ids, use_cache=False).logits[inside]


def compute_in_fp32(model: PeftModel) -> None:
    """Makes an adapted model compute in fp32, whatever it was loaded for: the 4 bits stay, no product is rounded."""
    from bitsandbytes.nn import Linear4bit

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.get_base_model().modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
        # What keeps fp16 in its range (`training.models.base_model.freeze`) would round to it.
        module._forward_hooks.clear()


def merged(model: PeftModel, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model of `config` in `dtype`, for saving only. `model`, which computes in fp32, is used up by it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base, plain = model.get_base_model(), on_meta(config, dtype)
    sizes = {name: parameter.numel() for name, parameter in plain.named_parameters()}  # tied ones once
    sizes |= {name: tensor.numel() for name, tensor in plain.named_buffers() if name in plain.state_dict()}
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in base.modules():
        for kind, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, kind))
    state: dict[str, Tensor] = {}
    # Embedding and head are in fp32: they go first, while there is little of the merged model.
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        path, _, kind = name.rpartition(".")
        layer = base.get_submodule(path)
        inner = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        tensor = _merged_weight(layer, inner) if kind == "weight" else getattr(inner, kind)
        state[name] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        del tensor
        for owner, called in owners.pop(getattr(inner, kind), ()):
            setattr(owner, called, None)
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    return plain


def _merged_weight(layer: Any, inner: Any) -> Tensor:
    """The weight of a layer with its adapter, if it has one, fp32."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    weight = inner.weight
    if isinstance(inner, Linear4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    if layer is inner:
        return weight
    (adapter,) = layer.active_adapters
    if adapter in layer.lora_variant:  # DoRA, which scales the sum
        return layer.lora_variant[adapter].merge_safe(layer, adapter, weight)
    return weight + layer.get_delta_weight(adapter)


def load_plain(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `folder` as users load it, to compute in `dtype`.

    Raises UserError when something is missing, left over or quantised.
    """
    import transformers

    gc.collect()  # models are full of cycles, and there is no room for two
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    wrong = sorted({str(key) for keys in info.values() for key in keys})
    if wrong or getattr(loaded.config, "quantization_config", None) is not None:
        raise UserError(
            f"transformers {transformers.__version__} does not load the merged model as it is (keys that do not fit: "
            f"{', '.join(wrong) or 'none, but it takes it for quantised'}): install the version that requirements.txt "
            "names"
        )
    return loaded.eval()


def memory_of(config: PretrainedConfig, dtype: torch.dtype, logits: int, *, in_4_bits: bool) -> int:
    """Bytes that merging needs at its peak. logits: bytes of one set of them, fp32.

    The peak is when the last layer is unpacked beside the merged model, or when the model is checked. A base in 4 bits,
    with head and embedding in fp32, is smaller at any time; an unquantised one is in fp32 as a whole.
    """
    plain = on_meta(config, dtype)
    layer = max((layer.weight.numel() for layer in linear_layers(plain)), default=0)
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    if not in_4_bits:
        weights = max(weights, 4 * plain.num_parameters())
    return weights + 3 * 4 * layer + 2 * logits + _PROCESS


def give_memory_back() -> None:
    """Asks the C library, if it is glibc, to return the memory of freed tensors to the system at once.

    Otherwise it stays in the heap, between what is still in use: merging 1.2 billion parameters took 5.6 GB instead of
    3.2 GB.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
