"""Greedy decoding in batches, with whatever the model remembers between two tokens.

Promises: one result per source, in the order of the sources, the same as decoding each source alone (up to ties within
floating-point rounding); decoding always ends; `<pad>`, `<sos>` and `<sep>` are never produced; a source that cannot be
translated is reported in its result and stops nobody else's.

The search knows no model: it asks a `Decoder` for the next logits. `GPTDecoder` is the one for `training.models.gpt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from data_prep.tokenizers import EOS, PAD, SEP, SOS
from launch.console import Progress
from training.models.gpt import GPT, Cache

NEVER_PRODUCED = (PAD, SOS, SEP)


class Decoder(Protocol):
    """What a model must offer to be decoded token by token. Runs under `torch.inference_mode`, in evaluation mode."""

    def room(self, source_length: int) -> int:
        """How many tokens, `<eos>` included, can follow a source of this length at most; below 1 it is too long."""

    def begin(self, sources: list[Sequence[int]], limit: int) -> tuple[Tensor, Any]:
        """Reads a batch of sources (ids without special tokens), none empty or too long.

        Returns the logits of the first target token [B, vocabulary] and a state, with `.select(rows)` for indices [B'],
        that `extend` takes on for up to `limit` - 1 more tokens per row.
        """

    def extend(self, tokens: Tensor, state: Any) -> Tensor:
        """Appends one token per row, tokens [B], to the state in place; returns the next logits [B, vocabulary].

        No row is extended beyond its `room`.
        """


class GPTDecoder:
    """A GPT as a `Decoder`: the prompt is `<sos> source <sep>`, the state is the key-value cache."""

    def __init__(self, model: GPT):
        self.model = model
        self.device = next(model.parameters()).device

    def room(self, source_length: int) -> int:
        return self.model.options.context - source_length - 2

    def begin(self, sources: list[Sequence[int]], limit: int) -> tuple[Tensor, Cache]:
        lengths = torch.tensor([len(source) + 2 for source in sources])
        width = int(lengths.max())
        prompts = torch.full((len(sources), width), PAD)
        for row, source in zip(prompts, sources, strict=True):
            row[: len(source) + 2] = torch.tensor([SOS, *source, SEP])
        capacity = min(width + limit, self.model.options.context)
        return self.model.prefill(prompts.to(self.device), lengths.to(self.device), capacity)

    def extend(self, tokens: Tensor, state: Cache) -> Tensor:
        return self.model.extend(tokens, state)


@dataclass
class Translation:
    """What became of one source.

    ids: the target without special tokens. ended: the model said `<eos>`; otherwise the length limit cut it off.
    problem: why the source was not translated at all (then `ids` is empty), else None.
    """

    ids: list[int]
    ended: bool = False
    problem: str | None = None


def translate(
    decoder: Decoder,
    sources: Sequence[Sequence[int]],
    *,
    limit_factor: float = 2.0,
    limit_extra: int = 10,
    tokens_per_batch: int = 16384,
    label: str | None = None,
) -> list[Translation]:
    """Translates `sources` (ids without special tokens), the most probable token at each step.

    A translation ends after `limit_factor` x source length + `limit_extra` tokens at the latest, or where the model's
    context ends. `tokens_per_batch` bounds rows x (longest source + its limit), which is what the memory of the
    key-value cache grows with; a batch has one row at least. With `label`, a progress line is shown.
    """
    results = [Translation([]) for _ in sources]
    limits = {}
    for index, (source, result) in enumerate(zip(sources, results, strict=True)):
        room = decoder.room(len(source))
        if len(source) == 0:
            result.problem = "the sentence is empty"
        elif room < 1:
            most = len(source) + room - 1
            result.problem = f"the sentence is too long: {len(source):,} tokens, the model takes {most:,} at most"
        else:
            limits[index] = min(int(limit_factor * len(source)) + limit_extra, room)
    # Longest first: what does not fit into memory fails at once, and the time left is not underestimated.
    order = sorted(limits, key=lambda index: -len(sources[index]))
    with torch.inference_mode(), Progress(label or "", len(order), "sentences") as progress:
        for batch in _batches(order, [len(sources[i]) + limits[i] for i in order], tokens_per_batch):
            _translate_batch(decoder, batch, sources, limits, results)
            if label:
                progress.advance(len(batch))
    return results


def _batches(order: list[int], costs: list[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Cuts `order`, whose costs fall, into batches of rows x highest cost <= tokens_per_batch."""
    start = 0
    while start < len(order):
        rows = max(1, tokens_per_batch // costs[start])
        yield order[start : start + rows]
        start += rows


def _translate_batch(
    decoder: Decoder,
    batch: list[int],
    sources: Sequence[Sequence[int]],
    limits: dict[int, int],
    results: list[Translation],
) -> None:
    """Fills the results of the sources `batch` (indices), all of them decoded at once."""
    logits, state = decoder.begin([sources[index] for index in batch], max(limits[index] for index in batch))
    rows = batch  # which source each row of the state belongs to; finished rows stay for a while
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
            return
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
