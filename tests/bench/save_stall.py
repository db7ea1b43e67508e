"""What a save costs a training: written in the background against waiting for the disk, for 100 M parameters.

One process with one thread trains a GPT of about 100 M parameters (1.3 GB of weights and AdamW moments; a fifth of that
with --quick) and saves it by `training.engine.saver.Saver`, in turns with `checkpoint.background` and without; each
save is brought to its end before the next begins, so none waits for another. The stall is the time until training may
go on. With a core to spare the background costs nothing else; by how much it slowed the steps beside it is told too.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Literal

import torch
import torch.nn.functional as F

from tests.bench.common import NO_RUN, Figure, read_arguments, report
from training.base.console import run_main, say
from training.base.environment import keep_freed_memory
from training.engine.checkpoint import tensors_of
from training.engine.saver import CheckpointOptions, Saver
from training.models.gpt import GPT, GPTOptions, Vocabularies

MODEL = GPTOptions(layers=14, heads=12, width=768, context=64)
QUICK_MODEL = GPTOptions(layers=5, heads=8, width=512, context=64)
SMOKE_MODEL = GPTOptions(layers=1, heads=2, width=64, context=64)
VOCABULARY = 8000
TOKENS = 32  # a step: little, since a save is a matter of the model's size alone

Kind = Literal["background", "synchronous", "none"]


class Training:
    """A model, its optimizer, and steps to keep the machine busy with while a save goes on."""

    def __init__(self, options: GPTOptions):
        torch.manual_seed(0)
        self.model = GPT(options, Vocabularies(VOCABULARY))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.step()

    def step(self) -> float:
        """One optimizer step; returns its seconds."""
        began = time.monotonic()
        tokens = torch.randint(0, VOCABULARY, (1, TOKENS + 1))
        logits = self.model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.monotonic() - began

    def save(self, saver: Saver, step: int) -> list[float]:
        """A save, and the steps until it is done; returns their seconds."""
        saver.save(step, tensors_of(self.model, self.optimizer), {"scores": {}})
        steps = []
        while saver.is_busy:
            steps.append(self.step())
        saver.drain()
        return steps


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("save_stall", __doc__, words)
    saves, model = arguments.sized(whole=(6, MODEL), quick=(2, QUICK_MODEL), smoke=(2, SMOKE_MODEL))
    torch.set_num_threads(1)
    keep_freed_memory()
    training = Training(model)
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    alone = median(training.step() for _ in range(5))
    savers, beside = {}, []
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
        for kind in ("background", "synchronous"):
            saver = Saver(Path(folder, kind), CheckpointOptions(keep=1, background=kind == "background"), NO_RUN)
            saver.prepare(tensors_of(training.model, training.optimizer))
            saver.drain()
            savers[kind] = saver
        for number in range(saves):
            for kind, saver in savers.items():
                steps = training.save(saver, number)
                beside += steps[:-1]  # the last one goes on after the save
                say(f"{kind}: stall {saver.stalls_s[-1]:.2f} s, published after {saver.saves_s[-1]:.2f} s")
    background, synchronous = (mean(savers[kind].stalls_s) for kind in ("background", "synchronous"))
    slower = sum(beside) - alone * len(beside)
    report(
        "save_stall",
        arguments,
        [
            Figure("stall_ratio", background / synchronous, "training kept waiting, background over sync", "< 0.1"),
            Figure("background_stall_s", background, "copying the state"),
            Figure("synchronous_stall_s", synchronous, "hashing, writing, fsync and reading back"),
            Figure("published_after_s", mean(savers["background"].saves_s), "in the background, beside training"),
            Figure("step_s", alone, "a step without a save beside it"),
            Figure("slower_s", slower / saves, "per save, by which the steps beside it took longer"),
        ],
        parameters=parameters,
    )
    return 0


if __name__ == "__main__":
    run_main(main)
