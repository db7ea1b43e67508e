"""The training loop: from a config and a task to a finished, or resumable, run folder.

The same command starts and resumes. The loop knows no task: a script gives it a model, a batch plan, the summed loss of
a micro-batch and a validation, and every rank calls `train` with the same ones.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from data_prep.files import write_atomically, writing_to
from data_prep.prepared import Prepared
from launch.config import Options, differing_keys, to_yaml
from launch.console import Progress, UserError, format_duration, say
from training.engine import checkpoint as checkpoints
from training.engine.batch_plan import BatchOptions, BatchPlan, MicroBatch
from training.engine.checkpoint import Checkpoint, CheckpointOptions
from training.engine.cluster import Cluster
from training.engine.optim import OptimOptions, build_optimizer, learning_rate
from training.engine.parallel import DataParallel
from training.engine.precision import PrecisionName, choose_precision
from training.engine.session import EXIT_RESUMABLE, StopFlag, write_status
from training.engine.tracking import Record, Window, memory_mb

# This many gradients in a row that are not finite, and the run stops: more steps would not mend it.
SKIPPED_STEPS_LIMIT = 5


class LogOptions(Options):
    """How often to report."""

    every_steps: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    validate_every_steps: int = Field(200, ge=1, description="steps between validations; the last step always has one")


class RunOptions(Options):
    """What every training has; a script adds its own groups. See `_MAY_CHANGE` for what does not define the run."""

    run_dir: Path = Field(description="the run's folder: config, metrics, checkpoints, status, report")
    data: Path = Field(description="prepared data set, made by data_prep")
    seed: int = Field(1234, ge=0, description="fixes initial weights, order of data and dropout")
    precision: PrecisionName = Field("auto", description="auto: bf16 from sm_80 on, fp16 below, fp32 on a CPU")
    batch: BatchOptions = Field(default_factory=BatchOptions)
    optim: OptimOptions = Field(default_factory=OptimOptions)
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    log: LogOptions = Field(default_factory=LogOptions)


# What may change between two sessions of a run. `data` is compared by content, so the folder may have moved.
_MAY_CHANGE = {"run_dir", "data", "checkpoint", "log"}


@dataclass(frozen=True)
class Validation:
    """Scores on held-out data: mean loss per target token (nats) and share of target tokens predicted exactly."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Task:
    """What a script hands to the loop.

    loss(model, samples): the weighted loss summed over a micro-batch, a scalar; its weights add up to the plan's.
    validate(model): held-out scores, computed by all ranks together and equal on each.
    flops_per_token: forward and backward, per real token.
    """

    name: str
    model: nn.Module
    plan: BatchPlan
    loss: Callable[[nn.Module, np.ndarray], Tensor]
    validate: Callable[[nn.Module], Validation]
    flops_per_token: float


def train(config: RunOptions, task: Task, data: Prepared, cluster: Cluster, *, dry_run: bool = False) -> int:
    """Trains to the end, or to the next stop; returns the process's exit status (0 finished, 75 resumable).

    Raises UserError when the run folder holds another run, when the number of ranks does not fit, or when gradients
    stay not finite; status.json then says `failed`.
    """
    _check_world_size(config, cluster)
    precision = choose_precision(config.precision, cluster.device)
    model = task.model.to(cluster.device)
    optimizer = build_optimizer(model, config.optim, task.plan.steps)
    engine = DataParallel(model, optimizer, cluster, precision, config.optim.clip_norm)
    say(f"{cluster}; {precision.name}: {precision.reason}")
    say(describe(config, task, cluster))
    if dry_run:
        return _dry_run(config, task, engine, cluster)

    run = _Run(config, task, data, cluster, engine)
    latest = run.open()
    if latest is not None and latest.step >= task.plan.steps:
        run.write_status("finished", "all steps done")
        say(f"{config.run_dir} is finished: {latest.step:,} steps; to train anew choose another --run_dir")
        return 0
    try:
        return run.session(latest)
    except KeyboardInterrupt:
        run.write_status("resumable", "interrupted twice")
        raise
    except Exception as error:
        run.write_status("failed", str(error) or type(error).__name__)
        raise


def _check_world_size(config: RunOptions, cluster: Cluster) -> None:
    count = config.batch.micro_batches_per_step
    if count % cluster.world_size:
        fitting = [ranks for ranks in range(1, count + 1) if count % ranks == 0]
        raise UserError(
            f"{cluster.world_size} ranks cannot share the {count} micro-batches of a step equally: start with "
            f"{' or '.join(map(str, fitting))} ranks (--nproc-per-node), or in a new run set "
            f"batch.micro_batches_per_step to a multiple of {cluster.world_size}"
        )


def describe(config: RunOptions, task: Task, cluster: Cluster) -> str:
    """The arithmetic of the run: parameters, memory, steps, and what a step consists of."""
    plan = task.plan
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    per_rank = plan.micro_batches_per_step // cluster.world_size
    tokens = int(plan.lengths.sum(dtype=np.int64))
    return (
        f"{task.name}: {parameters / 1e6:.2f} M parameters, {16 * parameters / 1e6:,.0f} MB for weights, gradients and "
        f"AdamW in fp32\n"
        f"{len(plan.lengths):,} samples, {tokens:,} tokens an epoch in {plan.micro_batches_per_epoch:,} micro-batches, "
        f"{plan.padding_share():.1%} padding\n"
        f"a step: {cluster.world_size} ranks x {per_rank} micro-batches, about "
        f"{tokens / plan.micro_batches_per_epoch * plan.micro_batches_per_step:,.0f} tokens; "
        f"{plan.steps:,} steps in {config.optim.epochs:g} epochs"
    )


def _dry_run(config: RunOptions, task: Task, engine: DataParallel, cluster: Cluster) -> int:
    say("\n" + to_yaml(config))
    times = []
    for step in (0, 1):  # the first pass also sets things up; the second is the measure
        began = time.monotonic()
        loss = cluster.sum(_forward_backward(config, task, engine, cluster, step))
        engine.step(learning_rate(step, task.plan.steps, config.optim))
        value = float(loss)
        times.append(time.monotonic() - began)
    whole = format_duration(times[-1] * task.plan.steps)
    say(f"dry run: loss {value:.4f}; a step takes {times[-1]:.2f} s, all {task.plan.steps:,} about {whole}")
    say(f"{memory_mb(cluster.device):,.0f} MB of memory a process; nothing was written")
    return 0


def _forward_backward(config: RunOptions, task: Task, engine: DataParallel, cluster: Cluster, step: int) -> Tensor:
    def seed(batch: MicroBatch) -> None:
        """Dropout depends on the micro-batch, never on the rank or the session that runs it."""
        words = np.random.SeedSequence([config.seed, step, batch.number]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> np.uint64(1)))

    return engine.forward_backward(
        task.plan.share(step, cluster.rank, cluster.world_size),
        task.plan.weight(step),
        lambda model, batch: task.loss(model, batch.samples),
        seed,
    )


class _Run:
    """The run folder and the state of the loop: the step, and the best score so far."""

    def __init__(self, config: RunOptions, task: Task, data: Prepared, cluster: Cluster, engine: DataParallel):
        self.config, self.task, self.data, self.cluster, self.engine = config, task, data, cluster, engine
        self.step = 0
        self.best: dict[str, Any] = {"best_step": None, "best_accuracy": None}

    def open(self) -> Checkpoint | None:
        """Makes the run folder, or checks that it holds this very run, and restores the newest valid checkpoint."""
        # Only one rank verifies; the others learn which checkpoint passed.
        latest = self.cluster.on_first(self._prepare_folder)
        (step,) = self.cluster.maximum([latest.step if latest is not None else -1])
        if step < 0:
            return None
        latest = Checkpoint(Path(self.config.run_dir, "checkpoints", f"step-{int(step):010d}"))
        self._check_same_run(latest)
        latest.load_into(self.engine.model, self.engine.optimizer)
        state = latest.state()
        self.engine.load_state(state)
        self.best = {key: state[key] for key in self.best}
        self.step = latest.step
        say(f"resuming at step {latest.step:,} from {latest.folder}, verified")
        return latest

    def _prepare_folder(self) -> Checkpoint | None:
        """Finds the newest valid checkpoint. A new run's folder gets config, data description and tokenizer instead, so
        that the run can be understood and used without its data."""
        run_dir = self.config.run_dir
        with writing_to(run_dir, option="--run_dir"):
            Path(run_dir, "checkpoints").mkdir(parents=True, exist_ok=True)
            latest = checkpoints.newest_valid(run_dir)
            if latest is None:
                write_atomically(run_dir / "config.yaml", to_yaml(self.config))
                write_atomically(run_dir / "data.json", (self.data.folder / "meta.json").read_bytes())
                shutil.copytree(self.data.folder / "tokenizer", run_dir / "tokenizer", dirs_exist_ok=True)
        return latest

    def write_status(self, status: Literal["running", "finished", "resumable", "failed"], reason: str) -> None:
        """status.json, by one rank; on a full disk the status is lost, not the error that led to it."""
        if self.cluster.is_first:
            with contextlib.suppress(OSError):
                steps = self.task.plan.steps
                write_status(self.config.run_dir, status, reason, step=self.step, steps=steps, **self.best)

    def _about(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "config": self.config.model_dump(mode="json"),
            "data": {
                "fingerprint": self.data.fingerprint,
                "source_tokenizer": self.data.source_tokenizer.sha256,
                "target_tokenizer": self.data.target_tokenizer.sha256,
            },
            "versions": {name: version(name) for name in ("torch", "numpy", "safetensors")},
        }

    def _check_same_run(self, latest: Checkpoint) -> None:
        def definition(about: dict[str, Any]) -> dict[str, Any]:
            config = {key: value for key, value in about["config"].items() if key not in _MAY_CHANGE}
            return {"task": about["task"], **config, "data": about["data"]}

        differences = differing_keys(definition(latest.manifest), definition(self._about()))
        if differences:
            raise UserError(
                f"{self.config.run_dir} holds a run with another definition ({'; '.join(differences)}): "
                "restore these keys to continue it, or choose another --run_dir; nothing was changed"
            )

    def session(self, latest: Checkpoint | None) -> int:
        """Steps until the end or a stop; every way out leaves a checkpoint of the last step and a status."""
        config, plan, cluster = self.config, self.task.plan, self.cluster
        stop = StopFlag(config.run_dir, cluster)
        record = Record(config.run_dir, resumed_step=self.step) if cluster.is_first else None
        saved_step = latest.step if latest is not None else None
        window = Window(plan)
        reason, speed = None, ""
        self.write_status("running", "training")
        with Progress("training", plan.steps, "steps", start=self.step) as progress:
            while self.step < plan.steps:
                reason = stop.agreed(self.step)
                if reason is not None:
                    break
                loss = _forward_backward(config, self.task, self.engine, cluster, self.step)
                lr = learning_rate(self.step, plan.steps, config.optim)
                norm = self.engine.step(lr)
                window.add(self.step, loss)
                self.step += 1
                done = self.step == plan.steps
                if done or self.step % config.log.every_steps == 0:
                    speed = self._report(window, record, lr, norm)
                progress.advance(note=speed)
                with window.paused():
                    is_best = False
                    if done or self.step % config.log.validate_every_steps == 0:
                        is_best = self._validate(record)
                    if done or is_best or self.step % config.checkpoint.every_steps == 0:
                        self._save()
                        saved_step = self.step
        if reason is not None and saved_step != self.step:
            self._save()
        stop.clear()
        if record is not None:
            record.close()
        return self._end(reason)

    def _report(self, window: Window, record: Record | None, lr: float, norm: Tensor) -> str:
        """Closes the window: writes its line, and returns what the progress line says about it.

        Raises UserError on every rank alike when too many gradients in a row were not finite.
        """
        figures = window.close(self.cluster)
        skipped = int(self.engine.skipped_in_a_row)
        if record is not None:
            record.write(
                "train",
                self.step,
                epoch=round(self.task.plan.epoch(self.step), 4),
                **asdict(figures),
                lr=lr,
                grad_norm=float(norm),
                skipped_in_a_row=skipped,
                flops_per_s=round(figures.tokens_per_s * self.task.flops_per_token),
                memory_mb=round(memory_mb(self.cluster.device), 1),
            )
        if skipped >= SKIPPED_STEPS_LIMIT:
            raise UserError(
                f"the gradients of {skipped} steps in a row were not finite (step {self.step}): lower optim.lr, "
                "or try --precision fp32; the checkpoints before stand"
            )
        return f"loss {figures.loss:.3f} · {figures.tokens_per_s:,.0f} tokens/s"

    def _validate(self, record: Record | None) -> bool:
        """Scores the model on held-out data and records it; true if it is the best so far."""
        result = self.task.validate(self.engine.model)
        # Accuracy picks the best checkpoint: late in training the loss rises with over-confidence while translations
        # still improve.
        is_best = self.best["best_accuracy"] is None or result.accuracy > self.best["best_accuracy"]
        if is_best:
            self.best = {"best_step": self.step, "best_accuracy": result.accuracy}
        if record is not None:
            record.write("validation", self.step, loss=result.loss, accuracy=result.accuracy)
        say(
            f"step {self.step:,}/{self.task.plan.steps:,}: validation loss {result.loss:.4f}, "
            f"token accuracy {result.accuracy:.2%}" + (" (best)" if is_best else "")
        )
        return is_best

    def _save(self) -> None:
        self.cluster.on_first(
            lambda: checkpoints.save(
                self.config.run_dir,
                self.step,
                model=self.engine.model,
                optimizer=self.engine.optimizer,
                state={**self.engine.state(), **self.best},
                about=self._about(),
                keep=self.config.checkpoint.keep,
            )
        )

    def _end(self, reason: str | None) -> int:
        steps = self.task.plan.steps
        self.write_status("finished" if reason is None else "resumable", reason or "all steps done")
        if reason is None:
            say(f"finished: {steps:,} steps, the best at step {self.best['best_step']:,}; see {self.config.run_dir}")
            return 0
        say(f"stopped by {reason} at step {self.step:,} of {steps:,}; the same command continues from there")
        # A launcher takes any other status for a failure and cannot pass it on; status.json is what counts there.
        return 0 if self.cluster.ranks.launched else EXIT_RESUMABLE
