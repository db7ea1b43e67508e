"""ZeRO (Rajbhandari et al. 2020) by DeepSpeed: each rank holds a part of what all would otherwise hold whole.

Stage 1 spreads the optimizer's state, stage 2 the gradients too, stage 3 the weights too; what remains can be kept in
host memory. DeepSpeed moves the data and takes the step. The rest is as without it: weights are fp32 and forward passes
run under autocast, the loss is weighted by tokens, and a checkpoint holds whole tensors by name. So the curve is that
of DDP up to the order of sums, and a run may go on with another stage, on another number of ranks, or without
DeepSpeed, whose own files are pickles that are bound to stage and ranks.

DeepSpeed's bf16 and fp16 modes are not used, since they keep rounded weights beside the exact ones; nor is its autocast
mode, which in fp16 (0.19.8) clips scaled gradients and lets every rank decide alone whether to skip a step.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from training.base.console import UserError, leave_at_once
from training.base.options import Options
from training.engine.checkpoint import EMA, MODEL, Checkpoint, Tensors, check_shapes, load_model_state, model_state
from training.engine.cluster import Cluster
from training.engine.optim import OptimOptions
from training.engine.parallel import Parallel
from training.engine.precision import Precision

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Gradients travel in pieces of so many numbers: DeepSpeed's own default takes 2 GB for one.
_BUCKET = 50_000_000

# Weights of up to so many numbers are not spread: DeepSpeed's own default.
_PERSISTENT = 100_000

WEIGHTS, MOMENTS = "weights", ("exp_avg", "exp_avg_sq")


class ZeroOptions(Options):
    """What DeepSpeed spreads over the ranks, with `parallel: deepspeed`."""

    stage: int = Field(2, ge=1, le=3, description="1 spreads the optimizer's state, 2 gradients too, 3 weights too")
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="what to keep in host memory: the optimizer's state, or (stage 3) the weights too"
    )


@dataclass(frozen=True)
class _Piece:
    """A rank's part of a parameter: `count` numbers from `start` on, which lie in the flat tensor `flat` at `place`."""

    start: int
    count: int
    flat: int
    place: int


def deepspeed_config(
    options: ZeroOptions, clip_norm: float | None, numbers: int, device: str, *, frozen: bool = False
) -> dict[str, Any]:
    """DeepSpeed's settings. numbers: how many the model trains. device: `cuda` or `cpu`. frozen: whether it has frozen
    weights besides, far more of them.
    """
    bucket = min(_BUCKET, max(1, numbers))
    offload = {"device": "cpu", "pin_memory": device == "cuda"}
    zero: dict[str, Any] = {
        "stage": options.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 2 * bucket,
        **({"offload_optimizer": {**offload}} if options.offload != "none" else {}),
        **({"offload_param": {**offload}} if options.offload == "all" else {}),
    }
    if options.stage == 3:
        # The memory-saving linear layer replaces torch's own for the whole process, and knows no autocast of others.
        zero |= {"memory_efficient_linear": False, "stage3_prefetch_bucket_size": bucket}
        zero |= {"stage3_max_live_parameters": 2 * _BUCKET, "stage3_max_reuse_distance": 2 * _BUCKET}
        if frozen:
            # Weights are gathered ahead of their use one at a time: gathered together, each would be there twice for a
            # moment, the head too. None is kept for its next use, since saving that memory is the point.
            zero |= {"stage3_max_live_parameters": 2 * bucket, "stage3_max_reuse_distance": 0}
            zero |= {"stage3_allgather_sequential": True, "stage3_prefetch_bucket_size": 1}
            # Smaller ones stay whole on every rank: fetching them would cost more than it saves.
            zero |= {"stage3_param_persistence_threshold": _PERSISTENT}
    return {
        # Required, but without a meaning here: the plan makes the batches, and the loss is a sum.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": zero,
        # torch's fused AdamW, which compiles nothing at the first start, even where the state is in host memory.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def conflict(options: ZeroOptions, optim: OptimOptions) -> str | None:
    """Why these do not go together, and what to take instead; None where they do."""
    if options.offload == "all" and options.stage < 3:
        return (
            f"zero.offload all needs zero.stage 3: in stage {options.stage} every rank computes with all weights, so "
            "they cannot stay in host memory; take --zero.offload optimizer, or --zero.stage 3"
        )
    if optim.ema_decay is not None and options.stage == 3:
        return (
            "optim.ema_decay would keep a second, whole copy of the weights on every rank, which zero.stage 3 is there "
            "to avoid: leave it out, or take --zero.stage 2"
        )
    if optim.kind == "muon":
        return (
            "optim.kind muon needs the whole gradient of a matrix, and ZeRO gives a rank a part that ends anywhere in "
            "it: take --optim.kind adamw, or --parallel ddp"
        )
    if optim.kind != "adamw":
        return (
            f"optim.kind {optim.kind} scales its state in blocks, which under ZeRO would run across the bounds of "
            "parameters and ranks, and could not be taken up on another number of them: take --optim.kind adamw, whose "
            "state ZeRO divides among the ranks"
        )
    return None


def state_bytes(options: ZeroOptions, ranks: int) -> float:
    """Bytes that a rank holds for each trained number on its device: weight, gradient, two moments, all fp32."""
    weight = 4 / ranks if options.stage == 3 else 4
    gradient = 4 / ranks if options.stage >= 2 else 4
    moments = 8 / ranks if options.offload == "none" else 0
    return (0 if options.offload == "all" else weight) + gradient + moments


class Zero(Parallel):
    """See the module's docstring for what it promises."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        cluster: Cluster,
        precision: Precision,
        clip_norm: float | None,
        ema_decay: float | None,
        options: ZeroOptions,
    ):
        super().__init__(model, cluster, precision, ema_decay)
        self.optimizer, self._options = optimizer, options
        # Ranks take part in every forward pass together, and none may have more of them.
        self.in_step = options.stage == 3
        # Taken now: stage 3 leaves empty tensors in the model.
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._shapes = {name: tensor.shape for name, tensor in model_state(model).items()}
        self._trained = {name: p.shape for p, name in self._names.items() if p.requires_grad}
        numbers = sum(shape.numel() for shape in self._trained.values())
        self.derived_config = deepspeed_config(
            options, clip_norm, numbers, cluster.device.type, frozen=len(self._trained) < len(self._names)
        )
        self._engine = _initialize(_CallersAutocast(model), optimizer, self.derived_config, cluster)
        # Calls go through DeepSpeed in validations too: in stage 3 it brings the weights together.
        self.model = self.replica = self._engine
        self._own = self._engine.optimizer
        if options.stage == 3:
            from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

            self._in_progress: list[nn.Module] = FWD_MODULE_STACK
        if options.offload == "none":
            self._share_memory()
        self._pieces = self._own_pieces()
        self._layout = cluster.gather(self._pieces, dict[str, _Piece])
        if self._scaler is not None:
            # All that the scaler gets to know is whether the gradient is finite: DeepSpeed does the arithmetic.
            self._probe = nn.Parameter(torch.zeros((), device=cluster.device))
            self._probe_optimizer = torch.optim.SGD([self._probe], lr=0.0)
            self._scaler.scale(self._probe.detach())  # makes its state
            self._own.override_loss_scale(self._scaler.get_scale())

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if self.in_step:
            # DeepSpeed's list of modules in progress. Where a layer is computed again, that ends as soon as nothing is
            # missing, and the modules then in progress would stay on the list for ever.
            del self._in_progress[1:]

    def step(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        # It skips a gradient that is not finite, on all ranks.
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self._cluster.device, dtype=torch.float32)
        bad = torch.tensor(float(self._own.overflow), device=self._cluster.device)
        scaler_skip = self._scaler_searches()
        if self._scaler is not None:
            self._probe.grad = torch.where(bad > 0, torch.inf, 0.0)
            self._scaler.unscale_(self._probe_optimizer)
            self._scaler.step(self._probe_optimizer)
            self._scaler.update()
            self._own.override_loss_scale(self._scaler.get_scale())
        self._stepped(bad, scaler_skip)
        return norm

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        steps = self._steps()
        optimizer = {f"step/{name}": steps.clone() for name in self._trained} if steps is not None else {}
        for kind in MOMENTS if steps is not None else ():
            optimizer |= {f"{kind}/{name}": tensor for name, tensor in self._gathered(kind).items()}
        model = model_state(self._plain)
        if self._options.stage == 3:
            model |= self._gathered(WEIGHTS)
        if not self._cluster.is_first:
            return {}
        tensors = {MODEL: model, "optimizer.safetensors": optimizer}
        if self.ema is not None:
            tensors[EMA] = model_state(self.ema)
        return tensors

    def begin_with(self, weights: Tensors) -> None:
        self._set_weights(weights)
        if self._options.stage == 3:
            self._weights_have_changed()
        if self.ema is not None:
            load_model_state(self.ema, weights)

    def _set_weights(self, weights: Tensors) -> None:
        check_shapes(self._shapes, weights)
        if self._options.stage == 3:
            own = self._plain.state_dict()
            for name in weights.keys() - self._trained.keys():  # buffers, which are not spread
                own[name].copy_(weights[name])
        else:
            load_model_state(self._plain, weights)
        for name in self._trained:
            self._set(WEIGHTS, name, weights[name])

    def load(self, checkpoint: Checkpoint) -> None:
        self._set_weights(checkpoint.model_state())
        for flat in self._flats():
            self.optimizer.state[flat] = {kind: torch.zeros_like(flat) for kind in MOMENTS}
        steps = None  # the same for all
        for kind, name, tensor in checkpoint.optimizer_tensors():
            if kind == "step":
                steps = tensor
            else:
                self._set(kind, name, tensor)
        for flat in self._flats():
            if steps is None:  # a checkpoint of before the first one
                del self.optimizer.state[flat]
            else:
                self.optimizer.state[flat]["step"] = steps.to(flat.device, copy=True)
        if self._options.stage == 3:
            self._weights_have_changed()
        if self._ema is not None:
            load_model_state(self._ema.module, checkpoint.ema_state())
        self._load_state(checkpoint)
        if self._scaler is not None:
            self._own.override_loss_scale(self._scaler.get_scale())

    # Where the parts lie. DeepSpeed keeps a rank's part of all parameters of a group in one flat tensor, for which the
    # optimizer has the state; only stage 3 has a public way to it.

    def _flats(self) -> list[Tensor]:
        own = self._own
        stage_3 = self._options.stage == 3
        flats: list[Tensor] = own.fp32_partitioned_groups_flat if stage_3 else own.single_partition_of_fp32_groups
        return flats

    def _share_memory(self) -> None:
        """Lets the optimizer work on the rank's part of the weights itself, not on a copy of it.

        The copy is there for weights in 16 bits. Stage 3 would leave it out, but (0.19.8) compares the device with its
        name, which never are the same.
        """
        own, rank = self._own, self._cluster.rank
        if self._options.stage == 3:
            parts = own.fp16_partitioned_groups_flat
        else:
            parts = [group[rank] for group in own.parallel_partitioned_bit16_groups]
        for flat, part in zip(self._flats(), parts, strict=True):
            flat.data = part.data
        if self._options.stage < 3:
            own._link_all_hp_params()

    def _own_pieces(self) -> dict[str, _Piece]:
        """This rank's part of every trained parameter of which it has one, by name."""
        pieces = {}
        own = self._own
        if self._options.stage == 3:
            for parameter, name in self._names.items():
                if parameter.requires_grad:
                    flat, place, size = own.grad_position[own.get_param_id(parameter)]
                    start = self._cluster.rank * size
                    # The last ranks' parts are filled up.
                    count = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]  # DeepSpeed's
                    if count > 0:
                        pieces[name] = _Piece(start, count, flat, place)
            return pieces
        for flat, group in enumerate(own.bit16_groups):
            for parameter in group:
                here = parameter._hp_mapping
                if here is not None:
                    lies, begins = here.hp_fragment_address, here.lp_fragment_address
                    pieces[self._names[parameter]] = _Piece(begins.start, begins.numel, flat, lies.start)
        return pieces

    def _part(self, kind: str, piece: _Piece) -> Tensor:
        flat = self._flats()[piece.flat]
        whole = flat if kind == WEIGHTS else self.optimizer.state[flat][kind]
        return whole.detach().narrow(0, piece.place, piece.count)

    def _steps(self) -> Tensor | None:
        """How many steps the optimizer has taken; None before the first, when it has no state."""
        state = next((self.optimizer.state[flat] for flat in self._flats() if self.optimizer.state.get(flat)), None)
        return None if state is None else state["step"].detach().cpu()

    def _gathered(self, kind: str) -> dict[str, Tensor]:
        """The trained parameters' weights or moments, whole, in the first rank's host memory; nothing on the others."""
        longest = max(sum(piece.count for piece in pieces.values()) for pieces in self._layout)
        packed = torch.zeros(longest)
        used = 0
        for piece in self._pieces.values():
            packed[used : used + piece.count] = self._part(kind, piece)
            used += piece.count
        received = self._cluster.gather_tensors(packed)
        if not received:
            return {}
        found = {name: torch.empty(shape.numel()) for name, shape in self._trained.items()}
        for pieces, tensor in zip(self._layout, received, strict=True):
            used = 0
            for name, piece in pieces.items():
                found[name][piece.start : piece.start + piece.count] = tensor[used : used + piece.count]
                used += piece.count
        return {name: tensor.view(self._trained[name]) for name, tensor in found.items()}

    def _set(self, kind: str, name: str, whole: Tensor) -> None:
        """Takes this rank's part of a whole tensor."""
        piece = self._pieces.get(name)
        if piece is not None:
            self._part(kind, piece).copy_(whole.flatten()[piece.start : piece.start + piece.count])

    def _weights_have_changed(self) -> None:
        """Stage 3: brings the parts that forward passes gather up to date with what the optimizer works on."""
        own = self._own
        for group in range(len(own.fp16_groups)):
            own._reassign_or_swap_out_partitioned_parameters(group)
        if own.persistent_parameters:  # small ones, which every rank holds whole
            own.persistent_parameters[0].partition(own.persistent_parameters)
            own.persistent_parameters[0].all_gather(own.persistent_parameters)


class _CallersAutocast(nn.Module):
    """Runs a model under the autocast that the caller has: DeepSpeed turns it off around the model that it is given."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._type = next(model.parameters()).device.type
        self._state: tuple[bool, torch.dtype] = (False, torch.float32)

    def remember(self, *_: Any) -> None:
        """To be called before DeepSpeed is."""
        self._state = (torch.is_autocast_enabled(self._type), torch.get_autocast_dtype(self._type))

    def forward(self, *inputs: Any) -> Any:
        enabled, dtype = self._state
        with torch.autocast(self._type, dtype=dtype, enabled=enabled):
            return self.model(*inputs)


class Spreading:
    """Spreads frozen weights over the ranks as stage 3 does, one by one and before there is an engine.

    So a rank never has a model whole that is loaded through it. Every rank hands over the same weights in the same
    order.
    """

    def __init__(self, options: ZeroOptions, cluster: Cluster):
        config = deepspeed_config(options, None, 1, cluster.device.type, frozen=True)
        self._zero = _deepspeed(cluster).zero.Init(config_dict_or_path=config, dtype=torch.float32)

    def take(self, weight: nn.Parameter) -> None:
        """Leaves this rank's part of a weight, with what brings it together again."""
        own: Any = weight.requires_grad_(False)
        # By DeepSpeed's own way to here the first rank would send it to all others, who have read the same. What lies
        # in a mapped file would then be written to, and take memory on each of them.
        self._zero._convert_to_deepspeed_param(own)
        own.partition()

    @contextmanager
    def brought_together(self, model: nn.Module) -> Iterator[None]:
        """Inside, forward passes of all ranks together have each module's own weights while it computes."""
        handles = []
        for module in model.modules():
            own: list[Any] = [each for each in module.parameters(recurse=False) if hasattr(each, "ds_id")]
            if own:
                handles.append(module.register_forward_pre_hook(partial(_bring, own)))
                handles.append(module.register_forward_hook(partial(_part_again, own)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _bring(own: list[Any], *_: Any) -> None:
    own[0].all_gather(param_list=own)


def _part_again(own: list[Any], *_: Any) -> None:
    own[0].partition(param_list=own)


def _deepspeed(cluster: Cluster) -> Any:
    """The library, set up for this process; raises UserError where it is missing."""
    on_cpu = cluster.device.type == "cpu"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(f"parallel deepspeed needs the package ({error}): pip install deepspeed") from error
    # What it leaves behind aborts a process now and then that is done and only has to go; torchrun takes that for a
    # failure of the run.
    leave_at_once()
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # it warns of what is done on purpose here
    # It uses the old names, which every torch that this runs on still knows.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
    if on_cpu:
        # Else it would compile, for a minute, a library of its own for sums over ranks that is no faster than gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # a single process
        dist.init_process_group("gloo" if on_cpu else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", str(cluster.ranks.local_rank))  # it insists on it, in a plain process too
    return deepspeed


def _initialize(
    model: _CallersAutocast, optimizer: torch.optim.Optimizer, config: dict[str, Any], cluster: Cluster
) -> DeepSpeedEngine:
    deepspeed = _deepspeed(cluster)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    for group in list(distributed_c10d._world.pg_map):  # its own would wait for torch's default time, in a pause too
        distributed_c10d._set_pg_timeout(cluster.timeout, group)
    engine.register_forward_pre_hook(model.remember)
    return engine
