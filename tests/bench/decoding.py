"""Decoding: one sentence at a time without a cache, against batches with the key-value cache.

Both sides translate sentences of the same test part with the same GPT of random weights, and must give the same tokens.
`<eos>` is made to come exactly where the reference ends, on both sides: a speed per sentence means something only for
translations of usual length, and random weights know none.

- The obvious way: the whole sequence through the model for every token. One process at its best, which is one thread or
  two. It shares this repository's model with its fused attention. It takes every n-th of the sentences in order of
  length, so that a sentence costs there what it costs on the other side.
- Relay: `training.evaluation.decoding.translate` on all of them, two processes of one thread with half of the sentences
  each, as `training.evaluation.evaluate` shares them under torchrun. Beside it, one process of two threads.

`gpt_ratio` is that of the seed recipe's model (width 64, 4 layers, 4 heads, words as tokens); without --quick a larger
one (width 256, 6 layers, 8 heads) is measured too.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from data_prep.prepared import open_prepared
from data_prep.tokenizers import EOS, PAD, SEP, SOS
from launch.console import UserError, run_main, say
from launch.environment import keep_freed_memory
from tests.bench.common import Figure, Worker, prepare, ratio_by_rounds, read_arguments, report, serve, workers
from training.evaluation.decoding import GPTDecoder, translate
from training.models.gpt import GPT, Cache, GPTOptions

MODELS = {
    "gpt": GPTOptions(layers=4, heads=4, width=64, context=128),
    "base": GPTOptions(layers=6, heads=8, width=256, context=128),
}

# Rounding differs between the two ways, so once in a while two tokens are as good as each other.
SAME_SHARE = 0.98


@torch.inference_mode()
def translate_plainly(model: GPT, source: Sequence[int], length: int | None = None) -> list[int]:
    """Greedy translation of one sentence, the whole sequence through the model for every token: the obvious way.

    Ends where the model says so, at `translate`'s limit, or, with `length`, after so many tokens and no sooner.
    """
    sequence = [SOS, *source, SEP]
    prompt = len(sequence)
    limit = min(2 * len(source) + 10, model.options.context - prompt)
    while len(sequence) - prompt < limit:
        logits = model(torch.tensor([sequence]))[0, -1]
        logits[[PAD, SOS, SEP]] = -torch.inf
        if length is not None:
            logits[EOS] = torch.inf if len(sequence) - prompt == length else -torch.inf
        token = int(logits.argmax())
        if token == EOS:
            break
        sequence.append(token)
    return sequence[prompt:]


@dataclass
class GivenLengthsState:
    """A GPT's cache, and how many tokens each row's translation shall have and has, [B] each."""

    cache: Cache
    wanted: Tensor
    produced: Tensor

    def select(self, rows: Tensor) -> GivenLengthsState:
        return GivenLengthsState(self.cache.select(rows), self.wanted[rows], self.produced[rows])


class GivenLengths(GPTDecoder):
    """A GPT whose `<eos>` comes after as many tokens as `lengths` says for the source, and no sooner."""

    def __init__(self, model: GPT, lengths: dict[tuple[int, ...], int]):
        super().__init__(model)
        self._lengths = lengths

    def begin(self, sources: list[Sequence[int]], limit: int) -> tuple[Tensor, GivenLengthsState]:
        logits, cache = super().begin(sources, limit)
        wanted = torch.tensor([self._lengths[tuple(source)] for source in sources])
        state = GivenLengthsState(cache, wanted, torch.zeros_like(wanted))
        return self._end(logits, state), state

    def extend(self, tokens: Tensor, state: GivenLengthsState) -> Tensor:
        state.produced = state.produced + 1
        return self._end(super().extend(tokens, state.cache), state)

    def _end(self, logits: Tensor, state: GivenLengthsState) -> Tensor:
        logits[:, EOS] = torch.where(state.produced == state.wanted, torch.inf, -torch.inf)
        return logits


class Sentences:
    """The test sentences, the length of each one's translation, and the model that translates them."""

    def __init__(self, name: str, folder: str | Path):
        data = open_prepared(folder)
        test = data.part("test")
        torch.manual_seed(1234)
        self.model = GPT(MODELS[name], data.source_tokenizer.vocabulary_size).eval()
        self.sources = [row.tolist() for row in test.source]
        # A source may stand several times with several references: the first one's length is that of all.
        self.lengths: dict[tuple[int, ...], int] = {}
        for source, target in zip(self.sources, test.target, strict=True):
            self.lengths.setdefault(tuple(source), min(len(target), 2 * len(source) + 9))

    def spread(self, count: int) -> list[list[int]]:
        """`count` sources in order of length, as long as all are: every n-th."""
        ordered = sorted(self.sources, key=lambda source: (self.lengths[tuple(source)], len(source)))
        return [ordered[int((number + 0.5) * len(ordered) / count)] for number in range(count)]

    def plainly(self, sources: list[list[int]]) -> list[list[int]]:
        """Tokens of the translations, the obvious way."""
        return [translate_plainly(self.model, source, self.lengths[tuple(source)]) for source in sources]

    def batched(self, sources: list[list[int]]) -> list[list[int]]:
        """Tokens of the translations, Relay's way."""
        return [result.ids for result in translate(GivenLengths(self.model, self.lengths), sources)]


def side(way: str, name: str, folder: str) -> None:
    """One side, a process of its own: asked for a number of sentences, it answers how many a second it translated."""
    keep_freed_memory()
    sentences = Sentences(name, folder)
    work = {"plainly": sentences.plainly, "batched": sentences.batched}[way]

    def measure(count: float) -> float:
        chosen = sentences.spread(int(count))
        began = time.monotonic()
        work(chosen)
        return count / (time.monotonic() - began)

    serve(measure)


def same_share(sentences: Sentences, count: int) -> float:
    """Share of `count` sentences that both ways translate the same. Raises UserError below SAME_SHARE."""
    chosen = sentences.spread(count)
    pairs = zip(sentences.plainly(chosen), sentences.batched(chosen), strict=True)
    share = sum(plain == batched for plain, batched in pairs) / count
    if share < SAME_SHARE:
        raise UserError(f"the two sides translate only {share:.1%} of the sentences the same: nothing to compare")
    return share


def compare(name: str, folder: Path, *, rounds: int, plain_count: int) -> list[Figure]:
    """All figures of the model `name`, the sides taking turns."""
    sentences = Sentences(name, folder)
    total = len(sentences.sources)
    same = same_share(sentences, plain_count)
    speeds: defaultdict[str, list[float]] = defaultdict(list)

    def start(way: str, threads: int) -> Worker:
        return Worker("tests.bench.decoding", "side", way, name, folder, threads=threads)

    with workers(
        plain1=start("plainly", 1),
        plain2=start("plainly", 2),
        one=start("batched", 2),
        first=start("batched", 1),
        second=start("batched", 1),
    ) as started:

        def ask(names: Sequence[str], count: int) -> float:
            """Sentences a second of these workers together, each asked for `count` at the same moment."""
            for name in names:
                started[name].ask(count)
            return sum(started[name].answer() for name in names)

        sides = {
            "plain1": (["plain1"], plain_count),
            "plain2": (["plain2"], plain_count),
            "batched": (["first", "second"], total // 2),
            "one_process": (["one"], total),
        }
        for names, count in sides.values():  # the first piece of work also sets things up
            ask(names, min(count, 200))
        for number in range(rounds):
            for which, (names, count) in sides.items():
                speeds[which].append(ask(names, count))
            say(f"{name}, round {number + 1} of {rounds}: " + ", ".join(f"{k} {v[-1]:,.1f}" for k, v in speeds.items()))
    best, threads = max((median(speeds[which]), which[-1]) for which in ("plain1", "plain2"))
    produced = sum(sentences.lengths[tuple(source)] for source in sentences.sources) / total
    return [
        Figure(
            f"{name}_ratio",
            ratio_by_rounds(speeds["batched"], speeds[f"plain{threads}"]),
            "Relay over the obvious way",
            ">= 30" if name == "gpt" else "",
        ),
        Figure(
            f"{name}_batched_sentences_per_s", median(speeds["batched"]), f"Relay, {total:,} sentences, 2 processes"
        ),
        Figure(f"{name}_one_process_sentences_per_s", median(speeds["one_process"]), "Relay, 1 process x 2 threads"),
        Figure(f"{name}_plain_sentences_per_s", best, f"the obvious way, {plain_count} of them, {threads} thread(s)"),
        Figure(f"{name}_tokens_per_sentence", produced, "produced on both sides, <eos> not counted"),
        Figure(f"{name}_same_share", same, "of sentences translated the same by both", f">= {SAME_SHARE}"),
    ]


def main() -> int:
    if sys.argv[1:2] == ["side"]:
        return side(*sys.argv[2:])
    arguments = read_arguments("decoding", __doc__)
    # This process only prepares and checks; what is measured runs in the sides.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        say(f"preparing {arguments.about_data}")
        folder = Path(temporary, "words")
        prepare(arguments, folder, "--tokenizer", "word")
        figures = compare("gpt", folder, rounds=3 if arguments.quick else 7, plain_count=60 if arguments.quick else 200)
        if not arguments.quick:
            figures += compare("base", folder, rounds=3, plain_count=60)
        report("decoding", arguments, figures)
    return 0


if __name__ == "__main__":
    run_main(main)
