"""The seq2seq as Relay trains it, against the loop of the usual tutorial.

configs/seq2seq/seed.yaml (a GRU of width 128 on each side, additive attention, words as tokens, Adam 1e-3 constant,
gradients clipped at 1) on the same sentences of up to 45 tokens, `<eos>` included, with the same initial weights, 32
sentences an optimizer step, the true word as the decoder's input throughout.

- The tutorial: every sentence padded to 45 tokens on both sides beforehand, a shuffling DataLoader; the encoder's 45
  steps and the decoder's 45 steps called one by one from Python, logits at all 45 positions, cross-entropy that ignores
  padding. One process at its best: two threads, of OpenMP's two ways of waiting the one that runs faster here (--quick:
  asleep), or one thread where that is faster still. It does better than many a tutorial: it shares this
  repository's model, whose attention projects the encoder's outputs once a sentence and not once a step, and keeps
  padding out of both the attention and the encoder's last state, at the cost of a look-up; one cross-entropy over all
  steps; the fused optimizer; memory kept between steps. It does not stop at the longest sentence of the batch, and
  batches nothing by length.
- Relay: `torchrun --nproc-per-node=2 -m training.seq2seq` as a user runs it, two micro-batches of 16 sentences of
  near-equal length a step, one thread a rank. Beside it, as one process of two threads.

Before anything is timed, both must give the same loss for the same 32 sentences and weights, to 1e-5.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.common import (
    ALONE,
    ASLEEP,
    ROOT,
    SENTENCES_PER_STEP,
    WAYS,
    WORDS,
    Figure,
    Race,
    Work,
    checked_difference,
    config_of,
    prepare,
    read_arguments,
    report,
    start_worker,
    usual_loop,
    workers,
)
from training.base.console import run_main, say
from training.data.prepared import Part, Prepared, open_prepared
from training.data.tokenizers import EOS, PAD, SOS
from training.models.attention_gru import AttentionGRU, EncodedSource, State
from training.seq2seq import Seq2SeqConfig, TwoSides
from training.translation import plan_of, summed_loss

LENGTH = 45

# Both sides train on the pairs that fit LENGTH with their `<eos>`, which the option does not count.
RECIPE = (ROOT / "configs/seq2seq/seed.yaml", "--model.max_length", LENGTH - 1)


def new_model(config: Seq2SeqConfig, data: Prepared) -> AttentionGRU:
    """The model with the initial weights that `training.seq2seq` gives it."""
    torch.manual_seed(config.seed)
    return AttentionGRU(config.model, data.source_tokenizer.vocabulary_size, data.target_tokenizer.vocabulary_size)


def tutorial_tensors(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Sources `source <eos>`, inputs `<sos> target` and labels `target <eos>` of all pairs that fit, [n, 45] each."""
    rows = []
    for source, target in zip(part.source, part.target, strict=True):
        if max(len(source), len(target)) < LENGTH:
            ends = [*source.tolist(), EOS], [SOS, *target.tolist()], [*target.tolist(), EOS]
            rows.append([tokens + (LENGTH - len(tokens)) * [PAD] for tokens in ends])
    sources, inputs, labels = torch.tensor(rows).unbind(1)
    return sources.contiguous(), inputs.contiguous(), labels.contiguous()


def tutorial_encode(model: AttentionGRU, source: Tensor) -> State:
    """The encoder over [B, 45], a step at a time; the decoder's first state."""
    (gru,) = model.encoder.layers
    hidden, outputs = None, []
    for step in range(LENGTH):
        word = model.encoder.dropout(model.encoder.embedding(source[:, step : step + 1]))
        output, hidden = gru(word, hidden)
        outputs.append(output)
    values, padding = torch.cat(outputs, dim=1), source == PAD
    last = values[torch.arange(len(source)), LENGTH - 1 - padding.sum(1)]
    hidden = torch.tanh(model.first_state(last))
    return State([hidden], EncodedSource(values, model.key(values), padding, last))


def tutorial_loss(model: AttentionGRU, source: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the real labels, from 45 steps of the decoder."""
    state = tutorial_encode(model, source)
    logits = [model.extend(inputs[:, step], state) for step in range(LENGTH)]
    return F.cross_entropy(torch.stack(logits, dim=1).flatten(0, 1), labels.flatten(), ignore_index=PAD)


def tutorial(folder: str) -> Work:
    """The peer's work: see `usual_loop`."""
    data = open_prepared(folder)
    config = config_of("seq2seq", RECIPE, data)
    return usual_loop(new_model(config, data), config.optim, tutorial_tensors(data.part("train")), tutorial_loss)


def loss_difference(data: Prepared) -> float:
    """How far the two losses of the same 32 sentences lie apart, dropout off. Raises UserError above 1e-5."""
    config = config_of("seq2seq", RECIPE, data)
    model = new_model(config, data).eval()
    pairs = TwoSides(data.part("train"), config.model.max_length)
    samples = np.random.default_rng(0).choice(len(pairs.lengths), SENTENCES_PER_STEP, replace=False)
    batch = [tensor[samples] for tensor in tutorial_tensors(data.part("train"))]
    device = torch.device("cpu")
    with torch.no_grad():
        theirs = tutorial_loss(model, *batch).item()
        micro_batches = np.split(samples, 2)
        ours = sum(summed_loss(model, pairs, each, config.loss, device).item() for each in micro_batches)
    return checked_difference(ours / pairs.target_tokens[samples].sum(), theirs, "tutorial")


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("seq2seq_training", __doc__, words)
    rounds, relay_steps, tutorial_steps = arguments.sized(whole=(3, 400, 20), quick=(1, 24, 3), smoke=(1, 2, 2))
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
        say(f"preparing {arguments.about_data}")
        data = prepare(arguments, Path(folder, "words"), *WORDS, "--vocabularies", "separate")
        difference = loss_difference(data)
        say(f"the same loss on both sides, difference {difference:.1e}")

        ways = (ASLEEP, ALONE) if arguments.quick else tuple(WAYS)
        tutorial_of = arguments, "tests.bench.seq2seq_training", "tutorial", data.folder
        with workers(**{way: start_worker(*tutorial_of, **WAYS[way]) for way in ways}) as peers:
            race = Race("seq2seq", RECIPE, data, Path(folder), peers, arguments)
            for number in range(rounds):
                say(f"round {number + 1} of {rounds}: {race.run_round(relay_steps, tutorial_steps)}")

        config = config_of("seq2seq", RECIPE, data)
        plan = plan_of(config, TwoSides(data.part("train"), config.model.max_length))
        padding = 1 - float(plan.lengths.mean()) / LENGTH
        report(
            "seq2seq_training",
            arguments,
            [
                *race.figures("tutorial", ">= 5"),
                Figure("padding_share", plan.padding_share(), "of the positions Relay computes in an epoch", "< 0.03"),
                Figure("tutorial_padding_share", padding, "of those of the tutorial"),
                Figure("loss_difference", difference, "on the same sentences with the same weights", "<= 1e-5"),
            ],
            tutorial_way=race.best_way,
        )
    return 0


if __name__ == "__main__":
    run_main(main)
