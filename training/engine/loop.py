"""The training loop: from a config and a task to a finished, or resumable, run folder.

The same command starts and resumes. All that the loop knows of the task is its model, its batch plan, the loss of a
micro-batch and a validation; every rank calls `train` with the same one. A run alternates between steps and the
boundaries behind them: only at a boundary does the loop report, validate and save, and only there does a session end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from training.base.console import UserError, counted, say, warn
from training.base.durations import format_duration
from training.base.environment import process_age_s
from training.base.files import writing_to
from training.base.options import to_yaml
from training.base.progress import Progress
from training.engine.batch_plan import in_rounds
from training.engine.checkpoint import Checkpoint, MeasuredInterval, RunState, best, model_state
from training.engine.cluster import Cluster, means_lost_peer, peer_error
from training.engine.generating import GeneratedScores
from training.engine.goodput import Clock
from training.engine.logbook import INTERRUPTED, FirstRanksLogbook, Logbook, shown_config
from training.engine.metrics import Window, memory_mb, read_metrics
from training.engine.optim import Course, build_optimizer, learning_rate, optimizer_bytes
from training.engine.parallel import DataParallel, Parallel
from training.engine.precision import Precision, choose_precision
from training.engine.run_folder import Data, RunFolder
from training.engine.saver import best_interval, copied_to_host, price_of_a_kill, write_s
from training.engine.status import (
    EXIT_RESUMABLE,
    Best,
    Status,
    badness,
    checkpoint_folder,
    read_sessions,
    write_status,
)
from training.engine.stopping import StopFlag, Stopped
from training.engine.surroundings import keep_threads
from training.engine.task import RunOptions, Task
from training.engine.wandb.tracker import send_the_rest
from training.engine.weights import Origin
from training.engine.zero import Zero, ZeroOptions, state_bytes

if TYPE_CHECKING:
    from training.engine.address.home import Home

# This many gradients in a row that are not finite, and the run stops: more steps would not mend it.
SKIPPED_STEPS_LIMIT = 5

# `checkpoint.every_steps auto` saves this often until it has measured a save.
STEPS_TO_MEASURE = 10


def train(config: RunOptions, task: Task, data: Data, cluster: Cluster, *, dry_run: bool = False) -> int:
    """Trains to the end, or to the next stop; returns the process's exit status (0 finished, 75 resumable).

    Raises UserError when the run folder holds another run or is in use, or when the number of ranks does not fit;
    status.json then stays as it was. Also when no checkpoint can be written or gradients stay not finite; status.json
    then says `failed`.
    """
    check_world_size(config, cluster)
    if config.budget is not None and config.optim.steps is None:
        raise UserError(f"{task.name} cannot go by --budget: its script does not call training.engine.budget")
    _check_patience(config, task)
    _check_best_by(config, task)
    if cluster.world_size == 1:
        keep_threads(read_sessions(config.run_dir) or read_sessions(config.resume_from or config.run_dir))
    precision = choose_precision(config.precision, cluster.device)
    say(f"{cluster}; {precision.name}: {precision.reason}")
    say(describe(config, task, cluster))
    if config.parallel != "deepspeed" and config.zero != ZeroOptions():
        warn(f"zero.* has no effect with --parallel {config.parallel}: DeepSpeed takes --parallel deepspeed")
    shapes = {name: tensor.shape for name, tensor in model_state(task.model).items()}
    engine = parallel_of(config, task, cluster, precision)
    if dry_run:
        if config.init_from is not None:
            origin = Origin(config.init_from, task.read_foreign)
            cluster.on_first(lambda: origin.find(_about(config, task, data), shapes))
        return _dry_run(config, task, engine, cluster)

    run = _Run(config, task, cluster, engine, _about(config, task, data))
    with closing(RunFolder(config.run_dir, run.home)) as folder:  # free again: a notebook may go on in this process
        run.open(folder, data, shapes)
        if run.is_finished:
            run.confirm_finished()
            how = f"{run.step:,} steps, {run.finish}"
            say(f"{config.run_dir} is finished: {how}; to train anew choose another --run_dir")
            return 0
        try:
            return run.session()
        except KeyboardInterrupt:
            run.abandon("resumable", INTERRUPTED, restart=False)
            raise
        except Exception as error:
            seen = peer_error(error) if means_lost_peer(error) else error
            run.abandon("failed", str(seen) or type(error).__name__, restart=not isinstance(error, UserError))
            raise


def parallel_of(config: RunOptions, task: Task, cluster: Cluster, precision: Precision) -> Parallel:
    """The model on this rank's device, with its optimizer, under the strategy that the config names."""
    model = task.model.to(cluster.device)
    optimizer = build_optimizer(model, config.optim, task.plan.steps, cluster)
    clip_norm, ema_decay = config.optim.clip_norm, config.optim.ema_decay
    if config.parallel == "deepspeed":
        if task.calls_vary and config.zero.stage == 3:
            raise UserError(
                f"in zero.stage 3 the ranks bring the weights of a layer together at every call, and {task.name} calls "
                "its layers once a word: ranks with sentences of different length would wait for each other for ever; "
                "take --zero.stage 2"
            )
        return Zero(model, optimizer, cluster, precision, clip_norm, ema_decay, config.zero)
    return DataParallel(model, optimizer, cluster, precision, clip_norm, ema_decay)


def check_world_size(config: RunOptions, cluster: Cluster) -> None:
    """Raises UserError where the ranks cannot share a step equally."""
    count = config.batch.micro_batches_per_step
    if count % cluster.world_size:
        fitting = [ranks for ranks in range(1, count + 1) if count % ranks == 0]
        raise UserError(
            f"{cluster.world_size} ranks cannot share the {count} micro-batches of a step equally: start with "
            f"{' or '.join(map(str, fitting))} ranks (--processes; torchrun: --nproc-per-node), or in a new run set "
            f"batch.micro_batches_per_step to a multiple of {cluster.world_size}"
        )


def _check_patience(config: RunOptions, task: Task) -> None:
    every, last = config.log.validate_every_steps, Course.of(config.optim, task.plan.steps).fork
    if config.optim.patience is not None and every >= last:
        raise UserError(
            f"optim.patience {config.optim.patience} counts validations, and with one every {every:,} steps "
            f"(log.validate_every_steps) there is none before step {last:,}, where the run ends or its learning rate "
            "falls anyway: validate more often, or leave it out"
        )


def _check_best_by(config: RunOptions, task: Task) -> None:
    scores, by = ("accuracy", "loss", *task.generated), config.checkpoint.best_by
    if by not in scores:
        raise UserError(
            f"checkpoint.best_by {by}: a validation of this run gives {', '.join(scores)}"
            + ("" if task.generated or config.spreads_weights else "; log.generate_samples gives more")
        )


def describe(config: RunOptions, task: Task, cluster: Cluster) -> str:
    """The arithmetic of the run: parameters, memory, steps, and what a step consists of."""
    plan = task.plan
    parameters = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
    if config.parallel == "deepspeed":
        needed = state_bytes(config.zero, cluster.world_size) * parameters
    else:
        needed = 8 * parameters + optimizer_bytes(task.model, config.optim.kind)
    memory = task.memory or f"{needed / 1e6:,.0f} MB a rank for weights, gradients and optimizer"
    per_rank = plan.micro_batches_per_step // cluster.world_size
    tokens, samples = plan.tokens_per_epoch(), f"{len(plan.lengths):,} samples"
    if plan.mixture is not None:
        mixture = plan.mixture
        each = zip(mixture.names, mixture.weights, mixture.drawn(), strict=True)
        counts = ", ".join(f"{count:,} of {name} (weight {weight:g})" for name, weight, count in each)
        samples = f"{plan.samples_per_epoch:,} samples an epoch, of {len(plan.lengths):,}: {counts};"
    return (
        f"{task.name}: {parameters / 1e6:.2f} M parameters to train, {memory}\n"
        f"{samples}, {tokens:,} tokens an epoch in {plan.micro_batches_per_epoch:,} micro-batches, "
        f"{plan.padding_share():.1%} padding\n"
        f"a step: {counted(cluster.world_size, 'rank')} x {counted(per_rank, 'micro-batch')}, about "
        f"{tokens / plan.micro_batches_per_epoch * plan.micro_batches_per_step:,.0f} tokens; "
        f"{plan.steps:,} steps in {plan.epoch(plan.steps):.2f} epochs"
    )


def _dry_run(config: RunOptions, task: Task, engine: Parallel, cluster: Cluster) -> int:
    """Two steps, and what a run would take, in words; the last line is a JSON object with the figures."""
    say("\n" + to_yaml(config))
    if engine.derived_config is not None:
        say("derived from it, for DeepSpeed:\n" + yaml.safe_dump(engine.derived_config, sort_keys=False))
    times = []
    for step in (0, 1):  # the first pass also sets things up; the second is the measure
        began = time.monotonic()
        loss = cluster.sum(forward_backward(config, task, engine, cluster, step))
        engine.step(learning_rate(step, Course.of(config.optim, task.plan.steps), config.optim))
        value = float(loss)
        times.append(time.monotonic() - began)
        if step == 0:
            start_s = process_age_s()
    whole = format_duration(times[-1] * task.plan.steps)
    say(f"dry run: loss {value:.4f}; a step takes {times[-1]:.2f} s, all {task.plan.steps:,} about {whole}")
    say(_price_of_a_kill(config, engine, cluster, times[-1], start_s))
    if task.generated:
        took = f"{_generate_s(task, cluster):.1f} s"
        say(f"answering held-out samples takes {took} at a validation (log.generate_samples)")
    used_mb = memory_mb(cluster.device)
    say(f"{used_mb:,.0f} MB of memory a process; nothing was written")
    say(json.dumps({"steps": task.plan.steps, "step_s": times[-1], "start_s": start_s, "memory_mb": round(used_mb, 1)}))
    return 0


def _generate_s(task: Task, cluster: Cluster) -> float:
    """How long the answers of a validation take; an untrained model's are longer than others."""

    def own_part(batches: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        for batch in cluster.own_part(batches):
            cluster.watcher.beat("dry run, answers to held-out samples")
            yield batch

    began = time.monotonic()
    task.model.eval()
    task.generate(own_part)
    return time.monotonic() - began


def _price_of_a_kill(config: RunOptions, engine: Parallel, cluster: Cluster, step_s: float, start_s: float) -> str:
    tensors = engine.tensors()
    save_s = published_s = write_s(tensors)
    if config.checkpoint.background:
        began = time.monotonic()
        copied_to_host(tensors)
        save_s = time.monotonic() - began
    hours = config.checkpoint.hours_between_kills
    least = best_interval(step_s, save_s, published_s, hours, cluster.device.type)
    every = least if config.checkpoint.every_steps == "auto" else config.checkpoint.every_steps
    return f"{price_of_a_kill(every, least, step_s, hours)}; a start takes {format_duration(start_s)}"


def forward_backward(
    config: RunOptions,
    task: Task,
    engine: Parallel,
    cluster: Cluster,
    step: int,
) -> Tensor:
    """Adds up the gradient of `step` over this rank's micro-batches.

    Every loss is divided by the weight of the whole step, so that the gradient does not depend on how the micro-batches
    are spread over the ranks. Returns this rank's part of the step's loss, a scalar on the device: the sum over ranks
    is the whole.
    """
    batches = task.plan.micro_batches_of(step, cluster.rank, cluster.world_size)
    weight = task.plan.weight(step)
    total = torch.zeros((), device=cluster.device)
    for batch in batches:
        with engine.micro_batch(last=batch is batches[-1]):
            cluster.watcher.beat(f"step {step + 1}, forward pass")
            seed_dropout(config.seed, step, batch.number, cluster.device)
            with engine.autocast():
                loss = task.loss(engine.replica, batch.samples) / weight
            total += loss.detach()
            cluster.watcher.beat(f"step {step + 1}, backward pass")
            engine.backward(loss)
    return total


def seed_dropout(seed: int, step: int, micro_batch: int, device: torch.device) -> None:
    """Dropout depends on the micro-batch, never on the rank or the session that runs it."""
    words = np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)
    # On a CPU not torch.manual_seed: it takes 0.2 ms and more to note where it was called, for GPUs found later.
    set_seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    set_seed(int(words[0] >> np.uint64(1)))


def _about(config: RunOptions, task: Task, data: Data) -> dict[str, Any]:
    """What defines the run and goes into every manifest."""
    return {
        "task": task.name,
        # The command may have a secret in it, and this goes into pages and to wandb.
        "config": config.model_dump(mode="json", exclude={"session": {"on_end"}}),
        "data": data.identity,
        **({"built_on": task.built_on} if task.built_on else {}),
        "versions": {name: version(name) for name in ("torch", "numpy", "safetensors", *task.libraries)},
    }


def _home(config: RunOptions) -> Home | None:
    """The run's address. Raises UserError where a library for it is missing."""
    if config.run_at is None:
        return None
    from training.engine.address.home import Home  # what few runs need

    return Home(config.run_at, config.run_dir)


class _Run:
    """The state of the loop: the step, and which parts of its boundary are done."""

    def __init__(self, config: RunOptions, task: Task, cluster: Cluster, engine: Parallel, about: dict[str, Any]):
        self.config, self.task, self.cluster, self.engine, self.about = config, task, cluster, engine, about
        self.stop = StopFlag(config.run_dir, cluster, config.session)
        self.logbook = Logbook()  # writes nothing; the first rank has its own during a session
        self.home = cluster.on_first(lambda: _home(config))
        self.window = Window(task.plan)
        self.clock = Clock()
        self.step = 0
        self.saved_step: int | None = None
        self.measured: MeasuredInterval | None = None  # of `checkpoint.every_steps auto`
        self.validated_step = 0
        self.waited = 0  # validations since the last new best
        self.ended: int | None = None  # the step at which that was too many
        self.scores: dict[str, float] = {}  # of the model as it is at `step`, where it was validated
        self.best: Best = {"best_step": None, "best_score": None, "best_by": config.checkpoint.best_by}
        self.wandb_id: str | None = None

    @property
    def course(self) -> Course:
        """How long the run is, as far as is known by now."""
        return Course.of(self.config.optim, self.task.plan.steps, self.ended)

    def open(self, folder: RunFolder, data: Data, shapes: Mapping[str, torch.Size]) -> None:
        """Makes the run folder, or checks that it holds this very run, and restores the newest valid checkpoint.

        shapes: of the model's weights, whole. A run without a checkpoint begins with those that the config names.
        """
        config = self.config

        def open_on_first() -> Checkpoint | None:
            return folder.open(
                self.about,
                data,
                config=to_yaml(config),
                source=config.resume_from,
                may_change=config.may_change,
                shared_steps=self._shared_steps,
            )

        # Only one rank verifies; the others learn which checkpoint passed.
        latest = self.cluster.on_first(open_on_first)
        self.cluster.watcher.may_write()
        (step,) = self.cluster.maximum([latest.step if latest is not None else -1])
        if step >= 0:
            self._restore(Checkpoint(checkpoint_folder(config.run_dir, int(step))))
        elif config.init_from is not None:
            self._begin_with(config.init_from, shapes)

    def _begin_with(self, init_from: str, shapes: Mapping[str, torch.Size]) -> None:
        origin = Origin(init_from, self.task.read_foreign)
        # Found once: the source may be a run that goes on, whose best checkpoint is soon another.
        found = self.cluster.on_first(lambda: origin.find(self.about, shapes))
        (self.about["init_from"], *_) = self.cluster.gather(found or {}, dict[str, Any])
        self.engine.begin_with(origin.read(self.about["init_from"]))
        self.validated_step = -1  # at step 0, too
        steps = ", ".join(self.about["init_from"]["checkpoints"])
        say(
            f"beginning with the weights of {init_from}{f' (step {steps}), verified' if steps else ''}; all else is new"
        )

    def _shared_steps(self, checkpoint: Checkpoint) -> int:
        """Up to which step the run of a checkpoint is this one. Raises UserError where it is longer than this one."""
        state = checkpoint.state()
        was = Course(state["steps"], state["fork"])
        now = Course.of(self.config.optim, self.task.plan.steps, self._still_ended(state))
        shared = checkpoint.step if was == now else min(was.fork, now.fork, checkpoint.step)
        if shared < checkpoint.step and now.steps < was.steps:
            raise UserError(
                f"{checkpoint.folder.parents[1]} has come to step {checkpoint.step:,} of {was.steps:,}, and a run of "
                f"{now.steps:,} steps would have left its course at step {now.fork:,}: a run can be made longer, not "
                "shorter than it is; choose another --run_dir"
            )
        return shared

    def _still_ended(self, state: RunState) -> int | None:
        """Where the run's patience was at its end, unless it has more by now."""
        patience = self.config.optim.patience
        return state["ended"] if patience is not None and patience <= state["waited"] else None

    def _restore(self, latest: Checkpoint) -> None:
        self.engine.load(latest)
        state = latest.state()
        self.step = self.saved_step = latest.step
        self.validated_step, self.wandb_id = state["validated_step"], state["wandb_id"]
        self.scores, self.waited, self.ended = state["scores"], state["waited"], self._still_ended(state)
        self.measured = state["measured_interval"]
        if self.measured and self.measured["hours"] != self.config.checkpoint.hours_between_kills:
            self.measured = None
        if self.best["best_by"] in self.task.generated and state["samples"] not in (0, self.task.samples):
            raise UserError(
                f"the best checkpoint is told by {self.best['best_by']} of {state['samples']} samples, with which that "
                f"of {self.task.samples} cannot be compared: leave log.generate_samples as it was, or let another "
                "score tell (checkpoint.best_by)"
            )
        if state["best_by"] == self.best["best_by"]:
            self.best["best_step"], self.best["best_score"] = state["best_step"], state["best_score"]
        else:
            self._take_best_of_kept()
        self.window = Window(self.task.plan, self.step, state["window_losses"])
        if "init_from" in latest.manifest:  # resolved when the run began
            self.about["init_from"] = latest.manifest["init_from"]
        if self.config.init_from not in (None, latest.manifest["config"]["init_from"]):
            began = self.about.get("init_from", {}).get("run", "no other run's weights")
            warn(f"this run has begun with {began}: --init_from {self.config.init_from} is for a new --run_dir")
        say(f"resuming at step {latest.step:,} from {latest.folder}, verified")

    def _take_best_of_kept(self) -> None:
        """The best so far by a score that did not count before: only what is still there can be it."""
        by = self.best["best_by"]

        def look() -> list[tuple[int, float]]:
            return [(each.step, each.state()["scores"][by]) for each in best(self.config.run_dir, 1, by)]

        # One rank looks: what the others see of the folder may be older.
        (found, *_) = self.cluster.gather(self.cluster.on_first(look) or [], list[tuple[int, float]])
        if found:
            self.best["best_step"], self.best["best_score"] = found[0]
        if self.ended is None:
            self.waited = 0

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done, and the last validation."""
        return self.step == self.validated_step == self.course.steps

    @property
    def finish(self) -> str:
        """Why the run is finished, once it is."""
        return "all steps done" if self.ended is None else f"no new best in {self.waited} validations (optim.patience)"

    def confirm_finished(self) -> None:
        """Says again that the run is finished: a kill may have come between the last checkpoint and that."""
        if self.cluster.is_first:
            run_dir, config = self.config.run_dir, shown_config(self.about)
            with writing_to(run_dir, option="--run_dir"):
                write_status(run_dir, "finished", self.finish, restart=False, step=self.step)
            if self.home is not None:  # the last session may not have come to it
                self.home.start()
                self.home.finish(inf)
            send_the_rest(self.config.wandb, run_dir, self.wandb_id, config, read_metrics(run_dir), self.best)

    # The session.

    def session(self) -> int:
        """Steps until the end or a stop; every way out but a kill leaves a checkpoint of the last step and a status."""
        stopped = None
        self.cluster.on_first(self._open_logbook)
        self.first_step = self.step
        with Progress("training", self.course.steps, "steps", start=self.step) as self.progress:
            try:
                self.clock.enter("steps")
                self._boundary()  # the last session may have been stopped within one
                while self.step < self.course.steps:
                    self.stop.check()
                    self._train_step()
                    if self.step == self.first_step + 1:
                        self.first_step_s = self.clock.seconds()["steps"]
                        self.logbook.prepare(self.engine.tensors())  # the optimizer has them only now
                    self._boundary()
            except Stopped as raised:
                stopped = raised
            self.clock.enter("end")
            self.cluster.watcher.beat("the end of the session", slow=True)
            if self.saved_step != self.step:
                self._save(due=False)
            self.cluster.on_first(self.logbook.finish_saving)
        return self._end(stopped, wants_rest=self.stop.clear())

    def _open_logbook(self) -> None:
        with writing_to(self.config.run_dir, option="--run_dir"):
            self.logbook = FirstRanksLogbook(
                self.config,
                self.about,
                self.cluster,
                self.stop,
                self.clock,
                steps=self.course.steps,
                step=self.step,
                validated_step=self.validated_step,
                best=self.best,
                wandb_id=self.wandb_id,
                show=self.task.show,
                home=self.home,
            )
        self.wandb_id = self.logbook.wandb_id

    def _train_step(self) -> None:
        with self.clock.during("data"):
            self.task.plan.step(self.step)  # lays out an epoch where one begins
        loss = forward_backward(self.config, self.task, self.engine, self.cluster, self.step)
        lr = learning_rate(self.step, self.course, self.config.optim)
        norm = self.engine.step(lr)
        self.window.add(self.step, loss)
        self.step += 1
        self.scores = {}
        if self.step == self.course.steps or self.step % self.config.log.every_steps == 0:
            self._report(lr, norm)
        self.progress.advance()

    def _boundary(self) -> None:
        """What is due after a step, as far as it is not done: validate, save."""
        if self.step == self.validated_step == 0:
            return
        done = self.step == self.course.steps
        with self.window.paused():
            is_best = validated = False
            if self.validated_step < self.step and (done or self.step % self.config.log.validate_every_steps == 0):
                is_best, validated = self._validate(), True
            if self.validated_step == self.step and self.ended is None:
                self._end_early()
                validated |= self.ended is not None
            due = is_best or done or self.step % self._save_every() == 0
            # A stop within the validation leaves a checkpoint that does not know its outcome: it is made anew.
            if (due or self.step in (self.course.fork, self.course.steps)) and (
                validated or self.saved_step != self.step
            ):
                self._save(due=due)
                self._measure_interval()

    def _save_every(self) -> int:
        """Steps between two checkpoints."""
        every = self.config.checkpoint.every_steps
        if every != "auto":
            return every
        return self.measured["steps"] if self.measured else STEPS_TO_MEASURE

    def _measure_interval(self) -> None:
        """`checkpoint.every_steps auto`: how often to save, from how long steps and the save just begun are taking.

        The first step of a session, which also sets things up, is left out, and a few others are waited for.
        """
        steps = self.step - self.first_step - 1
        if self.config.checkpoint.every_steps != "auto" or self.measured or steps < STEPS_TO_MEASURE / 2:
            return
        self.cluster.watcher.beat(f"the save of step {self.step}", slow=True)
        with self.clock.during("saves"):
            step_s = max(1e-4, (self.clock.seconds()["steps"] - self.first_step_s) / steps)
            (found,) = self.cluster.maximum([self.logbook.best_interval(step_s)])
        if found:
            self.measured = {"steps": int(found), "hours": self.config.checkpoint.hours_between_kills}

    def _end_early(self) -> None:
        """Where too many validations brought no new best, the run ends here, or its decay begins."""
        optim, fork = self.config.optim, self.course.fork
        if optim.patience is None or self.waited < optim.patience or not optim.warmup_steps <= self.step < fork:
            return
        self.ended = self.step
        self.progress.total = self.course.steps
        self.logbook.set_length(self.course.steps)
        then = "the learning rate falls from here on" if self.course.steps > self.step else "the run ends here"
        say(f"step {self.step:,}: no new best in {self.waited} validations (optim.patience): {then}")

    def _report(self, lr: float, norm: Tensor) -> None:
        """Closes the window: writes its line, and notes what the progress line says about it.

        Raises UserError on every rank alike when too many gradients in a row were not finite.
        """
        drawn = self.window.drawn()
        figures = self.window.close(self.cluster)
        skipped = int(self.engine.skipped_in_a_row)
        self.logbook.line(
            "train",
            self.step,
            epoch=round(self.task.plan.epoch(self.step), 4),
            **asdict(figures),
            **{f"samples/{name}": count for name, count in drawn.items()},
            lr=lr,
            grad_norm=float(norm),
            skipped_in_a_row=skipped,
            flops_per_s=round(figures.tokens_per_s * self.task.flops_per_token),
            memory_mb=round(memory_mb(self.cluster.device), 1),
        )
        if skipped >= SKIPPED_STEPS_LIMIT:
            raise UserError(
                f"the gradients of {skipped} steps in a row were not finite (step {self.step}): lower optim.lr, "
                "or try --precision fp32" + ("; the checkpoints before stand" if self.saved_step is not None else "")
            )
        self.progress.note = f"loss {figures.loss:.3f} · {figures.tokens_per_s:,.0f} tokens/s"

    def _validate(self) -> bool:
        """Scores the model on held-out data and writes it down; true if it is the best so far."""
        with self.clock.during("validation"):
            result = self.task.validate(self.engine.model, self._own_part)
            generated = self._generate()
        scores = {**result.scores, **generated.scores}
        self.scores = {name: score for name, score in scores.items() if isfinite(score)}
        # By default accuracy picks the best checkpoint: late in training over-confidence raises the loss while
        # translations still improve.
        so_far, by = self.best["best_score"], self.best["best_by"]
        is_best = by in self.scores and (so_far is None or badness(self.scores[by], by) < badness(so_far, by))
        if self.ended is None:
            self.waited = 0 if is_best else self.waited + 1
        if is_best:
            self.best = {"best_step": self.step, "best_score": self.scores[by], "best_by": by}
        examples = {"examples": generated.examples} if generated.examples else {}
        self.logbook.line("validation", self.step, **scores, **examples)
        self.validated_step = self.step
        more = "".join(f", {name} {score:.1f}" for name, score in generated.scores.items())
        say(
            f"step {self.step:,}/{self.course.steps:,}: validation loss {result.loss:.4f}, "
            f"token accuracy {result.accuracy:.2%}{more}" + (f" (best {by})" if is_best else "")
        )
        return is_best

    def _generate(self) -> GeneratedScores:
        if not self.task.generated:
            return GeneratedScores({}, [])
        self.task.model.eval()
        found = self.task.generate(self._own_part)
        self.task.model.train()
        return found

    def _own_part(self, batches: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        if self.engine.in_step:
            batches = in_rounds(batches, self.cluster.world_size)
        return self.stop.until_stop(batches, lambda: self.cluster.watcher.beat(f"validation after step {self.step}"))

    def _save(self, *, due: bool) -> None:
        """due: whether an uninterrupted run saves here, too."""
        with self.clock.during("saves"):
            self._hand_over(due)
        self.saved_step = self.step

    def _hand_over(self, due: bool) -> None:
        window_losses, tensors = self.window.losses(self.cluster), self.engine.tensors()
        state: RunState = {
            **self.engine.state(),
            **self.best,
            "scores": self.scores,
            "validated_step": self.validated_step,
            "waited": self.waited,
            "ended": self.ended,
            "steps": self.course.steps,
            "fork": self.course.fork,
            "measured_interval": self.measured,
            "samples": self.task.samples if self.task.generated else 0,
            "window_losses": window_losses,
            "wandb_id": self.wandb_id,
            "due": due,
        }
        self.logbook.save(self.step, tensors, state)

    def _end(self, stop: Stopped | None, *, wants_rest: bool) -> int:
        """Writes down how the session ended. stop: None if all steps are done."""
        # A save that failed is known to one rank; all must leave with the same status.
        error = self.logbook.save_error
        (unsaved,) = self.cluster.maximum([error is not None])
        if stop is None and not unsaved:
            self.logbook.close("finished", self.finish, self.step, self.best, restart=False)
            return 0
        reason = stop.reason if stop else "the last save, which failed"
        said = f"{reason} ({error})" if error else reason
        self.logbook.close("resumable", said, self.step, self.best, restart=not wants_rest)
        where = f"the last checkpoint ({error})" if error else "there"
        stopped = f"stopped by {reason} at step {self.step:,} of {self.course.steps:,}"
        say(f"{stopped}; the same command continues from {where}")
        # A launcher takes any other status for a failure and cannot pass it on; status.json is what counts there.
        return 0 if self.cluster.ranks.launched else EXIT_RESUMABLE

    def abandon(self, status: Status, reason: str, *, restart: bool) -> None:
        """The end by an error. After a failure the save that is in flight is finished first."""
        if status == "failed":
            self.logbook.drain()
        self.logbook.close(status, reason, self.step, self.best, restart=restart)
