"""Decoding: one sentence at a time without a cache, against batches with the key-value cache.

Both sides translate sentences of the same test part with the same GPT and must give the same translations. The model is
trained for a moment first, so that translations end where they usually do: with random weights most run to the length
limit. The slow side takes a sample of the sentences, evenly spread over the lengths of their translations, so that a
sentence costs there what it costs on the other side.

- The obvious way: the whole sequence through the model for every token, one process at its best, which is one thread or
  two; it shares this repository's model with its fused attention.
- Relay: `training.evaluation.decoding.translate`, one process of two threads.

`gpt_ratio` is that of the seed recipe's model (width 64, 4 layers, 4 heads, words as tokens); without --quick a larger
one (width 256, 6 layers, 8 heads) is measured too.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from data_prep.prepared import Part, open_prepared
from data_prep.tokenizers import EOS, PAD, SEP, SOS
from launch.console import Progress, UserError, run_main, say
from launch.environment import keep_freed_memory
from tests.bench.common import Figure, Worker, prepare, ratio_by_rounds, read_arguments, report, serve, workers
from training.evaluation.decoding import GPTDecoder, Translation, translate
from training.gpt import Sequences
from training.models.gpt import GPT, GPTOptions

MODELS = {
    "gpt": GPTOptions(layers=4, heads=4, width=64, context=128),
    "base": GPTOptions(layers=6, heads=8, width=256, context=128),
}
SENTENCES_PER_STEP = 48

# Rounding differs between the two ways, so once in a while two tokens are as good as each other.
SAME_SHARE = 0.99


@torch.inference_mode()
def translate_plainly(
    model: GPT, source: Sequence[int], *, limit_factor: float = 2.0, limit_extra: int = 10
) -> list[int]:
    """Greedy translation of one sentence, the whole sequence through the model for every token: the obvious way."""
    sequence = [SOS, *source, SEP]
    prompt = len(sequence)
    limit = min(int(limit_factor * len(source)) + limit_extra, model.options.context - prompt)
    while len(sequence) - prompt < limit:
        logits = model(torch.tensor([sequence]))[0, -1]
        logits[[PAD, SOS, SEP]] = -torch.inf
        token = int(logits.argmax())
        if token == EOS:
            break
        sequence.append(token)
    return sequence[prompt:]


def briefly_trained(name: str, part: Part, vocabulary_size: int, steps: int) -> GPT:
    """The model `name` after `steps` optimizer steps, in evaluation mode."""
    torch.manual_seed(1234)
    model = GPT(MODELS[name], vocabulary_size)
    sequences = Sequences(part, model.options.context)
    generator = np.random.default_rng(1234)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if model.options.width <= 64 else 1e-3)
    with Progress(f"training {name}", steps, "steps") as progress:
        for _ in range(steps):
            samples = generator.choice(len(sequences.lengths), SENTENCES_PER_STEP, replace=False)
            inputs, scored, labels, _ = sequences.batch(samples, with_source=False)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs, scored), labels).backward()
            optimizer.step()
            progress.advance()
    return model.eval()


def evenly_spread(count: int, results: Sequence[Translation], sources: Sequence[Sequence[int]]) -> list[int]:
    """`count` rows whose translations and sources are as long as all are: every n-th in order of length."""
    by_length = sorted(range(len(sources)), key=lambda row: (len(results[row].ids), len(sources[row])))
    middles = (np.arange(count) + 0.5) * len(sources) / count
    return [by_length[int(middle)] for middle in middles]


def side(way: str, file: str) -> None:
    """One side, a process of its own: asked for anything, it translates its sentences and answers sentences a second."""
    keep_freed_memory()
    name, state, sources, sample = torch.load(file)
    model = GPT(MODELS[name], len(state["embedding.weight"]))
    model.load_state_dict(state)
    decoder = GPTDecoder(model.eval())

    def work(_: float) -> float:
        began = time.monotonic()
        if way == "batched":
            translate(decoder, sources)
            return len(sources) / (time.monotonic() - began)
        for row in sample:
            translate_plainly(model, sources[row])
        return len(sample) / (time.monotonic() - began)

    serve(work)


def main() -> int:
    if sys.argv[1:2] == ["side"]:
        return side(*sys.argv[2:])
    arguments = read_arguments("decoding", __doc__)
    torch.set_num_threads(1)  # this process only prepares; the sides choose for themselves
    rounds, steps, sampled = (3, 60, 40) if arguments.quick else (5, 150, 150)
    figures = []
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
        say(f"preparing {arguments.about_data}")
        prepare(arguments, Path(folder, "words"), "--tokenizer", "word")
        for name in ["gpt"] if arguments.quick else ["gpt", "base"]:
            figures += measure(name, Path(folder), rounds=rounds, steps=steps, sampled=sampled)
        report("decoding", arguments, figures)
    return 0


def measure(name: str, folder: Path, *, rounds: int, steps: int, sampled: int) -> list[Figure]:
    """All figures of one model. Raises UserError when the two sides do not translate the same."""
    data = open_prepared(folder / "words")
    test = data.part("test")
    sources = [test.source[row].tolist() for row in range(len(test))]
    model = briefly_trained(name, data.part("train"), data.source_tokenizer.vocabulary_size, steps)
    results = translate(GPTDecoder(model), sources)
    sample = evenly_spread(sampled, results, sources)
    same = sum(results[row].ids == translate_plainly(model, sources[row]) for row in sample) / len(sample)
    if same < SAME_SHARE:
        raise UserError(f"the two sides translate only {same:.1%} of the sentences the same: nothing to compare")
    file = folder / f"{name}.pt"
    torch.save((name, model.state_dict(), sources, sample), file)

    def start(way: str, threads: int) -> Worker:
        return Worker("tests.bench.decoding", "side", way, file, threads=threads)

    speeds: defaultdict[str, list[float]] = defaultdict(list)
    with workers(plain1=start("plain", 1), plain2=start("plain", 2), batched=start("batched", 2)) as started:
        for number in range(-1, rounds):  # the first round also sets things up
            for side_name, worker in started.items():
                worker.ask(1)
                speed = worker.answer()
                if number >= 0:
                    speeds[side_name].append(speed)
    best = max(("plain1", "plain2"), key=lambda side_name: median(speeds[side_name]))
    produced = sum(len(result.ids) for result in results) / len(results)
    meaning = (
        f"batches with a cache (2 threads) over one at a time without ({best[-1]} thread{'s' * (best == 'plain2')})"
    )
    return [
        Figure(f"{name}_ratio", ratio_by_rounds(speeds["batched"], speeds[best]), meaning, ">= 30" * (name == "gpt")),
        Figure(f"{name}_batched_sentences_per_s", median(speeds["batched"]), f"all {len(sources):,} test sentences"),
        Figure(f"{name}_plain_sentences_per_s", median(speeds[best]), f"a sample of {len(sample):,} of them"),
        Figure(
            f"{name}_tokens_per_sentence", produced, f"produced; the references have {test.target.lengths.mean():.2f}"
        ),
        Figure(f"{name}_ended_share", sum(result.ended for result in results) / len(results), "of translations"),
        Figure(
            f"{name}_same_share", same, "of sampled sentences translated the same by both sides", f">= {SAME_SHARE}"
        ),
    ]


if __name__ == "__main__":
    run_main(main)
