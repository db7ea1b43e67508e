"""What the benches share: command line, prepared data, child processes, and the report.

Everything measured runs on the CPU, in processes of its own with a stated number of threads, so neither this process's
settings nor what ran before play into a figure. With --quick what is one process is forked from this one, which has
imported everything; with --smoke nothing is measured, and the same code runs in this process.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from training.base.console import UserError, say
from training.base.environment import cores_seen, keep_freed_memory
from training.base.options import FLAG, CommandLine, parse
from training.data.prepared import Prepared, PreparedFolder, open_prepared
from training.engine.metrics import read_metrics
from training.engine.optim import OptimOptions, build_optimizer
from training.evaluation.translations.translators import TRANSLATORS

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("RELAY_DATA", ROOT.parent / "shared/data"))
TATOEBA = SHARED / "tatoeba/cmn.txt"

# The recipes that the translators are trained with for real; benches shorten them and point them elsewhere.
PLAIN = ROOT / "configs/gpt/plain.yaml"
SEQ2SEQ = ROOT / "configs/seq2seq/base.yaml"
_PIECES = ("--tokenizer", "sentencepiece", "--simplify", "true")
PLAIN_DATA = (*_PIECES, "--vocabularies", "joint", "--vocabulary_size", "8000")
WORDS = ("--tokenizer", "word", "--vocabularies", "joint", "--simplify", "false")
SEQ2SEQ_DATA = (*_PIECES, "--vocabularies", "separate", "--vocabulary_size", "4000")

# Labels that are not learned, as torch's cross-entropy has them.
IGNORED = -100

# An optimizer step of the seed recipes.
SENTENCES_PER_STEP = 32

# What a manifest says of a checkpoint that belongs to no run.
NO_RUN: dict[str, Any] = {"task": "none", "config": {}, "data": {}, "versions": {}}

T = TypeVar("T")


@dataclass(frozen=True)
class Arguments:
    """The command line of a bench. data: raw file (or folder) of what it trains on, or `sample`. more: what this bench
    alone has. smoke: what --quick leaves out is left out here too.
    """

    quick: bool
    data: str
    more: argparse.Namespace
    smoke: bool = False

    def sized(self, *, whole: T, quick: T, smoke: T | None = None) -> T:
        """How much to do: the one of these that was asked for."""
        if self.smoke and smoke is not None:
            return smoke
        return quick if self.quick else whole

    @property
    def about_data(self) -> str:
        """Whose sentences the figures are for."""
        if self.data == "sample":
            return "the sample corpus (generated, with a small vocabulary: not the figures of real text)"
        path = Path(self.data)
        size = sum(each.stat().st_size for each in ([path] if path.is_file() else path.iterdir()))
        return f"{path.name} ({size:,} bytes)"


def read_arguments(
    name: str,
    about: str,
    words: Sequence[str] | None = None,
    add_more: Callable[[argparse.ArgumentParser], Any] | None = None,
    *,
    data: Path = TATOEBA,
    what: str = "raw Tatoeba file",
) -> Arguments:
    """--quick, --smoke and --data, from `words`, or from the command line.

    Without --data `data`, which is `what`, where it lies beside the checkout, else the sample. add_more: adds the
    arguments that this bench alone has.
    """
    parser = CommandLine(f"python -m tests.bench.{name}", about)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", **FLAG, help="about a minute; the same figures, noisier")
    size.add_argument(
        "--smoke",
        **FLAG,
        help="a few seconds: two steps of everything, in one process; its speeds mean nothing. As --quick where what "
        "is measured is processes of their own",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        default=str(data) if data.exists() else "sample",
        help=f"{what}, or `sample` for generated data (default: %(default)s)",
    )
    if add_more is not None:
        add_more(parser)
    found = parser.parse_args(words)
    there = Path(found.data).is_file() if data.suffix == ".txt" else Path(found.data).is_dir()
    if found.data != "sample" and not there:
        raise UserError(f"there is no {what} {found.data}: name one, or --data sample")
    arguments = Arguments(found.quick or found.smoke, found.data, found, found.smoke)
    if arguments.quick:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, nor does it start others: see `forked`
    return arguments


def prepare(arguments: Arguments, folder: Path, *options: str, validation_share: float = 0.01) -> Prepared:
    """Prepares the raw data into `folder` by the command that users run. Few benches need more for validation."""
    words = ["--source", arguments.data, "--output", folder, "--validation_share", validation_share]
    run_module("data_prep.pairs", *words, *options, here=arguments.quick)
    return open_prepared(folder)


def environment(threads: int, **more: str) -> dict[str, str]:
    """Environment of a process that computes with `threads` threads on the CPU."""
    ours = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **ours, **more}


# Ways to run one process on two cores, by name; of a peer, the one that is fastest here counts. A thread that waits for
# the others sleeps at once, or first spins for some milliseconds, as OpenMP does when it is told nothing.
ASLEEP, SPINNING, ALONE = "2 threads, waiting asleep", "2 threads, waiting in a spin", "1 thread"
WAYS: dict[str, dict[str, Any]] = {
    ASLEEP: {"threads": 2},
    SPINNING: {"threads": 2, "GOMP_SPINCOUNT": "300000"},
    ALONE: {"threads": 1},
}


def run_module(
    module: str,
    *words: object,
    ranks: int = 1,
    threads: int = 1,
    here: bool = False,
    fork: bool = False,
    **more: str,
) -> None:
    """Runs `python -m module words...` from the repository's root, under torchrun when `ranks` > 1.

    here: in this process instead, as one rank with the threads and the environment that it has. fork: in one that is
    forked from this, unless there are several ranks. more: of its environment. Raises UserError with the end of its
    output when it fails.
    """
    if here:
        return run_here(module, *words)
    if fork and ranks == 1 and not more:
        return forked(partial(run_here, module, *words), threads)
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, module, *map(str, words)]
    ours, pipe = environment(threads, **more), subprocess.PIPE
    done = subprocess.run(command, cwd=ROOT, env=ours, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")


def how_to_run(arguments: Arguments) -> dict[str, Any]:
    """`here` and `fork` of `run_module`, by the size of the bench."""
    return {"here": arguments.smoke, "fork": arguments.quick and not torch.cuda.is_available()}


# A process has one command line and one standard output.
_one_at_a_time = threading.Lock()


def run_here(module: str, *words: object) -> None:
    """`python -m module words...` within this process. Raises UserError when it fails."""
    main, printed = importlib.import_module(module).main, io.StringIO()
    with _one_at_a_time:
        before, sys.argv = sys.argv, [module, *map(str, words)]
        try:
            with redirect_stdout(printed):
                status = main()
        finally:
            sys.argv = before
    if status:
        raise UserError(f"{module} ended with status {status}:\n{printed.getvalue()[-3000:]}")


# A piece of work of a given amount; returns what it came to.
Work = Callable[[float], float]


class Worker:
    """A process that waits without using the CPU, and does a piece of work whenever it is asked: see `serve`.

    Peers can so take turns, or work at the same moment, without starting anew each time.
    """

    def __init__(self, module: str, *words: object, threads: int, **more: str):
        command = [sys.executable, "-m", module, *map(str, words)]
        ours, pipe = environment(threads, **more), subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, env=ours, stdin=pipe, stdout=pipe, text=True)

    def ask(self, amount: float) -> None:
        """Starts a piece of work of this amount."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{amount}\n")
        self._process.stdin.flush()

    def answer(self) -> float:
        """Waits for what the work asked for came to."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"a peer of the bench ended by itself, exit status {self._process.wait()}")
        return float(line)

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def serve(work: Work) -> None:
    """The other end of `Worker`: one amount a line on standard input, one result a line on standard output."""
    for line in sys.stdin:
        print(work(float(line)), flush=True)


_FORK = multiprocessing.get_context("fork")


class WorkerForked:
    """A worker that is forked from this process, so that it need not start and import first.

    That works because this process computes with one thread only; and not with a GPU, which no child may use.
    """

    def __init__(self, make: Callable[[], Work], threads: int, environment: Mapping[str, str] | None = None):
        self._end, other = multiprocessing.Pipe()
        words = (make, threads, environment or {}, other)
        self._process = _FORK.Process(target=_serve_forked, args=words, daemon=True)
        self._process.start()
        other.close()

    def ask(self, amount: float) -> None:
        self._end.send(float(amount))

    def answer(self) -> Any:
        try:
            return self._end.recv()
        except EOFError:
            self._process.join()
            raise UserError(f"a peer of the bench ended by itself, exit status {self._process.exitcode}") from None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _serve_forked(make: Callable[[], Work], threads: int, environment: Mapping[str, str], end: Any) -> None:
    """The other end of `WorkerForked`."""
    os.environ.update(environment)
    torch.set_num_threads(threads)
    work = make()
    while True:
        end.send(work(end.recv()))


def forked(function: Callable[[], T], threads: int) -> T:
    """What the function returns in a process that is forked from this one."""
    with workers(it=WorkerForked(lambda: lambda _: function(), threads)) as started:  # type: ignore[arg-type]
        started["it"].ask(1)
        return started["it"].answer()  # type: ignore[return-value]


class WorkerHere:
    """A worker that is no process: it does the work when it is to answer."""

    def __init__(self, work: Work):
        self._work, self._amount = work, 0.0

    def ask(self, amount: float) -> None:
        self._amount = float(amount)

    def answer(self) -> float:
        return self._work(self._amount)

    def stop(self) -> None:
        pass


AnyWorker = Worker | WorkerForked | WorkerHere


def start_worker(
    arguments: Arguments, module: str, function: str, *words: object, threads: int, **more: str
) -> AnyWorker:
    """A worker that does what `function(*words)` of this module returns; with --smoke in this process."""

    def make() -> Work:
        return getattr(importlib.import_module(module), function)(*map(str, words))

    if arguments.smoke:
        return WorkerHere(make())
    if arguments.quick and not torch.cuda.is_available():
        return WorkerForked(make, threads, more)
    return Worker("tests.bench.worker", module, function, *words, threads=threads, **more)


@contextmanager
def workers(**started: AnyWorker) -> Iterator[dict[str, AnyWorker]]:
    """The workers by name, stopped at the end whatever happens."""
    try:
        yield started
    finally:
        for worker in started.values():
            worker.stop()


@dataclass(frozen=True)
class Speed:
    """Steady speed of a training, of all ranks together. Tokens are real ones, padding not counted.

    memory_mb: the first rank's peak.
    """

    steps_per_s: float
    tokens_per_s: float
    flops_per_s: float
    memory_mb: float


def plain_of(arguments: Arguments) -> list[object]:
    """What trains configs/gpt/plain.yaml; with --smoke an eighth of its tokens at a time."""
    return [PLAIN, *arguments.sized(whole=(), quick=(), smoke=("--batch.tokens_per_micro_batch", 128))]


def config_of(family: str, words: Sequence[object], data: PreparedFolder) -> Any:
    """What `training.<family> words... --data ...` runs with."""
    words = [*map(str, words), "--data", str(data.folder), "--run_dir", "unused"]
    return parse(TRANSLATORS[family].config, words, prog=f"python -m training.{family}", about="")[0]


def timed_training(
    family: str,
    words: Sequence[object],
    data: PreparedFolder,
    run_dir: Path,
    *,
    steps: int,
    ranks: int,
    threads: int,
    under: str | None = None,
    here: bool = False,
    fork: bool = False,
    **more: str,
) -> Speed:
    """Runs `training.<family>` for `steps` steps, as users start it, and reads its speed from the run's own record.

    The first quarter of the steps, one at least, is warm-up and not counted; nor are validation and saving, after the
    last step. under: a module that runs the training in an arranged process; here, fork, more: see `run_module`.
    """
    never = 10**9
    run_module(
        *([under] if under else []),
        f"training.{family}",
        *words,
        *("--data", data.folder, "--run_dir", run_dir, "--optim.steps", steps, "--optim.warmup_steps", 0),
        *("--log.every_steps", max(1, steps // 4), "--log.validate_every_steps", never),
        *("--checkpoint.every_steps", never),
        ranks=ranks,
        threads=threads,
        here=here,
        fork=fork,
        **more,
    )
    lines = [line for line in read_metrics(run_dir) if line["kind"] == "train"]
    seconds = [after["time"] - before["time"] for before, after in pairwise(lines)]

    def total(rate: str) -> float:
        return sum(line[rate] * duration for line, duration in zip(lines[1:], seconds, strict=True))

    return Speed(
        (lines[-1]["step"] - lines[0]["step"]) / sum(seconds),
        total("tokens_per_s") / sum(seconds),
        total("flops_per_s") / sum(seconds),
        max(line["memory_mb"] for line in lines),
    )


def usual_loop(model: nn.Module, optim: OptimOptions, tensors: Sequence[Tensor], loss: Callable[..., Tensor]) -> Work:
    """A peer that trains in the usual loop: asked for a number of steps, it answers with the sentences a second.

    tensors [n, ...]: the whole data set, padded. loss(model, *batch): the mean loss of SENTENCES_PER_STEP rows of them.
    """
    keep_freed_memory()
    optimizer = build_optimizer(model, optim, steps=1)
    loader = DataLoader(TensorDataset(*tensors), batch_size=SENTENCES_PER_STEP, shuffle=True, drop_last=True)
    epoch = iter(loader)

    def train(steps: float) -> float:
        nonlocal epoch
        began = time.monotonic()
        for _ in range(int(steps)):
            batch = next(epoch, None)
            if batch is None:
                epoch = iter(loader)
                batch = next(epoch)
            optimizer.zero_grad()
            value = loss(model, *batch)
            value.backward()
            if optim.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            optimizer.step()
            value.item()
        return steps * SENTENCES_PER_STEP / (time.monotonic() - began)

    return train


class Padded:
    """Collates ids and labels to the longest row of the batch, padded on the right."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        def padded(name: str, value: int) -> Tensor:
            return nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
        return {
            "input_ids": padded("input_ids", self.pad_id),
            "labels": padded("labels", IGNORED),
            "attention_mask": mask,
        }


def counting_trainer(folder: str, model: nn.Module, records: Any, pad_id: int, **arguments: Any) -> Any:
    """A `transformers.Trainer` that says and saves nothing, and counts the tokens that it trains on.

    records: rows of input_ids and labels. arguments: TrainingArguments of its own. It has `tokens`, and `began`, the
    monotonic time of its first step.
    """
    import transformers

    class Counting(transformers.Trainer):
        tokens: Any = 0
        began = 0.0

        def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *more: Any) -> Tensor:
            self.began = self.began or time.monotonic()
            self.tokens = self.tokens + inputs["attention_mask"].sum()
            return super().training_step(model, inputs, *more)

    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    found = Counting(
        model=model,
        args=transformers.TrainingArguments(
            folder, lr_scheduler_type="constant", remove_unused_columns=False, **quiet, **arguments
        ),
        train_dataset=records,
        data_collator=Padded(pad_id),
    )
    found.remove_callback(transformers.PrinterCallback)  # standard output is for answers
    return found


def checked_difference(ours: float, theirs: float, peer: str) -> float:
    """How far two losses lie apart. Raises UserError above 1e-5."""
    if not abs(ours - theirs) <= 1e-5:
        raise UserError(f"the two sides do not train the same: loss {ours:.7f} (Relay) and {theirs:.7f} ({peer})")
    return abs(ours - theirs)


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's own storages, those of the scales of layers in 4 bits included."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:
            tensors += [each for each in (state.absmax, state.code, state.offset) if each is not None]
            state = state.state2
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def peak_of_tensors(work: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator had given out at a time during `work`, over those given out before it.

    By the profiler, which sees every allocation, those that kernels make for themselves included.
    """
    gc.collect()  # what was garbage before would else be given back during the work
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class Race:
    """A seed recipe as Relay trains it, and a peer's usual loop, in turns; `peers`: the peer by the way it is run."""

    def __init__(
        self,
        family: str,
        words: Sequence[object],
        data: Prepared,
        folder: Path,
        peers: dict[str, AnyWorker],
        arguments: Arguments,
    ):
        self.family, self.words, self.data, self.folder, self.peers = family, words, data, folder, peers
        self.how = how_to_run(arguments)
        self.speeds: defaultdict[str, list[float]] = defaultdict(list)  # sentences a second, by rounds
        for peer in peers.values():  # the first piece of work also sets things up
            peer.ask(1)
            peer.answer()

    def run_round(self, relay_steps: int, peer_steps: int) -> str:
        """Lets each side train once; returns the speeds of this round, in words."""
        number = len(self.speeds["relay 2"])
        for ranks in (2, 1):
            run_dir = Path(self.folder, f"seed-{number}-{ranks}")
            how = {"steps": relay_steps, "ranks": ranks, "threads": 2 // ranks, **self.how}
            speed = timed_training(self.family, self.words, self.data, run_dir, **how)
            self.speeds[f"relay {ranks}"].append(speed.steps_per_s * SENTENCES_PER_STEP)
            for way in list(self.peers)[2 - ranks :: 2]:  # some behind the one, some behind the other
                self.peers[way].ask(peer_steps)
                self.speeds[way].append(self.peers[way].answer())
        return ", ".join(f"{side} {values[-1]:,.4g}" for side, values in self.speeds.items())

    @property
    def best_way(self) -> str:
        """The way in which the peer runs fastest: the one that counts."""
        return max(self.peers, key=lambda way: median(self.speeds[way]))

    def figures(self, peer: str, target: str) -> list[Figure]:
        """The speeds, and the ratios of Relay's to those of the peer, which is called `peer`."""
        two, one, theirs = (self.speeds[side] for side in ("relay 2", "relay 1", self.best_way))
        ratio, one_process_ratio = ratio_by_rounds(two, theirs), ratio_by_rounds(one, theirs)
        return [
            Figure("sentences_ratio", ratio, f"Relay (2 ranks) over the {peer}", target),
            Figure("one_process_ratio", one_process_ratio, "Relay as one process of 2 threads, over the same"),
            Figure("relay_sentences_per_s", median(two), "torchrun, 2 ranks x 1 thread"),
            Figure("relay_one_process_sentences_per_s", median(one), "1 process x 2 threads"),
            Figure(f"{peer}_sentences_per_s", median(theirs), f"1 process, {self.best_way}"),
        ]


def ratio_by_rounds(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of ours / theirs: within a round the machine has changed least."""
    return median(our / their for our, their in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Figure:
    """One measured number. target: what is aimed at, in words, where something is."""

    name: str
    value: float
    meaning: str
    target: str = ""


def report(bench: str, arguments: Arguments, figures: Sequence[Figure], **more: Any) -> None:
    """Prints the figures as a table, then as one JSON object on the last line."""
    smoke = " --smoke: speeds mean nothing" if arguments.smoke else ""
    say(f"\n{bench}: data {arguments.about_data}; {cores_seen()} cores, torch {torch.__version__}{smoke}")
    rows = [(figure.name, show(figure.value), figure.target, figure.meaning) for figure in figures]
    rows.insert(0, ("figure", "value", "target", "meaning"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, value, target, meaning in rows:
        say(f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {target:<{widths[2]}}  {meaning}")
    about = {"bench": bench, "quick": arguments.quick, "data": Path(arguments.data).name, "cores": cores_seen()}
    if arguments.smoke:
        about["smoke"] = True
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    say(json.dumps({**about, **versions, **{figure.name: figure.value for figure in figures}, **more}))


def show(value: float) -> str:
    """A number with the digits that mean something."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1e-3 else f"{value:.4g}"
