"""The GPT as Relay trains it, against the loop of the usual notebook and against what the processor can do.

Part 1, `sentences_ratio`: configs/gpt/seed.yaml (width 64, 4 layers, 4 heads, words as tokens, Adam 1e-3 constant) on
the same sentences with the same initial weights, 32 sentences an optimizer step, loss on the English side only.

- The notebook: every pair padded to 128 tokens beforehand, a shuffling DataLoader, logits at all 128 positions,
  cross-entropy that ignores padding and source. One process with two threads, at its best: it shares this repository's
  model with its fused attention, the fused optimizer, and memory kept between steps; of OpenMP's two ways of waiting,
  the one that runs faster here counts (--quick: asleep).
- Relay: `torchrun --nproc-per-node=2 -m training.gpt` as a user runs it, two micro-batches of 16 sentences of
  near-equal length a step, one thread a rank. Beside it, as one process of two threads.

Before anything is timed, both must give the same loss for the same 32 sentences and weights, to 1e-5.

Part 2, `peak_share`: configs/gpt/plain.yaml under torchrun, two ranks of one thread. Its real tokens a second times 6
times its parameters, over the speed of a plain fp32 matrix product of width 2,048 on the same two cores: two processes
of one thread at the same moment or one process of two threads, whichever is faster. `peak_share_exact` counts the work
that the model really does per real token instead: the output layer where tokens are scored only, and attention.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.common import (
    ASLEEP,
    IGNORED,
    PLAIN,
    PLAIN_DATA,
    ROOT,
    SENTENCES_PER_STEP,
    SPINNING,
    WAYS,
    WORDS,
    Figure,
    Race,
    Work,
    checked_difference,
    config_of,
    plain_of,
    prepare,
    read_arguments,
    report,
    start_worker,
    timed_training,
    usual_loop,
    workers,
)
from training.base.console import run_main, say
from training.data.prepared import Part, Prepared, open_prepared
from training.data.tokenizers import EOS, PAD, SEP, SOS
from training.gpt import GPTConfig, Sequences
from training.models.gpt import GPT, Vocabularies
from training.translation import plan_of, summed_loss

CONTEXT = 128
MATRIX_WIDTH = 2048

SEED = ROOT / "configs/gpt/seed.yaml"


def new_model(config: GPTConfig, data: Prepared) -> GPT:
    """The model with the initial weights that `training.gpt` gives it."""
    torch.manual_seed(config.seed)
    return GPT(config.model, Vocabularies.of(data.source_tokenizer, data.target_tokenizer))


def notebook_tensors(part: Part) -> tuple[Tensor, Tensor]:
    """Inputs and labels [n, 128] of all pairs that fit, padded; labels that are not learned are IGNORED."""
    inputs, labels = [], []
    for source, target in zip(part.source, part.target, strict=True):
        tokens = [SOS, *source.tolist(), SEP, *target.tolist(), EOS]
        room = CONTEXT + 1 - len(tokens)
        if room >= 0:
            inputs.append((tokens + room * [PAD])[:-1])
            labels.append((len(source) + 1) * [IGNORED] + tokens[len(source) + 2 :] + room * [IGNORED])
    return torch.tensor(inputs), torch.tensor(labels)


def notebook_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labels that count, from logits at all positions."""
    return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def notebook(folder: str) -> Work:
    """The peer's work: see `usual_loop`."""
    data = open_prepared(folder)
    config = config_of("gpt", [SEED], data)
    return usual_loop(new_model(config, data), config.optim, notebook_tensors(data.part("train")), notebook_loss)


def peak() -> Work:
    """Asked for a number of seconds, it multiplies matrices for so long and answers with the GFLOP/s."""
    a, b, out = (torch.randn(MATRIX_WIDTH, MATRIX_WIDTH) for _ in range(3))

    def multiply(seconds: float) -> float:
        began, products = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            torch.mm(a, b, out=out)
            products += 1
        return products * 2 * MATRIX_WIDTH**3 / (time.monotonic() - began) / 1e9

    return multiply


def loss_difference(data: Prepared) -> float:
    """How far the two losses of the same 32 sentences lie apart, dropout off. Raises UserError above 1e-5."""
    config = config_of("gpt", [SEED], data)
    model = new_model(config, data).eval()
    pairs = Sequences.of(data, "train", CONTEXT)
    samples = np.random.default_rng(0).choice(len(pairs.lengths), SENTENCES_PER_STEP, replace=False)
    inputs, labels = notebook_tensors(data.part("train"))
    device = torch.device("cpu")
    with torch.no_grad():
        theirs = notebook_loss(model, inputs[samples], labels[samples]).item()
        micro_batches = np.split(samples, 2)
        ours = sum(summed_loss(model, pairs, batch, config.loss, device).item() for batch in micro_batches)
    return checked_difference(ours / pairs.weights(config.loss)[samples].sum(), theirs, "notebook")


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("gpt_training", __doc__, words)
    rounds, relay_steps, notebook_steps, plain_steps, peak_s = arguments.sized(
        whole=(3, 400, 20, 40, 1.0), quick=(1, 24, 4, 3, 0.3), smoke=(1, 2, 2, 2, 0.05)
    )
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        folder = Path(temporary)
        say(f"preparing {arguments.about_data}")
        with ThreadPoolExecutor(2) as pool:
            making_words = pool.submit(prepare, arguments, folder / "words", *WORDS)
            making_pieces = pool.submit(prepare, arguments, folder / "pieces", *PLAIN_DATA)
            as_words, as_pieces = making_words.result(), making_pieces.result()
        difference = loss_difference(as_words)
        say(f"the same loss on both sides, difference {difference:.1e}")

        ways = [ASLEEP] if arguments.quick else [ASLEEP, SPINNING]
        start = partial(start_worker, arguments, "tests.bench.gpt_training")
        speeds: defaultdict[str, list[float]] = defaultdict(list)
        with workers(
            **{way: start("notebook", as_words.folder, **WAYS[way]) for way in ways},
            first=start("peak", threads=1),
            second=start("peak", threads=1),
            both=start("peak", threads=2),
        ) as started:

            def ask(names: list[str], seconds: float) -> float:
                """Sum of what the workers of these names answer, all at work at the same time."""
                for name in names:
                    started[name].ask(seconds)
                return sum(started[name].answer() for name in names)

            def measure_peak() -> None:
                speeds["peak"].append(max(ask(["first", "second"], peak_s), ask(["both"], peak_s)))

            for name in ("first", "second", "both"):  # the first piece of work also sets things up
                ask([name], 0.1)
            peers = {way: started[way] for way in ways}
            race = Race("gpt", [SEED], as_words, folder, peers, arguments)
            for number in range(rounds):
                about = race.run_round(relay_steps, notebook_steps)
                measure_peak()
                run_dir = folder / f"plain-{number}"
                how = {"steps": plain_steps, "ranks": 2, "threads": 1, "here": arguments.smoke}
                plain = timed_training("gpt", plain_of(arguments), as_pieces, run_dir, **how)
                speeds["plain tokens"].append(plain.tokens_per_s)
                speeds["plain flops"].append(plain.flops_per_s)
                measure_peak()
                more = ", ".join(f"{k} {v[-1]:,.4g}" for k, v in speeds.items())
                say(f"round {number + 1} of {rounds}: {about}, {more}")

        peak_gflops = median(speeds["peak"])
        tokens, gflops = median(speeds["plain tokens"]), median(speeds["plain flops"]) / 1e9
        plain_model = new_model(config_of("gpt", [PLAIN], as_pieces), as_pieces)
        parameters = sum(parameter.numel() for parameter in plain_model.parameters())
        seed = config_of("gpt", [SEED], as_words)
        plan = plan_of(seed, Sequences.of(as_words, "train", CONTEXT))
        report(
            "gpt_training",
            arguments,
            [
                *race.figures("notebook", ">= 8"),
                Figure("padding_share", plan.padding_share(), "of the positions Relay computes in an epoch", "< 0.03"),
                Figure("notebook_padding_share", 1 - float(plan.lengths.mean()) / CONTEXT, "of those of the notebook"),
                Figure("loss_difference", difference, "on the same sentences with the same weights", "<= 1e-5"),
                Figure("peak_share", tokens * 6 * parameters / 1e9 / peak_gflops, "plain: 6 x parameters", ">= 0.75"),
                Figure("peak_share_exact", gflops / peak_gflops, "plain: operations that are really done"),
                Figure("plain_tokens_per_s", tokens, "torchrun, 2 ranks x 1 thread, real tokens"),
                Figure("plain_parameters", parameters, "embedding included"),
                Figure("peak_gflops", peak_gflops, f"fp32 matrix product of width {MATRIX_WIDTH:,} on both cores"),
            ],
            notebook_way=race.best_way,
        )
    return 0


if __name__ == "__main__":
    run_main(main)
