"""Data-parallel training of one model: the small interface between the loop and whatever brings the ranks together."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.engine.checkpoint import Checkpoint, EngineState, Tensors, load_model_state, tensors_of
from training.engine.cluster import Cluster
from training.engine.precision import Precision


class Parallel(ABC):
    """A strategy, as the loop uses it. Every method is called by all ranks together."""

    derived_config: dict[str, Any] | None = None  # the settings of the library in use, if any
    in_step = False  # whether the ranks must call the model equally often, in validations too

    def __init__(self, model: nn.Module, cluster: Cluster, precision: Precision, ema_decay: float | None):
        self._cluster, self._precision = cluster, precision
        self._plain = model
        self.replica: nn.Module = model  # as a step calls it
        self.model: nn.Module = model  # as a validation calls it
        # Every rank averages the same weights, so all averages are the same.
        self._ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)) if ema_decay else None
        self._scaler = precision.scaler()
        # How many of the last steps were left out because their gradient was not finite: a scalar on the device.
        self.skipped_in_a_row = torch.zeros((), device=cluster.device)

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Around both passes of a micro-batch. last: of the step, on this rank."""

    def autocast(self) -> AbstractContextManager[object]:
        """Around a forward pass."""
        return self._precision.autocast()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the step's, which is the sum over all micro-batches of all ranks."""
        self._backward(loss * self._cluster.world_size)  # both DDP and DeepSpeed average over ranks

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """The backward pass, its loss scaled where there is a scaler."""

    @abstractmethod
    def step(self, lr: float) -> Tensor:
        """Clips and applies the gradient; returns its norm before clipping, a scalar on the device.

        A gradient that is not finite is skipped on every rank alike.
        """

    @abstractmethod
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file and name, whole; only the first rank is sure to get it."""

    @abstractmethod
    def load(self, checkpoint: Checkpoint) -> None:
        """Takes back what `tensors` and `state` gave, from whatever strategy and number of ranks it came."""

    @abstractmethod
    def begin_with(self, weights: Tensors) -> None:
        """Takes the model's weights, whole, before the first step. Raises UserError where they are another model's."""

    def state(self) -> EngineState:
        """What a checkpoint needs besides tensors."""
        return {"scaler": self._scaler.state_dict() if self._scaler is not None else None}

    @property
    def ema(self) -> nn.Module | None:
        """The exponential moving average of the model over its steps: the same module, averaged; None if not wanted."""
        return None if self._ema is None else self._ema.module

    def _scaler_searches(self) -> bool:
        """Whether an overflow of this step is the scaler's own: above 1 it searches its range, at first by design."""
        return self._scaler is not None and self._scaler.get_scale() > 1

    def _stepped(self, bad: Tensor, scaler_skip: bool) -> None:
        """What follows a step. bad: 1 if the gradient was not finite, else 0. scaler_skip: see `_scaler_searches`."""
        self.skipped_in_a_row = torch.zeros_like(bad) if scaler_skip else (self.skipped_in_a_row + 1) * bad
        if self._ema is not None:
            self._ema.update_parameters(self._plain)

    def _load_state(self, checkpoint: Checkpoint) -> None:
        """What goes with the tensors of a checkpoint."""
        if self._ema is not None:
            self._ema.n_averaged.fill_(checkpoint.step)  # at 0 it would begin anew
        scaler = checkpoint.state()["scaler"]
        # A scaler starts afresh where the earlier session had none.
        if self._scaler is not None and scaler:
            self._scaler.load_state_dict(scaler)


class DataParallel(Parallel):
    """A replica of the model on every rank; gradients are added up once a step, during the last backward pass."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        cluster: Cluster,
        precision: Precision,
        clip_norm: float | None,
        ema_decay: float | None = None,
    ):
        super().__init__(model, cluster, precision, ema_decay)
        self.optimizer, self._clip_norm = optimizer, clip_norm
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if cluster.world_size > 1:
            # DDP regroups its buckets after the first backward pass of a process. From three ranks on that changes the
            # order of the sums, so the first step after a resume would differ in its last bits. With this flag it keeps
            # them. Two ranks do not need it, since a + b = b + a.
            fixed_buckets = cluster.world_size > 2
            if fixed_buckets:
                warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
            # The argument that replaces it is not in every torch that this runs on.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            device_ids = [cluster.device.index] if cluster.device.type == "cuda" else None
            self.replica = DistributedDataParallel(
                model,
                device_ids=device_ids,
                gradient_as_bucket_view=True,
                find_unused_parameters=fixed_buckets,
                broadcast_buffers=False,  # buffers are constants here (tables of positions), equal from the start
            )

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        # The forward pass must be inside no_sync as well: DDP decides there whether this backward communicates.
        if isinstance(self.replica, DistributedDataParallel) and not last:
            return self.replica.no_sync()
        return contextlib.nullcontext()

    def _backward(self, loss: Tensor) -> None:
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def step(self, lr: float) -> Tensor:
        """See `Parallel`. All ranks hold the same sum, so all or none skip. With AdamW nothing waits for the device."""
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)  # before clipping: the threshold is for true gradients
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        bad, scaler_skip = (~norm.isfinite()).float(), self._scaler_searches()
        if self._scaler is None:
            if isinstance(self.optimizer, torch.optim.AdamW):
                # The fused optimizer then skips on the device, as under a scaler.
                self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # what a scaler would set
                self.optimizer.step()
            elif not bad:  # other optimizers cannot skip by themselves; asking waits for the device
                self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._stepped(bad, scaler_skip)
        return norm

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """See `Parallel`. Nothing is copied."""
        if self._cluster.device.type == "cuda" and not isinstance(self.optimizer, torch.optim.AdamW):
            # A paged optimizer's state lies in memory that the host can read before the GPU is done with it.
            torch.cuda.synchronize()
        return tensors_of(self.model, self.optimizer, self.ema)

    def begin_with(self, weights: Tensors) -> None:
        load_model_state(self.model, weights)
        if self.ema is not None:
            load_model_state(self.ema, weights)

    def load(self, checkpoint: Checkpoint) -> None:
        checkpoint.load_into(self.model, self.optimizer, self.ema)
        self._load_state(checkpoint)
