"""What a training script gives to the loop: the options of a run, and the task itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from training.base.options import DurationWithUnit, Options
from training.engine.batch_plan import BatchOptions, BatchPlan
from training.engine.generating import GeneratedScores
from training.engine.generating import OwnPart as OwnPart
from training.engine.optim import OptimOptions
from training.engine.precision import PrecisionName
from training.engine.saver import CheckpointOptions
from training.engine.stopping import SessionOptions
from training.engine.wandb.tracker import WandbOptions
from training.engine.zero import ZeroOptions, conflict


class LogOptions(Options):
    """How often to report."""

    every_steps: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    validate_every_steps: int = Field(200, ge=1, description="steps between validations; the last step always has one")
    generate_samples: int | None = Field(
        None,
        ge=0,
        description="held-out samples that are answered and scored at each validation; null: 200 for translators (none "
        "in zero.stage 3), none for QLoRA",
    )
    tensorboard: bool = Field(False, description="show the lines in TensorBoard, too: tensorboard --logdir RUN")


class RunOptions(Options):
    """What every training has; a script adds its own groups, and to `may_change` what of them does not define a run."""

    # Keys that may change between two sessions of a run. `data` is compared by content, so the folder may have moved.
    may_change: ClassVar[frozenset[str]] = frozenset(
        {
            *("run_dir", "run_at", "data", "training", "deterministic", "parallel", "zero", "private", "resume_from"),
            *("init_from", "checkpoint", "log", "session", "wandb"),
        }
    )

    run_dir: Path = Field(description="the run's folder: config, metrics, checkpoints, status, report")
    data: Path = Field(description="prepared data set, made by data_prep")
    training: str | None = Field(
        None, description="the module that a config file is for; null: training.NAME for configs/NAME/..."
    )
    budget: DurationWithUnit | None = Field(
        None,
        gt=0,
        description="how long the run may take in all (40m): its length and what goes with that is then measured and "
        "chosen, once, where the command line does not say it; null: as the options are",
    )
    seed: int = Field(1234, ge=0, lt=2**63, description="fixes initial weights, order of data and dropout")
    precision: PrecisionName = Field("auto", description="auto: bf16 from sm_80 on, fp16 below, fp32 on a CPU")
    deterministic: bool = Field(
        False, description="on a GPU, only kernels that give the same bits every time (slower); a CPU does so anyway"
    )
    parallel: Literal["ddp", "deepspeed"] = Field(
        "ddp", description="ddp: all of the model on every rank; deepspeed: ZeRO, which spreads it over them"
    )
    private: bool = Field(
        False, description="what the run leaves is for this user alone (0600, folders 0700), whatever the umask is"
    )
    run_at: str | None = Field(
        None,
        description="URL (s3://, sftp://, file:// and others) where the run lives: each session goes on from what is "
        "there, and sends its checkpoints there; see docs/addresses.md",
    )
    resume_from: Path | None = Field(
        None, description="a run folder, read-only perhaps, to continue in run_dir where it has come further"
    )
    init_from: str | None = Field(
        None,
        description="RUN[:best|last|step-N|best:N|last:N|ema], whose weights a new run begins with; all else is new",
    )
    batch: BatchOptions = Field(default_factory=BatchOptions)
    optim: OptimOptions = Field(default_factory=OptimOptions)
    zero: ZeroOptions = Field(default_factory=ZeroOptions)
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    log: LogOptions = Field(default_factory=LogOptions)
    session: SessionOptions = Field(default_factory=SessionOptions)
    wandb: WandbOptions = Field(default_factory=WandbOptions)

    @model_validator(mode="after")
    def _fits_zero(self) -> RunOptions:
        problem = conflict(self.zero, self.optim) if self.parallel == "deepspeed" else None
        if problem is not None:
            raise ValueError(problem)
        if self.spreads_weights and self.log.generate_samples:
            raise ValueError(
                "log.generate_samples does not go with zero.stage 3, where the ranks bring the weights of a layer "
                "together at every call: answers of different length would keep them waiting for ever; leave it out, "
                "or take --zero.stage 2"
            )
        return self

    @model_validator(mode="after")
    def _has_plain_address(self) -> RunOptions:
        if self.run_at is None:
            return self
        # The value is in neither message: it may be a secret.
        scheme, _, rest = self.run_at.partition("://")
        if not scheme.isalnum() or not rest or set(rest) & set("?#"):
            raise ValueError("run_at: expected a URL without a query, such as s3://BUCKET/RUN or file:///mnt/drive/RUN")
        if ":" in rest.partition("/")[0].rpartition("@")[0]:
            raise ValueError("run_at: no password in the URL, which the run would keep; see docs/addresses.md")
        return self

    @property
    def spreads_weights(self) -> bool:
        """Whether the weights themselves are spread over the ranks, so that all must call the model equally often."""
        return self.parallel == "deepspeed" and self.zero.stage == 3

    def samples_to_generate(self, usual: int) -> int:
        """`log.generate_samples`; where that is left open `usual`, if the ranks can do without each other."""
        chosen = self.log.generate_samples
        return chosen if chosen is not None else 0 if self.spreads_weights else usual


@dataclass(frozen=True)
class Validation:
    """Scores on held-out data: mean loss per target token (nats) and share of target tokens predicted exactly."""

    loss: float
    accuracy: float
    by_source: Mapping[str, float] = field(default_factory=dict)  # the loss of each source of a mixture

    @property
    def scores(self) -> dict[str, float]:
        """All of them, by name."""
        of_sources = {f"loss/{name}": loss for name, loss in self.by_source.items()}
        return {"loss": self.loss, "accuracy": self.accuracy, **of_sources}


class Task(ABC):
    """What a script hands to the loop: a model, the order of its samples, and what it is to learn from them."""

    name: str
    model: nn.Module
    plan: BatchPlan
    flops_per_token: float  # forward and backward, per real token
    memory: str | None = None  # what a process needs, in words
    built_on: Mapping[str, Any] = {}  # what the run depends on besides data and config: another one is another run
    libraries: tuple[str, ...] = ()  # whose versions go into the manifest
    generated: tuple[str, ...] = ()  # names of the scores that `generate` gives; () where the task has none
    samples: int = 0  # how many held-out samples it answers for them
    calls_vary = False  # whether the number of calls of a layer depends on the batch, as with one call a word

    @abstractmethod
    def loss(self, model: nn.Module, samples: np.ndarray) -> Tensor:
        """The weighted loss summed over a micro-batch, a scalar with gradient; its weights add up to the plan's."""

    @abstractmethod
    def validate(self, model: nn.Module, own_part: OwnPart) -> Validation:
        """Held-out scores, computed by all ranks together and equal on each.

        own_part(batches): this rank's part of a list of batches. Raises `Stopped` when the ranks have agreed on a stop.
        """

    def generate(self, own_part: OwnPart) -> GeneratedScores:
        """Scores of what `self.model`, in evaluation mode, answers to held-out samples; the rest as in `validate`."""
        raise NotImplementedError(f"{self.name} names no scores in `generated`")

    def show(self, run_dir: Path) -> None:
        """Makes the run's page anew from what lies in its folder. Called by one rank, behind the steps."""
        return None

    def read_foreign(self, folder: Path) -> dict[str, Tensor] | None:
        """The weights in a folder that is no run's, by the model's own names; None where it holds none for this task.

        Raises UserError where they are another model's.
        """
        return None
