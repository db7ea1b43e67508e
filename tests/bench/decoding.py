"""Decoding: one sentence at a time as the usual notebook does it, against batches of many.

Both sides translate sentences of the same test part with the same model of random weights, and must give the same
tokens. `<eos>` is made to come exactly where the reference ends, on both sides: a speed per sentence means something
only for translations of usual length, and random weights know none.

- The obvious way, one sentence at a time, until `<eos>` or the limit. GPT: the whole sequence through the model for
  every token, without a cache. Seq2seq: the encoder once, then the decoder token by token; the attention's keys are
  computed once a sentence, which many a tutorial repeats at every step. One process at its best, which is one thread or
  two. It shares this repository's model with its fused attention. It takes every n-th of the sentences in order of
  length, so that a sentence costs there what it costs on the other side.
- The tutorial's way, for the seq2seq: the same, but the decoder always takes as many steps as in training, 45, and what
  is behind `<eos>` is dropped.
- Relay: `translate` of training/models/decoding.py on all of them, two processes of one thread with
  half of the sentences each, as `evaluate` shares them under torchrun. Beside it, one process of two threads.

`gpt_ratio`, `seq2seq_ratio` and `seq2seq_tutorial_ratio` are those of the seed recipes' models (GPT: width 64, 4
layers, 4 heads; seq2seq: width 128, one layer, one direction; words as tokens); without --quick a larger GPT (width
256, 6 layers, 8 heads) is measured too.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tests.bench.common import (
    WORDS,
    AnyWorker,
    Arguments,
    Figure,
    Work,
    prepare,
    ratio_by_rounds,
    read_arguments,
    report,
    start_worker,
    workers,
)
from training.base.console import UserError, counted, run_main, say
from training.base.environment import keep_freed_memory
from training.data.prepared import open_prepared
from training.data.tokenizers import EOS, PAD, SEP, SOS
from training.evaluation.translations.translators import TRANSLATORS
from training.models.attention_gru import AttentionGRU, AttentionGRUOptions
from training.models.decoding import Decoder, translate
from training.models.gpt import GPT, GPTOptions

MODELS: dict[str, GPTOptions | AttentionGRUOptions] = {
    "gpt": GPTOptions(layers=4, heads=4, width=64, context=128),
    "seq2seq": AttentionGRUOptions(
        embedding_width=128, hidden_width=128, bidirectional=False, tied_output=False, max_length=45
    ),
    "base": GPTOptions(layers=6, heads=8, width=256, context=128),
}

# What each is compared with: the way, and what its figures are called.
PLAINLY = {"plainly": ("", "the obvious way")}
PEERS = {
    "gpt": PLAINLY,
    "seq2seq": {**PLAINLY, "tutorial": ("tutorial_", "the tutorial's way")},
    "base": PLAINLY,
}

# What each one's ratio is to reach.
WANTED = {"gpt": ">= 30", "seq2seq": ">= 30", "base": ""}

# Rounding differs between the two ways, so once in a while two tokens are as good as each other.
SAME_SHARE = 0.98


@torch.inference_mode()
def translate_plainly(
    model: GPT | AttentionGRU, source: Sequence[int], length: int | None = None, steps: int = 0
) -> list[int]:
    """Greedy translation of one sentence, the obvious way.

    Ends where the model says so, at `translate`'s limit, or, with `length`, after so many tokens and no sooner. The
    model takes `steps` steps all the same where they are more.
    """
    limit = 2 * len(source) + 10
    if isinstance(model, GPT):
        prompt = model.vocabularies.prompt(source).tolist()
        return _token_by_token(
            lambda produced: model(torch.tensor([[*prompt, *produced]]))[0, -1],
            min(limit, model.options.context - len(prompt)),
            length,
            steps,
        )
    first, state = model.begin(torch.tensor([[*source, EOS]]), torch.tensor([len(source) + 1]), SOS)
    return _token_by_token(
        lambda produced: model.extend(torch.tensor(produced[-1:]), state)[0] if produced else first[0],
        min(limit, model.options.max_length + 1),
        length,
        steps,
    )


def _token_by_token(
    logits_behind: Callable[[list[int]], Tensor], limit: int, length: int | None, steps: int
) -> list[int]:
    """The most probable tokens one by one; logits_behind(tokens so far) -> [vocabulary]. See `translate_plainly`."""
    produced: list[int] = []
    end = None
    while len(produced) < steps or (end is None and len(produced) < limit):
        logits = logits_behind(produced)
        logits[[PAD, SOS, SEP]] = -torch.inf
        if length is not None:
            logits[EOS] = torch.inf if len(produced) == length else -torch.inf
        token = int(logits.argmax())
        if token == EOS and end is None:
            end = len(produced)
        produced.append(token)
    return produced[: limit if end is None else end]


@dataclass
class GivenLengthsState:
    """A decoder's state, and how many tokens each row's translation shall have and has, [B] each."""

    inner: Any
    wanted: Tensor
    produced: Tensor

    def select(self, rows: Tensor) -> GivenLengthsState:
        return GivenLengthsState(self.inner.select(rows), self.wanted[rows], self.produced[rows])


class GivenLengths:
    """A decoder whose `<eos>` comes after as many tokens as `lengths` says for the source, and no sooner."""

    def __init__(self, decoder: Decoder, lengths: dict[tuple[int, ...], int]):
        self._decoder = decoder
        self._lengths = lengths
        self.longest_source = decoder.longest_source
        self.room = decoder.room

    def begin(self, sources: list[Sequence[int]], limit: int) -> tuple[Tensor, GivenLengthsState]:
        logits, inner = self._decoder.begin(sources, limit)
        wanted = torch.tensor([self._lengths[tuple(source)] for source in sources])
        state = GivenLengthsState(inner, wanted, torch.zeros_like(wanted))
        return self._end(logits, state), state

    def extend(self, tokens: Tensor, state: GivenLengthsState) -> Tensor:
        state.produced = state.produced + 1
        return self._end(self._decoder.extend(tokens, state.inner), state)

    def _end(self, logits: Tensor, state: GivenLengthsState) -> Tensor:
        logits[:, EOS] = torch.where(state.produced == state.wanted, torch.inf, -torch.inf)
        return logits


class Sentences:
    """The test sentences, the length of each one's translation, and the model that translates them."""

    def __init__(self, name: str, folder: str | Path):
        data = open_prepared(folder)
        test = data.part("test")
        torch.manual_seed(1234)
        kind = TRANSLATORS["seq2seq" if name == "seq2seq" else "gpt"]
        config = kind.config(run_dir="unused", data=folder, model=MODELS[name])
        self.model = kind.build(config, data.source_tokenizer, data.target_tokenizer).eval()
        decoder = kind(self.model)
        self.sources: list[list[int]] = []
        # A source may stand several times with several references: the first one's length is that of all.
        self.lengths: dict[tuple[int, ...], int] = {}
        for source, target in zip(test.source, test.target, strict=True):
            if len(source) <= decoder.longest_source:
                self.sources.append(source.tolist())
                most = min(2 * len(source) + 10, decoder.room(len(source))) - 1
                self.lengths.setdefault(tuple(self.sources[-1]), min(len(target), most))
        self.decoder = GivenLengths(decoder, self.lengths)

    def spread(self, count: int) -> list[list[int]]:
        """`count` sources in order of length, as long as all are: every n-th."""
        ordered = sorted(self.sources, key=lambda source: (self.lengths[tuple(source)], len(source)))
        return [ordered[int((number + 0.5) * len(ordered) / count)] for number in range(count)]

    def plainly(self, sources: list[list[int]], steps: int = 0) -> list[list[int]]:
        """Tokens of the translations, the obvious way."""
        return [translate_plainly(self.model, source, self.lengths[tuple(source)], steps) for source in sources]

    def tutorial(self, sources: list[list[int]]) -> list[list[int]]:
        """Tokens of the translations, the tutorial's way."""
        return self.plainly(sources, steps=self.decoder.longest_source)

    def batched(self, sources: list[list[int]]) -> list[list[int]]:
        """Tokens of the translations, Relay's way."""
        return [result.ids for result in translate(self.decoder, sources)]


def side(way: str, name: str, folder: str) -> Work:
    """One side's work: asked for a number of sentences, it answers how many a second it translated."""
    keep_freed_memory()
    sentences = Sentences(name, folder)
    work = {"plainly": sentences.plainly, "tutorial": sentences.tutorial, "batched": sentences.batched}[way]

    def measure(count: float) -> float:
        chosen = sentences.spread(int(count))
        began = time.monotonic()
        work(chosen)
        return count / (time.monotonic() - began)

    return measure


def same_share(sentences: Sentences, count: int) -> float:
    """Share of `count` sentences that both ways translate the same. Raises UserError below SAME_SHARE."""
    chosen = sentences.spread(count)
    pairs = zip(sentences.plainly(chosen), sentences.batched(chosen), strict=True)
    share = sum(plain == batched for plain, batched in pairs) / count
    if share < SAME_SHARE:
        raise UserError(f"the two sides translate only {share:.1%} of the sentences the same: nothing to compare")
    return share


def compare(arguments: Arguments, name: str, folder: Path, *, rounds: int, plain_count: int) -> list[Figure]:
    """All figures of the model `name`, the sides taking turns."""
    sentences = Sentences(name, folder)
    total = len(sentences.sources)
    same = same_share(sentences, plain_count)
    speeds: defaultdict[str, list[float]] = defaultdict(list)

    def start(way: str, threads: int) -> AnyWorker:
        return start_worker(arguments, "tests.bench.decoding", "side", way, name, folder, threads=threads)

    peers = {f"{way}{threads}": (way, threads) for way in PEERS[name] for threads in (1, 2)}
    with workers(
        **{which: start(*how) for which, how in peers.items()},
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
            **{which: ([which], plain_count) for which in peers},
            "batched": (["first", "second"], total // 2),
            "one_process": (["one"], total),
        }
        for names, count in sides.values():  # the first piece of work also sets things up
            ask(names, min(count, 200))
        for number in range(rounds):
            for which, (names, count) in sides.items():
                speeds[which].append(ask(names, count))
            say(f"{name}, round {number + 1} of {rounds}: " + ", ".join(f"{k} {v[-1]:,.1f}" for k, v in speeds.items()))
    produced = sum(sentences.lengths[tuple(source)] for source in sentences.sources) / total
    figures = []
    for way, (prefix, about) in PEERS[name].items():
        best, threads = max((median(speeds[f"{way}{threads}"]), threads) for threads in (1, 2))
        ratio = ratio_by_rounds(speeds["batched"], speeds[f"{way}{threads}"])
        speed = f"{about}, {plain_count} of them, {counted(threads, 'thread')}"
        figures += [
            Figure(f"{name}_{prefix}ratio", ratio, f"Relay over {about}", WANTED[name]),
            Figure(f"{name}_{prefix or 'plain_'}sentences_per_s", best, speed),
        ]
    return [
        *figures,
        Figure(
            f"{name}_batched_sentences_per_s", median(speeds["batched"]), f"Relay, {total:,} sentences, 2 processes"
        ),
        Figure(f"{name}_one_process_sentences_per_s", median(speeds["one_process"]), "Relay, 1 process x 2 threads"),
        Figure(f"{name}_tokens_per_sentence", produced, "produced on both sides, <eos> not counted"),
        Figure(f"{name}_same_share", same, "of sentences translated the same by both", f">= {SAME_SHARE}"),
    ]


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("decoding", __doc__, words)
    rounds, plain_count = arguments.sized(whole=(7, 200), quick=(1, 60), smoke=(1, 2))
    # This process only prepares and checks; what is measured runs in the sides.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as temporary:
        say(f"preparing {arguments.about_data}")
        joint, separate = Path(temporary, "joint"), Path(temporary, "separate")
        with ThreadPoolExecutor(2) as pool:
            making = [
                pool.submit(prepare, arguments, folder, *WORDS, "--vocabularies", folder.name)
                for folder in (joint, separate)
            ]
            for each in making:
                each.result()
        figures = []
        for name, folder in (("gpt", joint), ("seq2seq", separate)):
            figures += compare(arguments, name, folder, rounds=rounds, plain_count=plain_count)
        if not arguments.quick:
            figures += compare(arguments, "base", joint, rounds=3, plain_count=60)
        report("decoding", arguments, figures)
    return 0


if __name__ == "__main__":
    run_main(main)
