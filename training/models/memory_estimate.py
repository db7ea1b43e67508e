"""How much memory a process of a LoRA training needs, known before anything is loaded, and what helps if it has less.

The base model's config gives every tensor's shape. What a step computes on the way is found by running the real step
without memory (fake tensors) and adding up what lives at the same time, so it follows the code and not a formula. What
kernels need for themselves while they run is left out, but for `_COPYING`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from training.base.console import UserError, say, warn
from training.base.options import Options
from training.engine.batch_plan import BatchOptions, BatchPlan
from training.engine.budget import Choice, Chooser
from training.engine.cluster import Cluster
from training.engine.optim import OptimOptions, optimizer_bytes
from training.engine.zero import ZeroOptions, deepspeed_config
from training.models.adapted_model import AdaptedModel, LoraOptions, add_adapters
from training.models.base_model import QuantisationOptions, freeze, linear_layers, on_meta

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

# What is assumed to lie on a card besides tensors: CUDA's context and kernels, NCCL's buffers, gaps between blocks.
OVERHEAD = 900_000_000

# By what share a step has taken more than its estimate, at most, see docs/results.md.
ESTIMATE_ERROR = 0.08

# Of bitsandbytes: weights that share a scale, and scales that share one in turn where they are quantised too.
_BLOCK, _SCALES_BLOCK = 64, 256

# Operations that make a copy of their input for themselves, on a CPU as on a GPU.
_COPYING = {torch.ops.aten.logsumexp.default}


class MemoryOptions(Options):
    """What is computed twice or in pieces, so that it fits."""

    checkpoint_layers: bool = Field(
        True, description="compute every layer a second time in the backward pass instead of keeping what it computed"
    )
    logits_tokens: int = Field(256, ge=1, description="supervised tokens whose logits exist at a time")
    card_gb: float | None = Field(
        None, gt=0, description="GB (10^9 bytes) of the card to plan for; null: this machine's, if it has one"
    )


class LoraRun(Protocol):
    """The options on which the memory of a run depends: `QLoRAConfig` has them."""

    @property
    def quantisation(self) -> QuantisationOptions: ...
    @property
    def lora(self) -> LoraOptions: ...
    @property
    def memory(self) -> MemoryOptions: ...
    @property
    def batch(self) -> BatchOptions: ...
    @property
    def optim(self) -> OptimOptions: ...
    @property
    def parallel(self) -> Literal["ddp", "deepspeed"]: ...
    @property
    def zero(self) -> ZeroOptions: ...


@dataclass(frozen=True)
class Shape:
    """A micro-batch."""

    sequences: int
    tokens: int  # inputs of the longest sequence
    supervised: int  # tokens


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int  # with the weights that ZeRO 3 has brought together at that moment
    trained: int  # no bytes: numbers in the adapters, of all processes
    loading: int = 0  # at the start under ZeRO 3: its part of the base model, and the largest weight as it is read

    @property
    def held(self) -> int:
        """What is there all the time."""
        return self.weights + self.adapters + self.gradients + self.optimizer

    @property
    def tensors(self) -> int:
        """What torch calls the peak of allocated memory."""
        return max(self.held + self.activations, self.loading)

    def __str__(self) -> str:
        parts = (
            f"{name} {getattr(self, name) / 1e9:.2f}"
            for name in ("weights", "adapters", "gradients", "optimizer", "activations")
        )
        loading = ""
        if self.loading > self.held + self.activations:
            loading = f"; most while the base model is loaded: then {self.loading / 1e9:.2f}"
        return f"{self.tensors / 1e9:.2f} GB of tensors a process ({', '.join(parts)}{loading})"

    def room_for_activations(self, gpu_bytes: float) -> float:
        """Bytes that a GPU of so many bytes has left for activations; negative where the rest does not fit either."""
        return gpu_bytes - OVERHEAD - self.held

    def fits(self, gpu_bytes: float, error: float = 0.0) -> bool:
        """Whether a GPU of so many bytes has room for all of it, and by such a share more."""
        return self.tensors * (1 + error) <= gpu_bytes - OVERHEAD

    def shortage(self, gpu_bytes: float) -> str:
        """Why it does not fit, in words."""
        overhead = f"about {OVERHEAD / 1e9:.1f} GB for CUDA itself"
        return f"a card of {gpu_bytes / 1e9:.1f} GB is too small: {self}, and {overhead}"


def checked_memory(
    options: LoraRun,
    about: PretrainedConfig,
    plan: BatchPlan,
    compute_type: torch.dtype,
    cluster: Cluster,
    *,
    dry_run: bool,
) -> MemoryEstimate:
    """What a process will need, which is also printed; where the card is too small, a warning says what to change.

    about: of the base model. In a dry run a card that is too small is a UserError: nothing has been loaded yet, and
    nothing need be.
    """
    gpu_bytes, device_type = card_of(options.memory, cluster)
    memory = memory_of(options, about, plan, compute_type, device_type, cluster.world_size)
    say(f"memory: {memory}")
    if gpu_bytes is not None and memory.fits(gpu_bytes):
        say(f"a card of {gpu_bytes / 1e9:.1f} GB has room for it, with {OVERHEAD / 1e9:.1f} GB for CUDA itself")
    elif gpu_bytes is not None:
        helps = "; ".join(advice(options, memory, gpu_bytes, cluster.world_size))
        problem = f"{memory.shortage(gpu_bytes)}. What helps: {helps}"
        if dry_run:
            raise UserError(problem)
        warn(problem)
    return memory


def card_of(options: MemoryOptions, cluster: Cluster) -> tuple[float | None, str]:
    """The bytes of the card to plan for, None where there is none, and the type of device that the estimate is about.

    With a card to plan for, that is the card, even on a machine without any.
    """
    if options.card_gb:
        return options.card_gb * 1e9, "cuda"
    if cluster.device.type == "cuda":
        return float(torch.cuda.get_device_properties(cluster.device).total_memory), "cuda"
    return None, cluster.device.type


class FineTuningChooser(Chooser):
    """Chooses micro-batches for which the card has room, and steps small enough for what there is to learn from.

    A step has the tokens of the config, or as many fewer as give `WANTED_STEPS` in all passes. Micro-batches are never
    larger than in the config: of fewer micro-batches a step would have fewer classes of length.
    """

    most_passes = 3.0  # as LLaMA-Factory and Alpaca have it: a chat model soon knows its records by heart

    def __init__(
        self,
        longest: int,
        tokens: int,
        memory_for: Callable[[BatchOptions], MemoryEstimate],
        gpu_bytes: float | None,
    ):
        """longest: tokens of the longest sample. tokens: of all samples of a pass. gpu_bytes: None: no card."""
        super().__init__(longest)
        self._tokens, self._memory_for, self._gpu_bytes = tokens, memory_for, gpu_bytes

    def batch(self, config: LoraRun, cluster: Cluster) -> list[Choice]:
        """See `Chooser`."""
        options, ranks = config.batch, cluster.world_size
        tokens = options.tokens_per_micro_batch
        if tokens is None:
            return super().batch(config, cluster)
        found = cluster.on_first(lambda: self._fitting(options, tokens, ranks))
        (choices, *_) = cluster.gather(found or [], list[Choice])
        return choices

    def _fitting(self, options: BatchOptions, tokens: int, ranks: int) -> list[Choice]:
        count = math.lcm(options.micro_batches_per_step, ranks)
        total = tokens * options.micro_batches_per_step
        reason = f"about {total:,} tokens a step, as in the config"
        few = int(self.most_passes * self._tokens / WANTED_STEPS)
        if few < total:
            total = max(few, ranks * self.longest)
            reason = f"about {total:,} tokens a step, so that {self.most_passes:g} passes have {WANTED_STEPS} steps"
            shared = (each for each in range(count, 0, -1) if count % each == each % ranks == 0)
            count = next((each for each in shared if total >= each * self.longest), ranks)
        while True:
            size = max(self.longest, -(-total // count))
            room = "so many has the longest sample" if size == self.longest else "shared out equally"
            if self._gpu_bytes is None:
                break
            tried = options.model_copy(update={"micro_batches_per_step": count, "tokens_per_micro_batch": size})
            memory, card = self._memory_for(tried), f"a card of {self._gpu_bytes / 1e9:.1f} GB"
            if memory.fits(self._gpu_bytes, error=ESTIMATE_ERROR):
                room = f"{card} has room for it: {memory}"
                break
            if size == self.longest:
                room += f"; {card} is too small"
                break
            count *= 2
        return [
            Choice("batch.micro_batches_per_step", count, reason),
            Choice("batch.tokens_per_micro_batch", size, room),
        ]


# Steps of a run on few records: with one for all of them it would learn nothing.
WANTED_STEPS = 100


def memory_of(
    options: LoraRun,
    about: PretrainedConfig,
    plan: BatchPlan,
    compute_type: torch.dtype,
    device_type: str,
    ranks: int,
) -> MemoryEstimate:
    """What a process will need, from the base model's config and the largest micro-batch of the plan."""
    longest = plan.slots[plan.cuts[1:] - 1, 0].astype(np.int64)
    sizes = np.diff(plan.cuts)
    largest = int(np.argmax(sizes * longest))
    return estimate(
        about,
        options.quantisation,
        options.lora,
        Shape(int(sizes[largest]), int(longest[largest]), int(plan.weights[plan.typical_micro_batch(largest)].sum())),
        compute_type=compute_type,
        optimizer=options.optim.kind,
        checkpoint_layers=options.memory.checkpoint_layers,
        logits_tokens=options.memory.logits_tokens,
        device_type=device_type,
        ranks=ranks,
        zero=options.zero if options.parallel == "deepspeed" else None,
    )


def advice(options: LoraRun, memory: MemoryEstimate, gpu_bytes: float, ranks: int) -> list[str]:
    """What to change so that a process fits into so many bytes, the cheapest first."""
    room = memory.room_for_activations(gpu_bytes)
    found = []
    if options.parallel == "deepspeed":
        if options.zero.offload == "none" and memory.optimizer > 0.05 * gpu_bytes:
            found.append("--zero.offload optimizer, which takes the optimizer away")
    elif options.optim.kind == "adamw" and memory.optimizer > 0.05 * gpu_bytes:
        found.append("--optim.kind paged_adamw8bit, which takes three quarters of the optimizer away")
    if not options.memory.checkpoint_layers:
        found.append("--memory.checkpoint_layers true, which takes most of the activations away")
    elif room > 0.1 * memory.activations:
        tokens = options.batch.tokens_per_micro_batch
        most = f" to about {int(tokens * room / memory.activations):,}" if tokens else ""
        found.append(f"lower batch.tokens_per_micro_batch{most}, and raise batch.micro_batches_per_step in return")
    if options.quantisation.kind == "none":
        found.append("--quantisation.kind nf4, which takes about three quarters of the weights away")
    spread = options.parallel == "deepspeed" and options.zero.stage == 3
    if ranks > 1 and not spread and memory.weights > 0.4 * gpu_bytes:
        found.append(f"--parallel deepspeed --zero.stage 3, which spreads the weights over the {ranks} processes")
    found.append("fewer or smaller adapters (lora.targets, lora.rank)" if room > 0 else "a smaller base model")
    return found


def estimate(
    config: PretrainedConfig,
    quantisation: QuantisationOptions,
    lora: LoraOptions,
    shape: Shape,
    *,
    compute_type: torch.dtype,
    optimizer: str,
    checkpoint_layers: bool,
    logits_tokens: int,
    device_type: str = "cuda",
    ranks: int = 1,
    zero: ZeroOptions | None = None,
) -> MemoryEstimate:
    """The memory of a training of `config` with these options, its largest micro-batch being of `shape`.

    device_type: where it trains, `cuda` or `cpu`; with 16 bits the latter copies more. zero: None without DeepSpeed.
    """
    base = on_meta(config, compute_type)
    in_4_bits = {layer.weight for layer in linear_layers(base)} if quantisation.kind == "nf4" else set()
    scales = sum(_bytes_of_scales(each, quantisation.double) for each in in_4_bits)
    scales += sum(each.nbytes for each in base.buffers())
    stored = [_Stored(each.numel() // 2, 1) if each in in_4_bits else _Stored.of(each) for each in base.parameters()]
    whole = scales + sum(each.bytes for each in stored)
    largest = max((each.nbytes for each in base.parameters()), default=0)  # they come as they are, one after the other
    # DoRA unpacks each weight for its norm, in fp32, which layers without weights cannot show.
    unpacked = 4 * max(map(Tensor.numel, in_4_bits), default=0) if lora.dora else 0
    adapted = _adapted(base, lora, compute_type, device_type, in_4_bits=bool(in_4_bits))
    model = AdaptedModel(adapted, logits_tokens=logits_tokens, checkpoint_layers=checkpoint_layers)
    sizes = [each.numel() for each in model.parameters() if each.requires_grad]
    trained = sum(sizes)
    if zero is None:
        return MemoryEstimate(
            weights=whole,
            adapters=4 * trained,
            gradients=4 * trained * (2 if ranks > 1 else 1),  # DDP's buckets, and what is added up before them
            optimizer=optimizer_bytes(model, optimizer),
            activations=unpacked + _activations(model, shape, compute_type),
            trained=trained,
        )
    settings = deepspeed_config(zero, None, trained, device_type, frozen=True)["zero_optimization"]
    part, bucket = 4 * -(-trained // ranks), 4 * settings["reduce_bucket_size"]
    spread = None
    weights, adapters = whole, 4 * trained
    gradients = bucket + (part if zero.stage == 2 else adapters)
    if zero.stage == 3:
        small, on_host = settings["stage3_param_persistence_threshold"], zero.offload == "all"
        weights = scales + sum(each.spread(ranks, small, on_host) for each in stored)
        adapters = sum(_Stored(size, 4).spread(ranks, small, on_host) for size in sizes)
        gradients = bucket + 2 * part  # what is added up, and what the optimizer gets
        spread = _Spread(small, (1 if in_4_bits else compute_type.itemsize) * settings["stage3_max_live_parameters"])
    return MemoryEstimate(
        weights=weights,
        adapters=adapters,
        gradients=gradients,
        optimizer=2 * part if zero.offload == "none" else 0,
        activations=unpacked + _activations(model, shape, compute_type, spread),
        trained=trained,
        loading=weights + largest + 4 * trained if zero.stage == 3 else 0,
    )


def _adapted(
    base: PreTrainedModel, lora: LoraOptions, compute_type: torch.dtype, device_type: str, *, in_4_bits: bool
) -> PeftModel:
    """The frozen base model with adapters, as the training has it."""
    if in_4_bits and not lora.dora:
        _hold_in_4_bits(base, compute_type)
    freeze(base, compute_type)
    adapted = add_adapters(base, lora)
    if in_4_bits and device_type == "cuda" and compute_type != torch.float32:
        # Under a GPU's autocast peft hands the input of these layers on as it is; on a CPU it would cast it.
        for module in adapted.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
    return adapted


@dataclass(frozen=True)
class _Stored:
    """A parameter as it lies in memory."""

    numbers: int
    size: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Stored:
        return cls(tensor.numel(), tensor.itemsize)

    @property
    def bytes(self) -> int:
        return self.numbers * self.size

    def spread(self, ranks: int, small: int, on_host: bool) -> int:
        """Bytes on a rank under ZeRO 3: its part, unless in host memory, and all of what is too small to spread."""
        part = -(-self.numbers // ranks) * self.size
        if self.numbers <= small:
            return self.bytes + part
        return 0 if on_host else part


def _bytes_of_scales(weight: Tensor, double: bool) -> int:
    """What a weight in 4 bits needs besides itself; it is never spread."""
    blocks = -(-weight.numel() // _BLOCK)
    tables = 4 * 16 + (4 * 256 + 4 if double else 0)
    scales = blocks + 4 * -(-blocks // _SCALES_BLOCK) if double else 4 * blocks
    return scales + tables


def _hold_in_4_bits(base: PreTrainedModel, compute_type: torch.dtype) -> None:
    """Replaces the linear layers by ones that look to peft, and to a step, like those of a quantised model."""
    import bitsandbytes  # slow to import

    class In4Bits(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]  # of a library that is not checked
        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(compute_type)
            return _UnpackedProduct.apply(x.to(compute_type), self.out_features, bias).to(x.dtype)

    wanted = set(linear_layers(base))
    for name, layer in list(base.named_modules()):
        if layer in wanted:
            own = In4Bits(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                compute_dtype=compute_type,
                quant_type="nf4",
                device="meta",
            )
            base.set_submodule(name, own)
    base.is_loaded_in_4bit = True  # peft asks for it


class _UnpackedProduct(torch.autograd.Function):
    """x [..., in] times a weight in 4 bits, which is unpacked for this product alone, and again backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, bias: Tensor | None) -> Tensor:
        ctx.shape = (width, x.shape[-1])
        return nn.functional.linear(x, _unpacked(ctx.shape, x), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ _unpacked(ctx.shape, gradient), None, None


def _unpacked(shape: tuple[int, int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


class _Spread:
    """Weights that come together where a module begins and part where it ends, as under ZeRO 3."""

    def __init__(self, small: int, ahead: int):
        """small: numbers of the largest weight that is not spread. ahead: bytes that are fetched before their use."""
        self._small, self._ahead = small, ahead
        self._now: Tensor | None = None
        self._layer: list[Tensor] = []  # of a layer that is computed again: there until its backward pass begins

    def follow(self, model: nn.Module) -> None:
        """To be called before the model's tensors are replaced."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        whole = isinstance(model, BaseTunerLayer)  # see `spread_by_layer`
        needed = 0
        for module in model.modules() if whole else (model,):
            for name, parameter in module.named_parameters(recurse=False):
                packed = isinstance(module, nn.Linear) and name == "weight" and hasattr(module, "compute_dtype")
                stored = _Stored(parameter.numel() // 2, 1) if packed else _Stored.of(parameter)
                needed += stored.bytes if stored.numbers > self._small else 0
        if needed:
            model.register_forward_pre_hook(partial(self._begins, needed))
            model.register_forward_hook(partial(self._ends, needed))
        for child in () if whole else model.children():
            self.follow(child)

    def _begins(self, needed: int, *_: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # within the backward pass
            self._layer.append(torch.empty(needed, dtype=torch.uint8))
        else:
            self._fetch(needed)

    def _ends(self, needed: int, module: nn.Module, inputs: Any, output: Any) -> None:
        self._now = None
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(self._goes_back, needed))

    def _goes_back(self, needed: int, gradient: Tensor) -> None:
        self._layer.clear()
        self._fetch(needed)

    def _fetch(self, needed: int) -> None:
        self._now = None
        self._now = torch.empty(max(needed, self._ahead), dtype=torch.uint8)

    def end(self) -> None:
        self._now = None
        self._layer.clear()


def _activations(model: AdaptedModel, shape: Shape, compute_type: torch.dtype, spread: _Spread | None = None) -> int:
    """Bytes of what a forward and backward pass holds at its peak, besides parameters and gradients."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model.train()
    if spread is not None:
        spread.follow(model)
    with FakeTensorMode():
        _give_fake_tensors(model)
        inputs = torch.zeros(shape.sequences, shape.tokens, dtype=torch.long)
        scored = labels = torch.zeros(shape.supervised, dtype=torch.long)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        with live_memory(known) as peak:
            # As in the training, casts of adapters that autocast keeps end with it, before the backward pass.
            with torch.autocast("cpu", dtype=compute_type, enabled=compute_type != torch.float32):
                losses, _ = model(inputs, scored, labels)
                loss = losses.sum()
            del losses
            loss.backward()
        if spread is not None:
            spread.end()
    return peak()


def _give_fake_tensors(model: nn.Module) -> None:
    """Replaces parameters and buffers on the meta device by fake ones of the CPU, where kernels are chosen as usual."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def live_memory(known: list[Tensor]) -> Iterator[Callable[[], int]]:
    """Counts the bytes of tensors made inside the block that live at the same time; yields a function for their peak.

    known: tensors that do not count, whose storages may turn up again as those of views.
    """
    tracker = _LiveMemory(known)
    with tracker:
        yield lambda: tracker.peak


class _LiveMemory(TorchDispatchMode):
    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COPYING:
            self.peak = max(self.peak, self.live + args[0].nbytes)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size: int) -> None:
        self.live -= size
