"""Which number format the forward and backward pass use, and why.

bf16 from compute capability 8.0 on. `torch.cuda.is_bf16_supported()` is no help: it says yes on older cards too, where
bf16 is emulated and slow. Weights, gradients and optimizer state stay fp32 throughout.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from training.base.console import UserError

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class GPU:
    """A GPU and its compute capability: a T4 is (7, 5), written sm_75."""

    name: str
    capability: tuple[int, int]

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16, not only emulates it."""
        return self.capability >= (8, 0)

    @property
    def has_flash_attention(self) -> bool:
        """Whether torch's FlashAttention runs on it."""
        return self.capability >= (8, 0)

    def __str__(self) -> str:
        return "{} is sm_{}{}".format(self.name, *self.capability)


def gpu_of(device: torch.device) -> GPU | None:
    """The GPU that `device` is; None if it is a CPU."""
    if device.type == "cpu":
        return None
    return GPU(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def has_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bf16, not only emulates it."""
    if gpu := gpu_of(device):
        return gpu.has_bf16
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True)
class Precision:
    """A format and the reason for it."""

    name: Literal["fp32", "bf16", "fp16"]
    reason: str
    device: torch.device

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaling, which fp16 alone needs: its smallest gradients would round to zero."""
        return torch.amp.GradScaler(self.device.type) if self.name == "fp16" else None


def choose_precision(wanted: PrecisionName, device: torch.device) -> Precision:
    """The format to use on `device`; raises UserError where the wanted one does not exist there."""
    gpu = gpu_of(device)
    if gpu is None:
        if wanted == "auto":
            return Precision("fp32", "on a CPU fp32 is the fastest of the exact choices", device)
        return Precision(wanted, "as the config says", device)
    if wanted == "auto":
        return Precision("bf16" if gpu.has_bf16 else "fp16", f"{gpu}, bf16 needs sm_80", device)
    if wanted == "bf16" and not gpu.has_bf16:
        raise UserError(f"precision bf16: {gpu} and only emulates bf16, slowly; use --precision fp16 or auto")
    return Precision(wanted, "as the config says", device)
