"""Which samples make up step s: a pure function of (lengths, seed, step), the same on every rank.

Nothing is consumed, so nothing is saved: step 40,000 is as cheap to find as step 0. An epoch is one random order of all
samples, sorted by length (ties stay random) and cut into micro-batches of near-equal length. Where the cuts fall
depends on the sorted lengths alone, so every epoch has the same number of micro-batches. A sample may have several
lengths, one for each sequence that a model pads by itself; the first one is sorted by first.

Short samples are not like long ones, and a step of one kind alone would point astray. So the micro-batches are shuffled
within as many classes of length as a step has micro-batches, and a step takes one of each (stratified sampling).

A mixture draws from several sources, each so often an epoch. What an epoch has of a source is every sample in turn: in
the order of length each of its slots takes one of the next few samples, and another one in the next epoch, until all
have been there. A slot is as long as the longest of those, so the cuts are the same in every epoch here, too.

Epochs follow each other in one stream, and step s takes the next `micro_batches_per_step` of it; a step may span two
epochs. So every sample is seen exactly once an epoch (of a mixture as often as its source is drawn, give or take one)
and every step has the same number of micro-batches, which world size must divide: rank r takes every world-size-th, and
the loss does not depend on how many ranks there are.

Cost: at most 16 bytes a sample while an epoch is laid out, 4 afterwards; a fraction of a second per million samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from training.base.console import UserError
from training.base.options import Options


class BatchOptions(Options):
    """Size of a micro-batch (whichever bound is reached first) and of an optimizer step."""

    tokens_per_micro_batch: int | None = Field(
        2048, ge=1, description="most positions, padding included; null: no bound"
    )
    sentences_per_micro_batch: int | None = Field(None, ge=1, description="most sentences; null: no bound")
    micro_batches_per_step: int = Field(4, ge=1, description="over all ranks; the number of ranks must divide it")

    @model_validator(mode="after")
    def _bounded(self) -> BatchOptions:
        if self.tokens_per_micro_batch is None and self.sentences_per_micro_batch is None:
            raise ValueError("set batch.tokens_per_micro_batch or batch.sentences_per_micro_batch: one bound is needed")
        return self


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass."""

    samples: np.ndarray  # indices into the data set, shortest first
    # Its place in the step, 0 <= number < micro_batches_per_step, whatever rank runs it. Step, number and seed fix the
    # random numbers (dropout) of the pass.
    number: int


@dataclass(frozen=True)
class Mixture:
    """Sources that are drawn from, each so often an epoch."""

    names: tuple[str, ...]
    weights: tuple[float, ...]  # of each, how often an epoch has one of its samples, in the mean
    source: np.ndarray  # int64 [n], of each sample an index into names

    def drawn(self) -> tuple[int, ...]:
        """Samples of each source an epoch."""
        counts = np.bincount(self.source, minlength=len(self.names)).tolist()
        return tuple(
            max(1, round(weight * count)) if count else 0 for weight, count in zip(self.weights, counts, strict=True)
        )


class BatchPlan:
    """The plan of a whole run, of `steps` where they are given and else of `epochs`.

    lengths [n] or [n, k]: tokens of each sample. weights [n]: its share in the loss's denominator, that is its number
    of supervised tokens. The plan sums them, so that every rank knows a step's denominator without communication.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        weights: np.ndarray,
        options: BatchOptions,
        *,
        seed: int,
        epochs: float,
        steps: int | None = None,
        mixture: Mixture | None = None,
    ):
        if not len(lengths):
            raise UserError("there is no sample to train on: prepare data with at least one pair that fits the context")
        self.lengths = lengths.astype(np.int32, copy=False)
        longest = int(_columns(self.lengths).sum(axis=1).max())
        if options.tokens_per_micro_batch is not None and longest > options.tokens_per_micro_batch:
            raise UserError(
                f"the longest sample has {longest} tokens, more than batch.tokens_per_micro_batch "
                f"({options.tokens_per_micro_batch}): raise the bound to {longest} or more"
            )
        self.weights = weights
        self.seed = seed
        self.micro_batches_per_step = options.micro_batches_per_step
        self.mixture = mixture
        order = sorted_by_length(self.lengths)
        ordered = _columns(self.lengths[order])
        # Ranks a sample's lengths among all that occur: one number to sort by, however many lengths a sample has.
        self._ranks = np.empty(len(order), dtype=np.uint32)
        self._ranks[order] = np.cumsum(np.any(np.diff(ordered, axis=0, prepend=ordered[:1]), axis=1), dtype=np.uint32)
        self._decks = [] if mixture is None else _decks(mixture, self._ranks, seed)
        if mixture is not None:  # what is drawn is nowhere longer than the slots that it is drawn for
            slots = np.concatenate([deck.longest() for deck in self._decks])
            ordered = _columns(np.sort(self.lengths[slots], axis=0))
        self.cuts = cut_by_length(ordered, options.tokens_per_micro_batch, options.sentences_per_micro_batch)
        self.slots = ordered  # [slots, k], the most that an epoch's samples have, shortest first
        longest_of_each = np.maximum.reduceat(ordered, self.cuts[:-1], axis=0).sum(axis=1, dtype=np.int64)
        self._padding_share = 1 - int(ordered.sum(dtype=np.int64)) / int((np.diff(self.cuts) * longest_of_each).sum())
        self.micro_batches_per_epoch = len(self.cuts) - 1
        self.steps = steps or max(1, math.ceil(epochs * self.micro_batches_per_epoch / self.micro_batches_per_step))
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.samples_per_epoch = len(ordered)
        self.drawn_per_epoch = np.array(() if mixture is None else mixture.drawn(), dtype=np.int64)  # [sources]

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step` (from 0), over all ranks."""
        first = step * self.micro_batches_per_step
        return [MicroBatch(self._samples(first + number), number) for number in range(self.micro_batches_per_step)]

    def micro_batches_of(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """The micro-batches of `step` that `rank` runs: every `world_size`-th."""
        return self.step(step)[rank::world_size]

    def weight(self, step: int) -> float:
        """The loss's denominator of `step`: supervised tokens over all its micro-batches and ranks."""
        return float(sum(self.weights[batch.samples].sum(dtype=np.float64) for batch in self.step(step)))

    def epoch(self, step: int) -> float:
        """Epochs done when `step` begins."""
        return step * self.micro_batches_per_step / self.micro_batches_per_epoch

    def padding_share(self) -> float:
        """Share of an epoch's computed positions that are padding; the same in every epoch.

        Of a mixture, whose epochs differ a little, that of the slots.
        """
        return self._padding_share

    def typical_micro_batch(self, number: int) -> np.ndarray:
        """Samples between two cuts in the order of length, without chance; of a mixture, those of the first epoch."""
        samples = np.concatenate([deck.drawn(0) for deck in self._decks]) if self._decks else None
        order = sorted_by_length(self.lengths if samples is None else self.lengths[samples])
        found = order[self.cuts[number] : self.cuts[number + 1]]
        return found if samples is None else samples[found]

    def tokens_per_epoch(self) -> int:
        """Real tokens of an epoch; of a mixture, the most that it can have."""
        return int(self.slots.sum(dtype=np.int64))

    def drawn(self, step: int) -> np.ndarray:
        """Samples of each source of the mixture in `step`, int64 [sources]; of none where there is no mixture."""
        if self.mixture is None:
            return np.zeros(0, dtype=np.int64)
        samples = np.concatenate([batch.samples for batch in self.step(step)])
        return np.bincount(self.mixture.source[samples], minlength=len(self.mixture.names))

    def tokens(self, step: int) -> tuple[int, int]:
        """Real tokens of `step`, and the positions that its micro-batches compute, padding included."""
        batches = [_columns(self.lengths[batch.samples]) for batch in self.step(step)]
        return sum(int(each.sum()) for each in batches), sum(
            len(each) * int(each.max(axis=0).sum()) for each in batches
        )

    def _samples(self, number: int) -> np.ndarray:
        """Sample indices of micro-batch `number` of the stream of all epochs."""
        epoch, place = divmod(number, self.micro_batches_per_epoch)
        if epoch not in self._epochs:
            # A step spans two epochs at most unless the data is tiny; older ones are not needed again.
            self._epochs = {kept: plan for kept, plan in self._epochs.items() if kept == epoch - 1}
            self._epochs[epoch] = self._lay_out(epoch)
        samples, batches = self._epochs[epoch]
        batch = batches[place]
        return samples[self.cuts[batch] : self.cuts[batch + 1]]

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples in the order of `epoch`, sorted by length, and the order in which its micro-batches run."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        if self._decks:
            samples = np.concatenate([deck.drawn(epoch) for deck in self._decks])
        else:
            samples = np.arange(len(self.lengths), dtype=np.uint32)
        random.shuffle(samples)
        # High half: length; low half: place in the random order. So one quick in-place sort of integers is stable.
        keys = self._ranks[samples].astype(np.uint64) << np.uint64(32)
        keys |= np.arange(len(samples), dtype=np.uint32)
        keys.sort()
        places = keys.view(np.uint32)[::2]  # the low halves: every machine that torch runs on is little-endian
        return samples[places], self._stratified(epoch, random)

    def _stratified(self, epoch: int, random: np.random.Generator) -> np.ndarray:
        """The order in which an epoch's micro-batches run, [micro-batches]: one of each class of length in every step.

        A step that two epochs share takes what is left over. Within a step the order is random, so that no rank has the
        long ones alone.
        """
        count, in_step = self.micro_batches_per_epoch, self.micro_batches_per_step
        begun = -epoch * count % in_step  # micro-batches that the last step of the epoch before takes of this one
        steps = max(0, count - begun) // in_step
        classes = [random.permutation(each) for each in np.array_split(np.arange(count), in_step)]
        whole = random.permuted(np.stack([each[:steps] for each in classes], axis=1), axis=1)
        rest = random.permutation(np.concatenate([each[steps:] for each in classes]))
        return np.concatenate([rest[:begun], whole.ravel(), rest[begun:]])


@dataclass(frozen=True)
class _Deck:
    """The samples of one source, shortest first, of which every epoch has `count`, evenly over all lengths.

    With n samples, slot j of an epoch takes sample (n (j + 1) - phase) / count, rounded up, less one. The phase moves
    on by `count` from epoch to epoch, so that over any number of epochs each sample is drawn as often as any other,
    give or take one.
    """

    samples: np.ndarray  # uint32 [n]
    count: int
    phase: int  # 0 <= phase < n

    def drawn(self, epoch: int) -> np.ndarray:
        """What `epoch` has, uint32 [count], shortest first."""
        return self._at((self.phase + epoch * self.count) % len(self.samples))

    def longest(self) -> np.ndarray:
        """Of each slot the longest that it ever takes."""
        return self._at(0)

    def _at(self, phase: int) -> np.ndarray:
        ends = len(self.samples) * np.arange(1, self.count + 1, dtype=np.int64) - phase
        return self.samples[-(-ends // self.count) - 1]


def _decks(mixture: Mixture, ranks: np.ndarray, seed: int) -> list[_Deck]:
    """A deck for each source that has samples; which of equally long ones comes first is drawn once and for all."""
    decks = []
    for number, count in enumerate(mixture.drawn()):
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number], spawn_key=(1,))))
        samples = random.permutation(np.flatnonzero(mixture.source == number)).astype(np.uint32)
        if len(samples):
            samples = samples[np.argsort(ranks[samples], kind="stable")]
            decks.append(_Deck(samples, count, int(random.integers(len(samples)))))
    return decks


def sorted_by_length(lengths: np.ndarray) -> np.ndarray:
    """Indices that sort samples by `lengths` [n] or [n, k], column by column, shortest first; ties stay in order."""
    return np.lexsort(_columns(lengths).T[::-1])


def batches_by_length(lengths: np.ndarray, most_tokens: int) -> list[np.ndarray]:
    """Indices of all samples of `lengths` [n] or [n, k] in batches within `most_tokens`, equally long ones together.

    A sample that is longer than that is a batch of its own.
    """
    order = sorted_by_length(lengths)
    return np.split(order, cut_by_length(lengths[order], most_tokens)[1:-1])


def in_rounds(batches: Sequence[np.ndarray], ranks: int) -> list[np.ndarray]:
    """The same samples in batches whose number `ranks` divides, for ranks that must have equally many.

    The largest are cut in two until it does. Raises UserError when there are fewer samples than ranks.
    """
    batches = list(batches)
    while len(batches) % ranks:
        largest = max(range(len(batches)), key=lambda index: len(batches[index]))
        if len(batches[largest]) < 2:
            raise UserError(
                f"{len(batches)} held-out samples cannot keep {ranks} ranks in step: prepare more, or start fewer ranks"
            )
        batches[largest : largest + 1] = np.array_split(batches[largest], 2)
    return batches


def cut_by_length(ordered: np.ndarray, most_tokens: int | None, most_sentences: int | None = None) -> np.ndarray:
    """Where to cut sorted lengths [n] or [n, k] into the longest micro-batches within both bounds: [0, ..., n].

    A micro-batch computes its sentences times the longest of each column.
    """
    ordered = _columns(ordered)
    cuts = [0]
    total = len(ordered)
    while cuts[-1] < total:
        start = cuts[-1]
        room = min(total - start, most_sentences or total)
        if most_tokens is not None:
            room = min(room, max(1, most_tokens // max(1, int(ordered[start, 0]))))  # none after it is shorter
            longest = np.maximum.accumulate(ordered[start : start + room], axis=0).sum(axis=1, dtype=np.int64)
            positions = longest * np.arange(1, room + 1)  # of the first one, the first two, ...: only ever more
            room = max(1, int(np.searchsorted(positions, most_tokens, side="right")))
        cuts.append(start + room)
    return np.array(cuts, dtype=np.int64)


def _columns(lengths: np.ndarray) -> np.ndarray:
    """[n] or [n, k] -> [n, k]."""
    return lengths.reshape(len(lengths), -1)
