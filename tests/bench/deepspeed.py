"""What ZeRO by DeepSpeed saves and costs: stages 1 to 3, and 2 with the optimizer in host memory, against DDP.

All train configs/gpt/plain.yaml on the same data from the same seed, on two ranks under torchrun, with a quarter of its
tokens a micro-batch: the harder case, since what DeepSpeed adds to a step depends little on them. Each is a real
`training.gpt` whose steps wait for their turn, so that all are at work within the same minutes; the ratio of step times
is the median over the rounds. On two GPUs where there are so many, else on the CPU with a thread a rank: there "host
memory" is no other than the rest, and offload saves nothing.

- Memory is what is really there, counted in a step once the optimizer has its state: every distinct storage that a
  tensor of the process lies in, on the rank that has most. Of the optimizer: what can be reached from it, copies of
  weights included, but not the model's own weights. `_memory_ratio`: all that is alive between two passes (weights,
  optimizer, gradients, DeepSpeed's buffers), at the moment when it is most; activations are the same in all. A buffer
  of stage 3 is as large as this small model; it never has more than 200 MB. `_peak_mb`: the most that the first rank's
  process used, activations and libraries included (on GPUs what torch allocated; else resident, which grows with the
  number of steps while the tensors do not).
- `_loss_difference`: the largest relative one to DDP's training loss, in fp32, over the same 102 (--quick: 8) steps.
- `loading_share`: host memory that no file stands behind; the weights that are read lie in mapped files.
- `_resume_ratio`: from the command to the first step, with the checkpoint that the DDP run left.

A start takes longer than all of the rest: --quick leaves out the resumed runs and offload, computes fewer tokens, and
forks the two ranks of a side from one process that has imported everything, unless they use GPUs.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import training.gpt as gpt
from tests.bench.common import (
    PLAIN,
    PLAIN_DATA,
    ROOT,
    Figure,
    Worker,
    environment,
    prepare,
    ratio_by_rounds,
    read_arguments,
    report,
    workers,
)
from tests.support.zygote import fork_ranks
from training.base.console import UserError, run_main, say
from training.data.prepared import Prepared
from training.engine import loop
from training.engine.cluster import Cluster
from training.engine.metrics import read_metrics
from training.engine.parallel import Parallel

RANKS = 2
WARM_UP_STEPS = 2
NEVER = 10**9

SIDES = {
    "ddp": (),
    "zero1": ("--parallel", "deepspeed", "--zero.stage", 1),
    "zero2": ("--parallel", "deepspeed", "--zero.stage", 2),
    "zero3": ("--parallel", "deepspeed", "--zero.stage", 3),
    "offload": ("--parallel", "deepspeed", "--zero.stage", 2, "--zero.offload", "optimizer"),
}
SHAPE_OF_HALF_A_BILLION = {
    **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    **{"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
}
ABOUT = {"zero1": "ZeRO 1", "zero2": "ZeRO 2", "zero3": "ZeRO 3", "offload": "ZeRO 2, optimizer in host memory"}
RESUMED = ("ddp", "zero2", "zero3")


class Turns:
    """An engine whose steps wait until the bench asks for some; it answers with the seconds that one of them took.

    When the bench stops asking the process ends. In the last step of the warm-up it counts what memory is held.
    """

    def __init__(self, engine: Parallel, cluster: Cluster, held: Path, answers: Any):
        self._engine, self._cluster, self._held, self._answers = engine, cluster, held, answers
        self._asked = self._left = self._done = 0
        self._began = 0.0
        self._most: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        if not self._left:
            self._wait()
        if self._done + 1 == WARM_UP_STEPS:
            self._look()
        return self._engine.micro_batch(last)

    def step(self, lr: float) -> Tensor:
        if self._done + 1 == WARM_UP_STEPS:
            self._look()
        norm = self._engine.step(lr)
        self._done, self._left = self._done + 1, self._left - 1
        if self._done == WARM_UP_STEPS:
            ranks = self._cluster.gather(self._most, dict[str, int])
            if self._cluster.is_first:
                self._held.write_text(json.dumps(ranks), encoding="utf-8")
        if not self._left:
            if self._cluster.device.type == "cuda":
                torch.cuda.synchronize()
            if self._cluster.is_first:
                print((time.monotonic() - self._began) / self._asked, file=self._answers, flush=True)
        return norm

    def _wait(self) -> None:
        line = sys.stdin.readline() if self._cluster.is_first else ""
        (asked,) = self._cluster.maximum([float(line or 0)])
        if not asked:
            os._exit(0)
        self._asked = self._left = int(asked)
        self._began = time.monotonic()

    def _look(self) -> None:
        now = held(self._engine.model, self._engine.optimizer)
        if sum(now.values()) > sum(self._most.values()):
            self._most = now


def held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of all storages that tensors of this process lie in: of the weights, of the optimizer alone, of the rest.

    Stage 3 leaves a rank's part of a weight in its attribute `ds_tensor`.
    """
    weights = storages(
        tensor for own in (*model.parameters(), *model.buffers()) for tensor in (own, getattr(own, "ds_tensor", own))
    )
    optimizers = storages(tensors_in([optimizer.param_groups, *optimizer.state.items()]))
    gc.collect()
    every = storages(each for each in gc.get_objects() if issubclass(type(each), Tensor))
    parts = {"weights": weights, "optimizer": optimizers.keys() - weights.keys()}
    parts["rest"] = every.keys() - weights.keys() - optimizers.keys()
    sizes = every | optimizers | weights
    return {name: sum(sizes[storage] for storage in part) for name, part in parts.items()}


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Sizes in bytes of the storages that tensors lie in, by address."""
    found = (tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta")
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors within containers within each other, those that are keys included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.items()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def train(output: str, held_file: str, *words: str) -> int:
    """A rank of a side, a process of its own: `training.gpt words...`, step by step as it is asked. See `Turns`."""
    # What trainings and their libraries say must not get among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with Path(output).open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    usual = loop.parallel_of

    def in_turns(config: Any, task: Any, cluster: Cluster, precision: Any) -> Any:
        return Turns(usual(config, task, cluster, precision), cluster, Path(held_file), answers)

    loop.parallel_of = in_turns
    sys.argv[1:] = words
    return gpt.main()


class Bench:
    """The sides, and what they train."""

    def __init__(self, data: Prepared, folder: Path, *, rounds: int, steps: int, tokens: int, fork: bool):
        self.folder, self.fork = folder, fork
        self.rounds, self.steps = rounds, steps
        self.counted = WARM_UP_STEPS + self.rounds * self.steps
        self.words = [
            *(PLAIN, "--data", data.folder, "--precision", "fp32", "--batch.tokens_per_micro_batch", tokens),
            *("--optim.steps", 10_000, "--log.every_steps", 1, "--log.validate_every_steps", NEVER),
            # Whoever has had its turn waits for hours if need be.
            *("--checkpoint.background", "false", "--session.hang_timeout", 36_000),
        ]
        # On the CPU where the GPUs do not suffice.
        self.gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1") if torch.cuda.device_count() >= RANKS else ""

    def start(self, side: str, run: str) -> Worker:
        """A training of this side in the run folder of this name. The first asked for DDP's next step saves."""
        every = self.counted if run == "ddp" else NEVER
        files = (self.folder / f"{run}.txt", self.folder / f"{run}.json")
        words = (*self.words, "--run_dir", self.folder / run, "--checkpoint.every_steps", every, *SIDES[side])
        module, launcher = "tests.bench.deepspeed", ["fork"]
        if not self.fork or self.gpus:
            launcher = ["--standalone", f"--nproc-per-node={RANKS}", "-m", module, "train"]
            module = "torch.distributed.run"
        return Worker(module, *launcher, *files, *words, threads=1, CUDA_VISIBLE_DEVICES=self.gpus)

    def said(self, run: str) -> str:
        """What a run has printed."""
        path = self.folder / f"{run}.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def steps_of(self, started: dict[str, Worker], side: str, steps: int) -> float:
        """Lets a side do so many steps, and waits; returns the seconds of one."""
        try:
            started[side].ask(steps)
            return started[side].answer()
        except (UserError, BrokenPipeError) as error:
            raise UserError(f"{side}: the training ended by itself:\n{self.said(side)[-3000:]}") from error

    def resume(self, side: str, number: int) -> float:
        """Seconds from the command to the first step after DDP's checkpoint."""
        run = f"{side}-resumed-{number}"
        shutil.copytree(self.folder / "ddp", self.folder / run)
        began = time.monotonic()
        with workers(**{run: self.start(side, run)}) as started:
            self.steps_of(started, run, 1)
            seconds = time.monotonic() - began
        if f"resuming at step {self.counted:,}" not in self.said(run):
            raise UserError(f"{run} did not resume:\n{self.said(run)[-3000:]}")
        shutil.rmtree(self.folder / run)
        return seconds

    def largest(self, side: str, *kinds: str) -> int:
        """Bytes of these kinds that the rank holds which holds most of them; of all kinds if none is named."""
        ranks = json.loads((self.folder / f"{side}.json").read_text(encoding="utf-8"))
        return max(sum(rank[kind] for kind in kinds or rank) for rank in ranks)

    def loss_difference(self, side: str) -> float:
        """The largest relative one to DDP's training loss over the steps that count."""
        records = (read_metrics(self.folder / run) for run in (side, "ddp"))
        ours, theirs = ({line["step"]: line["loss"] for line in record} for record in records)
        return max(abs(ours[step] / theirs[step] - 1) for step in range(1, self.counted + 1))

    def peak_mb(self, side: str) -> float:
        return read_metrics(self.folder / side)[-1]["memory_mb"]


def loading_share(folder: Path) -> float:
    """Host memory of a rank of four at the most while they load a base model in 4 bits, over the published model.

    A random model of Qwen2.5-0.5B's shape, in bf16, whose embedding is a quarter of it.
    """
    import transformers

    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen2Config(**SHAPE_OF_HALF_A_BILLION), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command += ["-m", "tests.support.zero_loading", str(folder)]
    variables = {**environment(1), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        raise UserError(f"the base model was not loaded:\n{done.stderr[-3000:]}")
    sizes = json.loads(found[-1])
    return float(sizes["peak"] / sizes["published"])


def main(words: Sequence[str] | None = None) -> int:
    if words is None and sys.argv[1:2] == ["train"]:
        return train(*sys.argv[2:])
    if words is None and sys.argv[1:2] == ["fork"]:
        with redirect_stdout(sys.stderr):  # it says there that it finds no GPU
            importlib.import_module("deepspeed")
        fork_ranks(RANKS)
        return train(*sys.argv[2:])
    arguments = read_arguments("deepspeed", __doc__, words)
    rounds, steps, tokens, sides = arguments.sized(
        whole=(10, 10, 256, list(SIDES)), quick=(3, 2, 160, ["ddp", "zero1", "zero2", "zero3"])
    )
    resumed = () if arguments.quick else RESUMED
    step_s: defaultdict[str, list[float]] = defaultdict(list)
    resume_s: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        folder = Path(temporary)
        say(f"preparing {arguments.about_data}")
        data = prepare(arguments, folder / "data", *PLAIN_DATA)
        bench = Bench(data, folder, rounds=rounds, steps=steps, tokens=tokens, fork=arguments.quick)
        with workers(**{side: bench.start(side, side) for side in sides}) as started:
            for side in sides:
                bench.steps_of(started, side, WARM_UP_STEPS)
            for number in range(bench.rounds):
                for side in sides:
                    step_s[side].append(bench.steps_of(started, side, bench.steps))
                about = ", ".join(f"{side} {seconds[-1]:.3f} s" for side, seconds in step_s.items())
                say(f"round {number + 1} of {bench.rounds}: a step takes {about}")
            for side in sides:  # a line of the record is written, and a checkpoint saved, behind the answer
                bench.steps_of(started, side, 1)
        for number in range(3 if resumed else 0):
            for side in resumed:
                resume_s[side].append(bench.resume(side, number))
            about = ", ".join(f"{side} {seconds[-1]:.2f} s" for side, seconds in resume_s.items())
            say(f"resuming takes {about}")

        optimizer, whole = ({side: bench.largest(side, *kinds) for side in sides} for kinds in (["optimizer"], []))
        ratio = {side: optimizer[side] / optimizer["ddp"] for side in sides}
        meaning = "what the optimizer holds on a rank, ZeRO 1 over DDP"
        figures = [Figure("optimizer_memory_ratio", ratio["zero1"], meaning, "<= 0.55")]
        for side in sides[1:]:
            step_ratio = ratio_by_rounds(step_s[side], step_s["ddp"])
            losses = f"largest relative one to DDP's loss in {bench.counted} steps"
            figures += [
                Figure(f"{side}_step_ratio", step_ratio, f"{ABOUT[side]}: time of a step, over DDP"),
                Figure(f"{side}_optimizer_ratio", ratio[side], "what the optimizer holds, over DDP"),
                Figure(f"{side}_memory_ratio", whole[side] / whole["ddp"], "all tensors between passes, over DDP"),
                Figure(f"{side}_peak_mb", bench.peak_mb(side), "the process at its most"),
                Figure(f"{side}_loss_difference", bench.loss_difference(side), losses, "<= 1e-4"),
            ]
            if side in resumed:
                resume_ratio = ratio_by_rounds(resume_s[side], resume_s["ddp"])
                figures.append(Figure(f"{side}_resume_ratio", resume_ratio, "command to first step, over DDP"))
        figures += [
            Figure("ddp_step_s", median(step_s["ddp"]), f"torchrun, {RANKS} ranks"),
            Figure("ddp_optimizer_mb", optimizer["ddp"] / 1e6, "on a rank"),
            Figure("ddp_memory_mb", whole["ddp"] / 1e6, "on a rank"),
            Figure("ddp_peak_mb", bench.peak_mb("ddp"), "the process at its most"),
        ]
        if not arguments.quick:
            meaning = "memory of a rank of four while a base model of 0.5 B is loaded, over the published model"
            figures.append(Figure("loading_share", loading_share(folder / "base"), meaning, "<= 0.33"))
        if resumed:
            figures.append(Figure("ddp_resume_s", median(resume_s["ddp"]), "command to first step"))
        kinds = ("weights", "optimizer", "rest")
        held_mb = {side: {kind: round(bench.largest(side, kind) / 1e6, 3) for kind in kinds} for side in sides}
        device = "cuda" if bench.gpus else "cpu"
        report("deepspeed", arguments, figures, held_mb=held_mb, device=device, steps=bench.counted)
    return 0


if __name__ == "__main__":
    run_main(main)
