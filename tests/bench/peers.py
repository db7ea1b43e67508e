"""Relay's trainings against those of other projects: the same data, models of the same size, side by side in one run.

Sentences a second of steady training, as each project's own command trains, on the pieces of configs/gpt/plain.yaml
and, for the seq2seq, of configs/seq2seq/base.yaml:

- `gpt_vs_trainer`: `transformers.Trainer` trains its GPT-2 of the very shape (4 layers of width 256, learned positions,
  exact GELU, dropout 0.2), from the same initial weights; sentences of near-equal length in a batch, padded to the
  longest of it; labels on the English side only; the fused optimizer. Before anything is timed, both must give the same
  loss for the same sentences, to 1e-5.
- `gpt_vs_trainer_bf16`: the same with both under autocast to bf16, on a processor that multiplies it (AMX).
- `gpt_vs_joeynmt`: JoeyNMT's Transformer of about equal parameters. An encoder-decoder: a sentence's source passes
  one half of its layers and its target the other, where all of a GPT's tokens pass all layers, so per sentence it
  computes two thirds of what the GPT does. Batches by sentences, as its documentation has them; it knows none by
  length.
- `seq2seq_vs_joeynmt`: JoeyNMT's GRU encoder-decoder with Bahdanau attention, of about equal parameters, likewise.
  Without R-Drop, which JoeyNMT does not know.

Relay is `torchrun --nproc-per-node=2`, one thread a rank. Each peer is one process. It is tried first with a step in
one batch and in four, with one thread and with two that wait for each other asleep or in a spin, and then timed in
turns with Relay in the way that was fastest (--quick: four batches, two threads, asleep). All sides train on as many
sentences an optimizer step.
QLoRA against Trainer and peft: tests/bench/qlora.py. A notebook's loop that pads everything to one length:
gpt_training.py, seq2seq_training.py.

JoeyNMT is installed into an environment of its own: see tests/bench/joeynmt.py. --smoke leaves it out.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from tests.bench import joeynmt
from tests.bench.common import (
    ASLEEP,
    IGNORED,
    PLAIN,
    PLAIN_DATA,
    SEQ2SEQ,
    SEQ2SEQ_DATA,
    WAYS,
    Arguments,
    Figure,
    Padded,
    Work,
    checked_difference,
    config_of,
    counting_trainer,
    prepare,
    ratio_by_rounds,
    read_arguments,
    report,
    start_worker,
    timed_training,
    workers,
)
from tests.bench.gpt_training import new_model
from tests.bench.seq2seq_training import new_model as new_seq2seq
from training.base.console import run_main, say
from training.data.prepared import Prepared, open_prepared
from training.data.tokenizers import EOS, PAD, SEP, SOS
from training.engine.batch_plan import BatchPlan
from training.evaluation.exports import hugging_face
from training.gpt import GPTConfig, Sequences
from training.seq2seq import TwoSides
from training.translation import plan_of, summed_loss

# What the Trainer's GPT-2 has: learned positions, and (unlike plain.yaml) no label smoothing, which is kinder to it.
AS_GPT2 = (PLAIN, "--model.positions", "learned", "--loss.label_smoothing", 0)
PLAIN_SEQ2SEQ = (SEQ2SEQ, "--loss.r_drop", 0, "--optim.kind", "adamw")

# --- transformers.Trainer --------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset):
    """Ids, and labels that are IGNORED up to the separator."""

    def __init__(self, sequences: Sequences):
        part = sequences.part
        self.rows = []
        for row in sequences.rows:
            source, target = part.source[row].tolist(), part.target[row].tolist()
            labels = (len(source) + 2) * [IGNORED] + [*target, EOS]
            ids = [SOS, *source, SEP, *target, EOS]
            self.rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def sequences_of(data: Prepared) -> tuple[GPTConfig, Sequences]:
    config = config_of("gpt", AS_GPT2, data)
    return config, Sequences.of(data, "train", config.model.context)


def sentences_a_step(plan: BatchPlan) -> int:
    """How many sentences a step has on average."""
    return round(len(plan.lengths) * plan.epoch(plan.steps) / plan.steps)


def tokens_a_sentence(plan: BatchPlan) -> float:
    """How many real tokens a pair has on average, of both sides where the model reads them apart."""
    return float(plan.lengths.sum()) / len(plan.lengths)


def trainer(folder: str, accumulated: str, precision: str) -> Work:
    """The peer's work: asked for a number of steps, it answers with the sentences a second.

    Asked for 0, it takes as many as it sorts at a time. It goes through these from the longest sentences to the
    shortest, so that fewer would be no fair part of the data.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    data = open_prepared(folder)
    config, sequences = sequences_of(data)
    model, dataset = hugging_face.model_of(new_model(config, data)).train(), Pairs(sequences)
    batch = sentences_a_step(plan_of(config, sequences)) // int(accumulated)
    # `get_length_grouped_indices` of transformers: a quarter of the data, or 50 steps of it.
    sorted_steps = min(len(dataset) // (4 * batch * int(accumulated)), 50)
    asked = 0

    def train(steps: float) -> float:
        nonlocal asked
        asked += 1
        with tempfile.TemporaryDirectory() as work:
            found = counting_trainer(
                work,
                model,
                dataset,
                PAD,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=int(accumulated),
                train_sampling_strategy="group_by_length",
                max_steps=int(steps) or sorted_steps,
                learning_rate=config.optim.lr,
                weight_decay=config.optim.weight_decay,
                max_grad_norm=config.optim.clip_norm or 0.0,
                optim="adamw_torch_fused",
                use_cpu=True,
                bf16=precision == "bf16",
                seed=asked,  # another order of the data each time
            )
            found.train()
            # Each has one token more here: <eos> is an input, too.
            return int(found.tokens) / (sequences.lengths.mean() + 1) / (time.monotonic() - found.began)

    return train


def trainer_difference(data: Prepared) -> float:
    """How far the two losses of the same sentences lie apart, dropout off. Raises UserError above 1e-5."""
    config, sequences = sequences_of(data)
    model = new_model(config, data).eval()
    theirs = hugging_face.model_of(model)
    samples = np.random.default_rng(0).choice(len(sequences.lengths), 32, replace=False)
    dataset = Pairs(sequences)
    with torch.no_grad():
        ours = summed_loss(model, sequences, samples, config.loss, torch.device("cpu")).item()
        loss = theirs(**Padded(PAD)([dataset[int(sample)] for sample in samples])).loss.item()
    return checked_difference(ours / sequences.weights(config.loss)[samples].sum(), loss, "Trainer")


@dataclass(frozen=True)
class Contest:
    """What Relay's training and a peer's are called, how each is run, and the figure that their speeds make."""

    figure: str
    ours: str
    words: Sequence[object]
    peer: str
    peer_at: Callable[[int, str], float]
    target: str


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- the run ---------------------------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("peers", __doc__, words)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        measure(arguments, Path(temporary))
    return 0


def measure(arguments: Arguments, folder: Path) -> None:
    # trainer_steps 0: as many as it sorts at a time.
    rounds, steps, trainer_steps, joeynmt_steps = arguments.sized(
        whole=(3, 40, 0, 8), quick=(1, 8, 2, 4), smoke=(1, 2, 1, 0)
    )
    say(f"preparing {arguments.about_data}")
    data = prepare(arguments, folder / "data", *PLAIN_DATA)
    two_sided = prepare(arguments, folder / "two-sided", *SEQ2SEQ_DATA)
    joeynmt.write_pairs(data, folder / "pairs", dev=8, test=8)
    joeynmt.write_pairs(two_sided, folder / "two-sided-pairs", dev=8, test=8)
    difference = trainer_difference(data)
    say(f"the same loss on both sides, difference {difference:.1e}")
    gpt, gru = config_of("gpt", [PLAIN], data), config_of("seq2seq", PLAIN_SEQ2SEQ, two_sided)
    parameters = {"gpt": parameters_of(new_model(gpt, data)), "seq2seq": parameters_of(new_seq2seq(gru, two_sided))}
    gpt_batches = plan_of(gpt, sequences_of(data)[1])
    gru_batches = plan_of(gru, TwoSides(two_sided.part("train"), gru.model.max_length))

    def relay(words: Sequence[object]) -> float:
        """Sentences a second of the training that these words start, the family's name first."""
        family, *options = words
        of, plan = (data, gpt_batches) if family == "gpt" else (two_sided, gru_batches)
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            how = {"steps": steps, "ranks": 2, "threads": 1, "here": arguments.smoke}
            speed = timed_training(str(family), options, of, Path(inside, "run"), **how)
        return speed.tokens_per_s / tokens_a_sentence(plan)

    # Each is called with the batches of a step and one of WAYS, and gives its sentences a second.

    def trainer_at(precision: str, batches: int, way: str) -> float:
        # The Trainer loads DeepSpeed where it is installed, which then says on standard output that it finds no GPU.
        how = {**WAYS[way], "DS_ACCELERATOR": "cpu"}
        peer = start_worker(arguments, "tests.bench.peers", "trainer", data.folder, batches, precision, **how)
        with workers(it=peer) as started:
            for amount in (1, trainer_steps):  # the first piece of work also sets things up
                started["it"].ask(amount)
                speed = started["it"].answer()
        return speed

    def joeynmt_at(
        of: Prepared, pairs: Path, name: str, model: joeynmt.Model, plan: BatchPlan, batches: int, way: str
    ) -> float:
        batch = sentences_a_step(plan) // batches, batches
        speed, parameters[f"joeynmt {name}"] = joeynmt.speed(of, pairs, model, batch, joeynmt_steps, way=way)
        return speed

    def against_trainer(precision: str, figure: str, target: str) -> Contest:
        words = ["gpt", *AS_GPT2, "--precision", precision]
        return Contest(
            figure, f"gpt as GPT-2 {precision}", words, f"trainer {precision}", partial(trainer_at, precision), target
        )

    def against_joeynmt() -> list[Contest]:
        model = joeynmt.transformer(gpt.model, data)
        transformer_at = partial(joeynmt_at, data, folder / "pairs", "transformer", model, gpt_batches)
        model = joeynmt.recurrent(gru.model, two_sided)
        gru_at = partial(joeynmt_at, two_sided, folder / "two-sided-pairs", "gru", model, gru_batches)
        plain = ["seq2seq", *PLAIN_SEQ2SEQ]
        return [
            Contest("gpt_vs_joeynmt", "gpt", ["gpt", PLAIN], "joeynmt transformer", transformer_at, ">= 1.3"),
            Contest("seq2seq_vs_joeynmt", "seq2seq", plain, "joeynmt gru", gru_at, ""),
        ]

    races = [against_trainer("fp32", "gpt_vs_trainer", ">= 1.5")]
    if not arguments.smoke:
        if torch.cpu.get_capabilities().get("amx_bf16"):
            races.append(against_trainer("bf16", "gpt_vs_trainer_bf16", ""))
        races += against_joeynmt()

    ways = [(4, ASLEEP)] if arguments.quick else [(batches, way) for batches in (4, 1) for way in WAYS]
    best = {}
    for race in races:
        if len(ways) == 1:
            best[race.peer] = ways[0]
            continue
        tried = {(batches, way): race.peer_at(batches, way) for batches, way in ways}
        best[race.peer] = max(tried, key=tried.__getitem__)
        each = ", ".join(f"{speed:,.4g} ({batches} batches a step, {way})" for (batches, way), speed in tried.items())
        say(f"{race.peer}: {each}")
    speeds: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for race in races:
            speeds[race.ours].append(relay(race.words))
            speeds[race.peer].append(race.peer_at(*best[race.peer]))
        say(f"round {number + 1} of {rounds}: " + ", ".join(f"{k} {v[-1]:,.4g}" for k, v in speeds.items()))

    figures = []
    for race in races:
        ratio = ratio_by_rounds(speeds[race.ours], speeds[race.peer])
        meaning = "sentences per second, {0} over {1} ({2[0]} batches a step, {2[1]})"
        figures.append(Figure(race.figure, ratio, meaning.format(race.ours, race.peer, best[race.peer]), race.target))
    figures += [Figure(f"{name} sentences_per_s", median(values), "") for name, values in speeds.items()]
    figures += [Figure(f"{name} parameters", count, "") for name, count in parameters.items()]
    figures.append(
        Figure("loss_difference", difference, "GPT-2 with the same weights, on the same sentences", "<= 1e-5")
    )
    report("peers", arguments, [replace(figure, name=figure.name.replace(" ", "_")) for figure in figures])


if __name__ == "__main__":
    run_main(main)
