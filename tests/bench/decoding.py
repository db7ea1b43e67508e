"""Sentences per second of decoding: one at a time without a cache, against batches with the key-value cache.

    python -m tests.bench.decoding [--quick] [--data RAW_TATOEBA_FILE]

Both sides translate sentences of the same test part with the same GPT, on the same threads, and must give the same
translations. The model is trained for a moment first, so that translations end where they usually do: with random
weights most run to the length limit. The slow side takes a sample of the test sentences, evenly spread over the lengths of
their translations, so that a sentence costs what it costs on the other side. The sides are measured in turns, and the
ratio is the median over the turns: the machine may be busy.

The last line is a JSON object; `gpt_ratio` is that of the model `seed`. Without `--quick` the larger `base` is measured
too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data_prep import tatoeba
from data_prep.prepared import Part, Prepared, open_prepared
from data_prep.tokenizers import EOS, PAD, SEP, SOS
from launch.console import Progress, run_main, say
from launch.environment import keep_freed_memory
from training.evaluation.decoding import GPTDecoder, translate
from training.gpt import Sequences
from training.models.gpt import GPT, GPTOptions

TATOEBA = Path(__file__).resolve().parents[3] / "shared/data/tatoeba/cmn.txt"
MODELS = {
    "seed": GPTOptions(layers=4, heads=4, width=64, context=128),
    "base": GPTOptions(layers=6, heads=8, width=256, context=128),
}


@dataclass(frozen=True)
class Effort:
    """How long to train and to measure: optimizer steps, and sentences of the slow side per turn."""

    training_steps: int
    plain_sentences: int
    turns: int


FULL = Effort(training_steps=150, plain_sentences=200, turns=5)
QUICK = Effort(training_steps=60, plain_sentences=48, turns=3)


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.decoding", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores, model `seed` only")
    parser.add_argument("--data", type=Path, help="raw Tatoeba file (default: the usual place, else the sample corpus)")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    source = str(arguments.data or (TATOEBA if TATOEBA.is_file() else "sample"))
    effort = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(StringIO()):
            tatoeba.main(["--source", source, "--output", f"{folder}/prepared"])
        data = open_prepared(Path(folder, "prepared"))
        results = {
            name: measure(name, data, effort) for name in ("seed", "base") if name == "seed" or not arguments.quick
        }
    say(f"\n{'model':6} {'plain':>10} {'batched':>10} {'ratio':>8} {'same':>7} {'tokens':>7}   (sentences/s; medians)")
    for name, result in results.items():
        say(
            f"{name:6} {result['plain_sentences_per_s']:10.1f} {result['batched_sentences_per_s']:10.1f} "
            f"{result['ratio']:8.1f} {result['same_share']:7.1%} {result['tokens_per_sentence']:7.2f}"
        )
    parts = {
        "bench": "decoding",
        "gpt_ratio": results["seed"]["ratio"],
        "threads": torch.get_num_threads(),
        "quick": arguments.quick,
        "data": source if source == "sample" else Path(source).name,
        **results,
    }
    say(json.dumps(parts))
    return 0


def measure(name: str, data: Prepared, effort: Effort) -> dict[str, Any]:
    """Trains the model `name` for a moment and measures both ways in turns."""
    torch.manual_seed(1234)
    model = GPT(MODELS[name], data.source_tokenizer.vocabulary_size)
    _train_briefly(name, model, data.part("train"), effort.training_steps)
    decoder = GPTDecoder(model.eval())
    test = data.part("test").source
    sources = [test[row].tolist() for row in range(len(test))]
    results = translate(decoder, sources)  # also warms up
    by_length = sorted(range(len(sources)), key=lambda row: (len(results[row].ids), len(sources[row])))
    sample = [by_length[i] for i in np.linspace(0, len(sources) - 1, effort.plain_sentences).round().astype(int)]
    plain_rates, batched_rates, same = [], [], 0
    with Progress(f"measuring {name}", effort.turns, "turns") as progress:
        for _ in range(effort.turns):
            began = time.perf_counter()
            plain = [translate_plainly(model, sources[row]) for row in sample]
            plain_rates.append(len(sample) / (time.perf_counter() - began))
            began = time.perf_counter()
            results = translate(decoder, sources)
            batched_rates.append(len(sources) / (time.perf_counter() - began))
            same += sum(results[row].ids == ids for row, ids in zip(sample, plain, strict=True))
            progress.advance()
    ratios = [batched / plain for batched, plain in zip(batched_rates, plain_rates, strict=True)]
    return {
        "ratio": round(median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "plain_sentences_per_s": round(median(plain_rates), 2),
        "batched_sentences_per_s": round(median(batched_rates), 2),
        "plain_sentences": len(sample),
        "batched_sentences": len(sources),
        "tokens_per_sentence": round(sum(len(result.ids) for result in results) / len(results), 2),
        "reference_tokens_per_sentence": round(float(data.part("test").target.lengths.mean()), 2),
        "ended_share": round(sum(result.ended for result in results) / len(results), 4),
        "same_share": round(same / (len(sample) * effort.turns), 4),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": model.vocabulary_size,
    }


def _train_briefly(name: str, model: GPT, part: Part, steps: int) -> None:
    sequences = Sequences(part, model.options.context)
    generator = np.random.default_rng(1234)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if model.options.width <= 64 else 1e-3)
    model.train()
    with Progress(f"training {name}", steps, "steps") as progress:
        for _ in range(steps):
            samples = generator.choice(len(sequences.lengths), 48, replace=False)
            inputs, scored, labels, _ = sequences.batch(samples, with_source=False)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs, scored), labels).backward()
            optimizer.step()
            progress.advance()


if __name__ == "__main__":
    run_main(main)
