"""`--budget 40m`: a run that takes as long as its user has time.

What the command line leaves open is chosen once, at the run's first start, from the data, a few steps on this machine,
and the minutes. Promises:

- A run with a budget is a run with the options that were chosen and nothing else: written out by hand they give the
  same bits. Nothing looks at the clock while it trains, so on a machine that becomes slower the run takes longer.
- The choice stands in the run's config.yaml and in each checkpoint. Later starts take it from there, on other machines,
  too; a start that was killed before it stood there chooses again.
- What the command line names is kept, and every choice is printed with its reason.

What a training knows of its own options is in its `Chooser`.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from pydantic import ValidationError

from training.base.console import UserError, counted, say, warn
from training.base.durations import format_duration
from training.base.environment import process_age_s
from training.base.files import read_plain, temporary_folder, writing_to
from training.base.options import differing_keys, named_keys, with_values
from training.engine.batch_plan import in_rounds
from training.engine.checkpoint import checkpoints, publish
from training.engine.cluster import Cluster
from training.engine.loop import check_world_size, forward_backward, parallel_of
from training.engine.optim import Course, learning_rate
from training.engine.precision import PrecisionName, choose_precision, has_bf16
from training.engine.run_folder import Data, refuse_foreign_folder
from training.engine.saver import best_interval, copied_to_host
from training.engine.status import read_config
from training.engine.task import RunOptions, Task

# What is chosen in every training; a `Chooser` has more.
KEYS = (
    "precision",
    "batch.micro_batches_per_step",
    "batch.tokens_per_micro_batch",
    "optim.steps",
    "optim.warmup_steps",
    "optim.decay_steps",
    "log.validate_every_steps",
    "checkpoint.every_steps",
)

# Shares of the budget: kept free, since no machine is equally fast all the time; and for the steps that are measured,
# once to choose what they are to be and once as they are then. Few are enough.
MARGIN, LOOKING, MEASURING = 0.08, 0.02, 0.03
_FEWEST_MEASURED, _MOST_MEASURED = 4, 60

# On a CPU bf16 is taken where its steps take less than such a share of those in fp32, which is exact.
WORTH_BF16 = 0.9

# What the end of a session takes behind its last save: the run's page, above all.
_END_S = 3.0

# Validations of a run, their share of its time, and what it may be at most for the sake of the fewest.
_FEWEST_VALIDATIONS, _MOST_VALIDATIONS = 3, 12
_VALIDATING, _MOST_VALIDATING = 0.06, 0.3

# Fewer steps than these are no training.
FEWEST_STEPS = 10

# For steps that are measured: a run without an end, at the beginning of its warm-up.
_ENDLESS: Mapping[str, Any] = {"optim.steps": 10**9, "optim.warmup_steps": 10**6}

Config = TypeVar("Config", bound=RunOptions)


@dataclass(frozen=True)
class Choice:
    """An option, its value, and why."""

    key: str
    value: Any
    reason: str


class Chooser:
    """What a training chooses besides what all have in common. This one adds nothing."""

    keys: tuple[str, ...] = ()  # of the options that it chooses
    most_passes = math.inf  # over the data: a run that would read it oftener ends before its budget does
    tries_bf16 = False  # whether on a CPU its steps may be faster in bf16, and learn as much

    def __init__(self, longest: int):
        """longest: positions of the longest sample."""
        self.longest = longest

    def batch(self, config: Any, cluster: Cluster) -> list[Choice]:
        """The micro-batches of a step. Called by all ranks, and must give each the same.

        Together they have the tokens that the config says, since its learning rate was found with these.
        """
        batch, ranks = config.batch, cluster.world_size
        return shared_out(batch.tokens_per_micro_batch, batch.micro_batches_per_step, ranks, self.longest)

    def by_passes(self, config: Any, passes: float) -> list[Choice]:
        """What follows from how often a run with these options reads its data."""
        return []


def shared_out(tokens: int | None, count: int, ranks: int, longest: int) -> list[Choice]:
    """`count` micro-batches of `tokens` each, or as many more, smaller ones as so many ranks can share equally.

    tokens: None where sentences are counted instead.
    """
    fitting = math.lcm(count, ranks)
    found = []
    if fitting != count:
        found.append(Choice("batch.micro_batches_per_step", fitting, f"{ranks} ranks share them equally"))
    if tokens is not None:
        smaller = -(-tokens * count // fitting)
        if smaller < longest:
            found.append(Choice("batch.tokens_per_micro_batch", longest, "so many has the longest sample"))
        elif smaller != tokens:
            found.append(Choice("batch.tokens_per_micro_batch", smaller, "a step has as many tokens as before"))
    return found


@dataclass(frozen=True)
class Measured:
    """What a run was found to take on this machine, in seconds."""

    spent_s: float  # since the start
    setup_s: float  # to build all of it, the first step included
    step_s: float
    validation_s: float
    save_s: float  # until a save is published
    stall_s: float  # for which it holds the training up


@dataclass(frozen=True)
class Length:
    """How many steps and validations a run has time for, and where that goes, in words."""

    steps: int
    validations: int
    reason: str


def length_of(
    budget_s: float,
    measured: Measured,
    *,
    save_every: int,
    validate_every: int | None = None,
    enough: tuple[float, str] = (math.inf, ""),
) -> Length:
    """The run that fits into `budget_s`. Raises UserError where none does.

    save_every, validate_every: in steps; None: as often as is worth it. enough: steps, and why a run has no more.
    """
    m = measured
    left_s = (1 - MARGIN) * budget_s - _END_S - m.spent_s - m.setup_s
    step_s = m.step_s + m.save_s / save_every
    each_s = m.validation_s + m.save_s  # the best so far is saved
    if validate_every is None:
        most, usual = (int(share * max(0.0, left_s) / max(each_s, 1e-9)) for share in (_MOST_VALIDATING, _VALIDATING))
        count = max(1, min(most, _MOST_VALIDATIONS, max(_FEWEST_VALIDATIONS, usual)))
        steps = int((left_s - count * each_s) / step_s)
    else:
        steps = int((left_s - each_s) / (step_s + each_s / validate_every))
    if steps < FEWEST_STEPS:
        # The margin is a share of the budget that is asked for.
        least_s = (m.spent_s + m.setup_s + _END_S + each_s + FEWEST_STEPS * step_s) / (1 - MARGIN)
        raise UserError(
            f"--budget {format_duration(budget_s)} leaves time for {max(0, steps)} steps: starting and measuring took "
            f"{format_duration(m.spent_s)}, starting again takes {format_duration(m.setup_s)}, a validation "
            f"{format_duration(m.validation_s)}, a step {m.step_s:.2g} s; give it {_minutes(2 * least_s)} or more"
        )
    why = ""
    if steps > enough[0]:
        steps, why = math.ceil(enough[0]), f"{enough[1]}; "
    if validate_every is not None:
        count = max(1, -(-steps // validate_every))
    parts = {
        f"for steps of {m.step_s:.3g} s with their saves": steps * step_s,
        f"for {counted(count, 'validation')}": count * each_s,
        "for starting and measuring": m.spent_s + m.setup_s,
    }
    parts["to spare"] = budget_s - sum(parts.values())
    reason = why + ", ".join(f"{format_duration(seconds)} {words}" for words, seconds in parts.items())
    return Length(steps, count, reason)


def _minutes(seconds: float) -> str:
    return f"{math.ceil(seconds / 60)}m"


def warmup_of(steps: int) -> tuple[int, str]:
    """Steps of the warm-up of a run, and why: a twentieth of its steps, but 50 to 500, and a fifth at most."""
    least = min((50, "as few as it ever has"), (max(1, steps // 5), "a fifth"))
    return min((500, "as many as it ever has"), max((steps // 20, "a twentieth"), least))


def is_to_choose(config: RunOptions, named: AbstractSet[str]) -> bool:
    """Whether these options have a budget that is still to choose some; in the config.yaml of a run it has chosen all.

    named: the keys of the command line.
    """
    return config.budget is not None and ("budget" in named or config.optim.steps is None)


def within_budget(
    config: Config,
    build: Callable[[Config], Task],
    data: Data,
    cluster: Cluster,
    words: Sequence[str],
    chooser: Chooser,
    *,
    dry_run: bool = False,
) -> Config:
    """The options of a run with a budget, all of them chosen; without one `config` as it is. Called by all ranks.

    build: the task of such options, made anew at each call. words: the command line. Raises UserError where the budget
    is too short, or where the command line names both it and a length, and where the run folder holds a run with
    another budget.
    """
    if config.budget is None:
        return config
    named = named_keys(words)
    budget = format_duration(config.budget)
    if lengths := sorted(named & {"optim.steps", "optim.epochs"}):
        other = (
            "leave one out"
            if "budget" in named
            else "leave that out, or in a new run take the budget of the config away (--budget null)"
        )
        raise UserError(f"--budget {budget} chooses the length of the run, and so does --{lengths[0]}: {other}")
    if not is_to_choose(config, named):
        return config
    open_keys = [key for key in (*KEYS, *chooser.keys) if key not in named]
    known = cluster.on_first(lambda: _chosen_before(config, data, open_keys))
    (values, *_) = cluster.gather(known or {}, dict[str, Any])
    if values:
        say(f"--budget {budget}: as chosen at the run's first start, {values['optim.steps']:,} steps")
        return with_values(config, values)
    decision = _Decision(config, open_keys, build, cluster, chooser)
    decision.make(dry_run=dry_run)
    decision.say()
    # Computed alike on every rank; but rounding may differ between machines, and the decision must not.
    (values, *_) = cluster.gather({each.key: each.value for each in decision.made}, dict[str, Any])
    return with_values(config, values)


def _chosen_before(config: RunOptions, data: Data, open_keys: Sequence[str]) -> dict[str, Any] | None:
    """What the run chose at its first start, by key; None where it has none yet.

    Raises UserError where there is a run with another budget, or none, or something that is no run.
    """
    refuse_foreign_folder(config.run_dir)
    asked = config.model_dump(mode="json")
    place, found = _of_newest_checkpoint(config)
    if found is not None and found.get("budget") != asked["budget"]:
        (difference,) = differing_keys({"budget": found.get("budget")}, {"budget": asked["budget"]})
        raise UserError(
            f"{place} holds a run with another definition ({difference}): the length of a run is chosen once, "
            "at its first start; restore this key to continue it, or choose another --run_dir; nothing was changed"
        )
    if found is None:
        found = _begun(config, asked, data, open_keys)
    if found is None:
        return None
    values = {}
    for key in open_keys:
        with suppress(KeyError, TypeError):  # a stranger's config
            value: Any = found
            for part in key.split("."):
                value = value[part]
            values[key] = value
    with suppress(ValidationError):
        return values if with_values(config, values).optim.steps is not None else None
    return None


def _of_newest_checkpoint(config: RunOptions) -> tuple[object, dict[str, Any] | None]:
    """Where the run has its newest checkpoint, and the config in it; None where it has none."""
    for folder in (config.run_dir, config.resume_from):
        for checkpoint in reversed(checkpoints(folder)) if folder is not None else ():
            with suppress(OSError, ValueError):
                return folder, checkpoint.manifest["config"]
    if config.run_at is None:
        return None, None
    from training.engine.address.home import config_at  # what few runs need

    return config.run_at, config_at(config.run_at)


def _begun(config: RunOptions, asked: dict[str, Any], data: Data, open_keys: Sequence[str]) -> dict[str, Any] | None:
    """The config.yaml of a run that was begun with these very options and this data, and has no checkpoint yet."""
    run_dir = config.run_dir
    kept = [(run_dir / name, path) for name, path in data.kept.items() if path.is_file()]
    found = read_config(run_dir)
    try:
        same_data = all(read_plain(copy) == path.read_bytes() for copy, path in kept)
    except (OSError, ValueError):
        return None
    if found is None or not same_data:
        return None
    free = config.may_change - {"data"}
    before, now = ({key: value for key, value in each.items() if key not in free} for each in (found, asked))
    differing = {line.partition(":")[0] for line in differing_keys(before, now)}
    return found if differing <= set(open_keys) else None


class _Decision(Generic[Config]):
    """The choice while it is made."""

    def __init__(
        self,
        config: Config,
        open_keys: Sequence[str],
        build: Callable[[Config], Task],
        cluster: Cluster,
        chooser: Chooser,
    ):
        assert config.budget is not None
        self.config, self.open_keys, self.cluster, self.chooser = config, open_keys, cluster, chooser
        self.budget_s = config.budget
        self._build = build
        self.made: list[Choice] = []
        self._given = [key for key in (*KEYS, *chooser.keys) if key not in open_keys]
        self._passes = 0.0

    def take(self, *choices: Choice) -> None:
        """Makes them, but for what is given."""
        for each in choices:
            if each.key in self.open_keys:
                self.config = with_values(self.config, {each.key: each.value})
                self.made.append(each)

    def make(self, *, dry_run: bool) -> None:
        """All choices, one after the other: what a step is first, then how many."""
        self._check_start()
        self.take(*self._batch())
        check_world_size(self.config, self.cluster)
        self._choose_step()
        self._free()
        self._choose_length(dry_run=dry_run)
        self._free()

    def _batch(self) -> list[Choice]:
        batch, ranks = self.config.batch, self.cluster.world_size
        count_open, tokens_open = (key in self.open_keys for key in KEYS[1:3])
        if count_open and tokens_open:
            return self.chooser.batch(self.config, self.cluster)
        tokens, longest = batch.tokens_per_micro_batch if tokens_open else None, self.chooser.longest
        return shared_out(tokens, batch.micro_batches_per_step, ranks if count_open else 1, longest)

    def _check_start(self) -> None:
        """Raises UserError where the start alone has taken too much, before more is spent."""
        spent_s = self._spent_s()
        if spent_s > self.budget_s / 2:
            raise UserError(
                f"--budget {format_duration(self.budget_s)} is too short: starting took {format_duration(spent_s)}; "
                f"give it {_minutes(10 * spent_s)} or more"
            )

    def _spent_s(self) -> float:
        (spent_s,) = self.cluster.maximum([process_age_s()])
        return spent_s

    def _choose_step(self) -> None:
        """What a step is: its precision, and what follows from how many of them there is time for."""
        names: list[PrecisionName] = [self.config.precision]
        (lacking,) = self.cluster.maximum([not has_bf16(self.cluster.device)])
        on_cpu = self.cluster.device.type == "cpu"
        if names == ["auto"] and on_cpu and self.chooser.tries_bf16 and not lacking and "precision" in self.open_keys:
            names = ["fp32", "bf16"]
        if len(names) == 1 and not self.chooser.keys:
            return
        trials = [self._trial(with_values(self.config, {"precision": name})) for name in names]
        times = _in_turns(trials, LOOKING * self.budget_s)
        best = 0
        if len(names) > 1:
            best = int(times[1] < WORTH_BF16 * times[0])
            reason = f"a step takes {times[best]:.2g} s, in {names[1 - best]} {times[1 - best]:.2g} s"
            self.take(Choice("precision", names[best], reason))
        left_s = 0.85 * (self.budget_s - self._spent_s())  # validations and saves are not measured yet
        passes = trials[best].task.plan.epoch(max(0, int(left_s / times[best])))
        self.take(*self.chooser.by_passes(self.config, passes))

    def _choose_length(self, *, dry_run: bool) -> None:
        """How many steps there are, and what goes by their number and by what they take."""
        trial, config = self._trial(self.config), self.config
        (step_s,) = _in_turns([trial], MEASURING * self.budget_s)
        validation_s = trial.validation_s()
        if validation_s < LOOKING * self.budget_s / 2:
            validation_s = trial.validation_s()  # the first one also loads what it needs
        save_s, stall_s = trial.save_s(None if dry_run else config.run_dir)
        m = Measured(self._spent_s(), trial.setup_s, step_s, validation_s, save_s, stall_s)
        hours, every = config.checkpoint.hours_between_kills, config.checkpoint.every_steps
        if every == "auto" or "checkpoint.every_steps" in self.open_keys:
            every = best_interval(m.step_s, m.stall_s, m.save_s, hours, self.cluster.device.type)
        validate_every = None if "log.validate_every_steps" in self.open_keys else config.log.validate_every_steps
        plan, passes = trial.task.plan, self.chooser.most_passes
        enough = passes * plan.micro_batches_per_epoch / plan.micro_batches_per_step
        why = f"{passes:g} passes over the data: more would learn it by heart"
        found = length_of(self.budget_s, m, save_every=every, validate_every=validate_every, enough=(enough, why))
        self._passes = plan.epoch(found.steps)
        self.take(
            Choice("optim.steps", found.steps, found.reason),
            Choice("optim.warmup_steps", *warmup_of(found.steps)),
            Choice(
                "log.validate_every_steps",
                -(-found.steps // found.validations),
                f"{found.validations} in all, of {m.validation_s:.2g} s each",
            ),
            Choice(
                "checkpoint.every_steps",
                every,
                f"a save takes {m.save_s:.2g} s: with a kill every {hours:g} hours this loses least (Young's rule)",
            ),
        )
        if config.optim.schedule == "wsd":
            self.take(Choice("optim.decay_steps", max(1, found.steps // 5), "a fifth"))

    def say(self) -> None:
        """Prints it."""
        say(f"--budget {format_duration(self.budget_s)}: chosen once, for all sessions of this run")
        width = max(len(f"{each.key} {each.value}") for each in self.made)
        for each in self.made:
            say(f"  {f'{each.key} {each.value}':<{width}}  {each.reason}")
        if self._given:
            say(f"  as given: {', '.join(self._given)}")
        if self._passes < 1:
            warn(
                f"there is time for {self._passes:.2g} of one pass over the data: what is left over is never learned "
                "from; a longer --budget reads more"
            )

    def _trial(self, config: Config) -> _Trial:
        return _Trial(with_values(config, dict(_ENDLESS)), self._build, self.cluster)

    def _free(self) -> None:
        """Gives the memory of trials that are over back, for the next model."""
        gc.collect()
        if self.cluster.device.type == "cuda":
            torch.cuda.empty_cache()


class _Trial:
    """The training as it will be, for a few steps."""

    def __init__(self, config: Any, build: Callable[[Any], Task], cluster: Cluster):
        began = time.monotonic()
        cluster.watcher.beat("measuring for the budget", slow=True)
        self._config, self._cluster, self._step = config, cluster, 0
        self.task = build(config)
        self._engine = parallel_of(config, self.task, cluster, choose_precision(config.precision, cluster.device))
        self.step_s()
        (self.setup_s,) = cluster.maximum([time.monotonic() - began])

    def step_s(self) -> float:
        """Does a step; returns how long the slowest rank took."""
        config, began = self._config, time.monotonic()
        forward_backward(config, self.task, self._engine, self._cluster, self._step)
        norm = self._engine.step(learning_rate(self._step, Course.of(config.optim, self.task.plan.steps), config.optim))
        float(norm)  # waits for the device
        self._step += 1
        return self._slowest(began)

    def _slowest(self, began: float) -> float:
        (seconds,) = self._cluster.maximum([time.monotonic() - began])
        return seconds

    def validation_s(self) -> float:
        """How long a validation takes, answers included; those of a trained model are rather shorter."""
        began = time.monotonic()
        self.task.validate(self._engine.model, self._own_part)
        if self.task.generated:
            self.task.model.eval()
            self.task.generate(self._own_part)
            self.task.model.train()
        return self._slowest(began)

    def _own_part(self, batches: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        if self._engine.in_step:
            batches = in_rounds(batches, self._cluster.world_size)
        for batch in self._cluster.own_part(batches):
            self._cluster.watcher.beat("measuring for the budget, a validation")
            yield batch

    def save_s(self, run_dir: Path | None) -> tuple[float, float]:
        """How long a save takes until it is published, and for how long it holds the training up.

        run_dir: where, if anything may be left there; None: in the system's folder for temporary files.
        """
        began = time.monotonic()
        tensors = copied_to_host(self._engine.tensors())
        stall_s = time.monotonic() - began
        nothing: dict[str, Any] = {"task": "none", "config": {}, "data": {}, "versions": {}}

        def save() -> None:
            if run_dir is None:
                with TemporaryDirectory() as folder:
                    publish(folder, 0, tensors, state={}, about=nothing, keep=1)
                return
            # Named so that the next start removes what a kill leaves here.
            final = run_dir / "checkpoints" / "step-measured"
            with writing_to(run_dir, option="--run_dir"), temporary_folder(final) as folder:
                publish(folder, 0, tensors, state={}, about=nothing, keep=1)
                shutil.rmtree(folder)

        self._cluster.on_first(save)
        published_s, stall_s = self._cluster.maximum([time.monotonic() - began, stall_s])
        return published_s, stall_s


def _in_turns(trials: Sequence[_Trial], seconds: float) -> list[float]:
    """How long a step of each takes. They take turns for so many seconds, so that a busy moment meets all of them.

    The mean without the tenths that were slowest and fastest: what happens but once does not count.
    """
    times: list[list[float]] = [[] for _ in trials]
    spent_s = 0.0
    for number in range(_MOST_MEASURED):
        if number >= _FEWEST_MEASURED and spent_s > seconds:
            break
        for trial, own in zip(trials, times, strict=True):
            own.append(trial.step_s())
            spent_s += own[-1]
    return [mean(sorted(own)[len(own) // 10 : -(-9 * len(own) // 10)]) for own in times]
