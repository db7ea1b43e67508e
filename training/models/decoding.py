"""Decoding in batches, greedy or by beam search, with whatever the model remembers between two tokens.

Promises: one result per source, in the order of the sources, the same as decoding each source alone (up to ties within
floating-point rounding); decoding always ends; `<pad>`, `<sos>` and `<sep>` are never produced; a source that cannot be
translated is reported in its result and stops nobody else's.

The search knows no model: it asks a `Decoder` for the next logits. Those of the models here are in
`training.models.decoders`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from training.base.console import UserError
from training.base.progress import Progress
from training.data.tokenizers import EOS, PAD, SEP, SOS

NEVER_PRODUCED = (PAD, SOS, SEP)


class Decoder(Protocol):
    """What a model must offer to be decoded token by token. Runs under `torch.inference_mode`, in evaluation mode."""

    @property
    def longest_source(self) -> int:
        """Tokens of the longest source that the model takes; at least one token can follow it."""

    def room(self, source_length: int) -> int:
        """How many tokens, `<eos>` included, can follow a source of this length (at most `longest_source`)."""

    def begin(self, sources: list[Sequence[int]], limit: int) -> tuple[Tensor, Any]:
        """Reads a batch of sources (ids without special tokens), none empty or too long.

        Returns the logits of the first target token [B, vocabulary] and a state that `extend` takes on for up to
        `limit` - 1 more tokens per row. Its `.select(rows)`, for indices [B'] in any order and any number of times,
        is the state of those rows: a copy, so that equal rows go their own ways.
        """

    def extend(self, tokens: Tensor, state: Any) -> Tensor:
        """Appends one token per row, tokens [B], to the state in place; returns the next logits [B, vocabulary].

        No row is extended beyond its `room`.
        """


@dataclass
class Translation:
    """What became of one source."""

    ids: list[int]  # the target without special tokens
    ended: bool = False  # by `<eos>`; otherwise the length limit cut it off
    problem: str | None = None  # why the source was not translated at all; then `ids` is empty


MAX_BEAM_SIZE = 1000  # far beyond what helps: more is a slip, and would be killed for memory


def check_search(beam_size: int, length_penalty: float) -> None:
    """Raises UserError unless these are a beam size and a length penalty that `translate` can use."""
    if beam_size < 1:
        raise UserError(f"the beam size must be 1 (greedy) or more, got {beam_size}: --beam_size 5 is a usual one")
    if beam_size > MAX_BEAM_SIZE:
        raise UserError(
            f"the beam size must be {MAX_BEAM_SIZE} or less, got {beam_size}: a beam takes that many times the "
            "memory of one sentence, and finds nothing better beyond 10 or so; --beam_size 5 is a usual one"
        )
    if not 0 <= length_penalty < math.inf:
        raise UserError(
            f"the length penalty must be 0 (none) or more, got {length_penalty:g}: --length_penalty 1 is a usual one"
        )


def translate(
    decoder: Decoder,
    sources: Sequence[Sequence[int]],
    *,
    beam_size: int = 1,
    length_penalty: float = 1.0,
    limit_factor: float = 2.0,
    limit_extra: int = 10,
    tokens_per_batch: int = 16384,
    label: str | None = None,
) -> list[Translation]:
    """Translates `sources` (ids without special tokens): by `greedy_search`, or with `beam_size` > 1 by `beam_search`.

    A translation ends after `limit_factor` x source length + `limit_extra` tokens at the latest, or where the model's
    room ends. `tokens_per_batch` bounds rows x (longest source + its limit), which is what the memory of a key-value
    cache grows with; a batch has one source at least, a source has `beam_size` rows. With `label`, a progress line is
    shown. Raises UserError for what `check_search` refuses.
    """
    check_search(beam_size, length_penalty)
    results = [Translation([]) for _ in sources]
    limits = {}
    for index, (source, result) in enumerate(zip(sources, results, strict=True)):
        if len(source) == 0:
            result.problem = "the sentence is empty"
        elif len(source) > decoder.longest_source:
            found, most = f"{len(source):,}", f"{decoder.longest_source:,}"
            result.problem = f"the sentence is too long: {found} tokens, the model takes {most} at most"
        else:
            limits[index] = min(int(limit_factor * len(source)) + limit_extra, decoder.room(len(source)))
    # Longest first: what does not fit into memory fails at once, and the time left is not underestimated.
    order = sorted(limits, key=lambda index: -len(sources[index]))
    costs = [beam_size * (len(sources[index]) + limits[index]) for index in order]
    with torch.inference_mode(), Progress(label or "", len(order), "sentences") as progress:
        for batch in _batches(order, costs, tokens_per_batch):
            batch_sources, batch_limits = [sources[index] for index in batch], [limits[index] for index in batch]
            if beam_size == 1:
                translations = greedy_search(decoder, batch_sources, batch_limits)
            else:
                translations = beam_search(decoder, batch_sources, batch_limits, beam_size, length_penalty)
            for index, translation in zip(batch, translations, strict=True):
                results[index] = translation
            if label:
                progress.advance(len(batch))
    return results


def _batches(order: list[int], costs: list[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Cuts `order`, whose costs fall, into batches of sources x highest cost <= tokens_per_batch."""
    start = 0
    while start < len(order):
        rows = max(1, tokens_per_batch // costs[start])
        yield order[start : start + rows]
        start += rows


def greedy_search(decoder: Decoder, sources: list[Sequence[int]], limits: list[int]) -> list[Translation]:
    """The most probable token at each step, all sources at once, until `<eos>` or `limits` tokens."""
    results = [Translation([]) for _ in sources]
    logits, state = decoder.begin(sources, max(limits))
    rows = list(range(len(sources)))  # which source each row of the state belongs to; finished rows stay for a while
    step = 0
    while True:
        step += 1
        logits[:, NEVER_PRODUCED] = -torch.inf
        tokens = _argmax(logits)
        going = []
        for row, (index, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            result = results[index]
            if result.ended:
                continue
            if token == EOS:
                result.ended = True
                continue
            result.ids.append(token)
            if step < limits[index]:
                going.append(row)
        if not going:
            return results
        # A finished row costs its share of every step; leaving costs a copy of all rows that stay. So rows leave by
        # the quarter, or when one of them has reached its limit: there is no room to extend it any further.
        if len(going) <= 0.75 * len(rows) or any(limits[index] <= step for index in rows):
            keep = torch.tensor(going, device=tokens.device)
            state, tokens, rows = state.select(keep), tokens[keep], [rows[row] for row in going]
        logits = decoder.extend(tokens, state)


def _argmax(logits: Tensor) -> Tensor:
    """[B, vocabulary] -> the index of each row's highest logit [B]."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    # torch's argmax is not vectorised on CPUs: it takes longer than the output layer it follows, numpy's a tenth of it.
    return torch.from_numpy(logits.float().numpy().argmax(-1))


def length_normaliser(length: int, length_penalty: float) -> float:
    """What a summed log-probability of `length` tokens is divided by (Wu et al. 2016, GNMT, eq. 14)."""
    return ((5 + length) / 6) ** length_penalty


def beam_search(
    decoder: Decoder, sources: list[Sequence[int]], limits: list[int], beam_size: int, length_penalty: float
) -> list[Translation]:
    """The best translations that a beam finds, all sources at once. For one source:

    A hypothesis Y is a sequence of tokens, its probability that of the model among the tokens that may be produced. At
    first the empty one is live. A step extends each live hypothesis by each token and takes the best 2 x `beam_size` by
    log P(Y). Those that end with `<eos>` and are among the first `beam_size` are finished; the best `beam_size` of the
    others are live in the next step. The search ends

    - when `beam_size` hypotheses have finished in all,
    - when no live one can still become better than the best finished one: its log P(Y) can only fall, and is divided by
      no more than the normaliser of the limit,
    - after as many steps as its limit says.

    The result is the finished hypothesis with the highest log P(Y) / ((5 + |Y|) / 6) ^ `length_penalty`, where |Y|
    counts `<eos>`; if none has finished, the most probable live one, not ended.
    """
    beams = [_Beam(limit, beam_size, length_penalty) for limit in limits]
    results: list[Translation] = [Translation([]) for _ in sources]
    logits, state = decoder.begin(sources, max(limits))
    going = list(range(len(sources)))  # the sources that are still searched, in the order of their rows
    scores = torch.zeros(len(sources), 1)  # log P of the live hypotheses [sources, live]; -inf where there are fewer
    produced = torch.empty(len(sources), 1, 0, dtype=torch.long)  # their tokens [sources, live, step]
    while True:
        live = scores.shape[1]
        logits = logits.float()
        logits[:, NEVER_PRODUCED] = -torch.inf
        # A row can have no more than 2 x beam_size of its source's best: all that follows is small, and on the CPU.
        best, tokens = logits.topk(min(2 * beam_size, logits.shape[1]), dim=-1)
        gains = (best - logits.logsumexp(-1, keepdim=True)).cpu()
        width = gains.shape[1]
        candidates = (scores[:, :, None] + gains.view(-1, live, width)).flatten(1)
        ranked, chosen = candidates.topk(min(2 * beam_size, candidates.shape[1]), dim=-1)
        parents = chosen // width
        tokens = tokens.cpu().view(len(going), -1).gather(1, chosen)
        ending = tokens == EOS

        for row, rank in (ending & (ranked > -torch.inf))[:, :beam_size].nonzero().tolist():
            ids = produced[row, parents[row, rank]].tolist()
            beams[going[row]].finish(ids, float(ranked[row, rank]))

        # The best that do not end, -inf where there are fewer: as many rows for every source, whatever became of it.
        scores, kept = ranked.masked_fill(ending, -torch.inf).topk(min(beam_size, ranked.shape[1]), dim=-1)
        parents, tokens = parents.gather(1, kept), tokens.gather(1, kept)
        produced = produced.gather(1, parents[:, :, None].expand(-1, -1, produced.shape[2]))
        produced = torch.cat([produced, tokens[:, :, None]], dim=2)

        staying = []
        for row, index in enumerate(going):
            if beams[index].goes_on(produced.shape[2], float(scores[row, 0])):
                staying.append(row)
            else:
                results[index] = beams[index].result(produced[row, 0].tolist())
        if not staying:
            return results
        keep = torch.tensor(staying)
        scores, produced, parents, tokens = scores[keep], produced[keep], parents[keep], tokens[keep]
        going = [going[row] for row in staying]
        # Reordering copies the whole state, which takes about as long as a step.
        rows = (keep[:, None] * live + parents).flatten()
        if not torch.equal(rows, torch.arange(len(logits))):
            state = state.select(rows.to(logits.device))
        logits = decoder.extend(tokens.flatten().to(logits.device), state)


@dataclass
class _Beam:
    """What is known of one source: whether its search goes on, and the best hypothesis that has finished."""

    limit: int
    beam_size: int
    length_penalty: float
    finished: int = 0
    best: list[int] = field(default_factory=list)
    best_score: float = -math.inf

    def finish(self, ids: list[int], log_probability: float) -> None:
        """Takes a hypothesis that ends: `ids`, then `<eos>`."""
        self.finished += 1
        score = log_probability / length_normaliser(len(ids) + 1, self.length_penalty)
        if score > self.best_score:
            self.best, self.best_score = ids, score

    def goes_on(self, step: int, best_live: float) -> bool:
        """Whether the search needs another step after `step` of them, with this log P of the best live hypothesis."""
        bound = best_live / length_normaliser(self.limit, self.length_penalty)
        return step < self.limit and self.finished < self.beam_size and self.best_score < bound

    def result(self, live: list[int]) -> Translation:
        """The best finished hypothesis, else `live`."""
        return Translation(self.best, ended=True) if self.finished else Translation(live)
