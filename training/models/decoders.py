"""The models that translate, as a search asks them for one token after another: see `training.models.decoding`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.data.tokenizers import EOS, PAD, SOS
from training.models.attention_gru import AttentionGRU, State
from training.models.decoding import Decoder
from training.models.gpt import GPT, Cache


class GPTDecoder:
    """A GPT as a `Decoder`: the prompt is `<sos> source <sep>`, the state is the key-value cache."""

    def __init__(self, model: GPT):
        self.model = model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def longest_source(self) -> int:
        return self.model.options.context - 3

    def room(self, source_length: int) -> int:
        return self.model.options.context - source_length - 2

    def begin(self, sources: list[Sequence[int]], limit: int) -> tuple[Tensor, Cache]:
        rows = [torch.from_numpy(self.model.vocabularies.prompt(source)) for source in sources]
        lengths = torch.tensor([len(row) for row in rows])
        prompts = pad_sequence(rows, batch_first=True, padding_value=PAD)
        width = prompts.shape[1]
        capacity = min(width + limit, self.model.options.context)
        return self.model.prefill(prompts.to(self.device), lengths.to(self.device), capacity)

    def extend(self, tokens: Tensor, state: Cache) -> Tensor:
        return self.model.extend(tokens, state)


class AttentionGRUDecoder:
    """An encoder-decoder as a `Decoder`: the encoder reads `source <eos>`, the decoder begins with `<sos>`."""

    def __init__(self, model: AttentionGRU):
        self.model = model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def longest_source(self) -> int:
        return self.model.options.max_length

    def room(self, source_length: int) -> int:
        return self.model.options.max_length + 1  # it was never trained to say more

    def begin(self, sources: list[Sequence[int]], limit: int) -> tuple[Tensor, SourceState]:
        rows = [torch.tensor([*source, EOS]) for source in sources]
        lengths = torch.tensor([len(row) for row in rows])
        padded = pad_sequence(rows, batch_first=True, padding_value=PAD)
        logits, state = self.model.begin(padded.to(self.device), lengths, SOS)
        return logits, SourceState(state, torch.arange(len(sources), device=self.device))

    def extend(self, tokens: Tensor, state: SourceState) -> Tensor:
        return self.model.extend(tokens, state.state)


class Ensemble:
    """Several decoders as one: a token's probability is the mean of theirs. They speak the same two vocabularies."""

    def __init__(self, members: Sequence[Decoder]):
        self.members = members

    @property
    def longest_source(self) -> int:
        return min(member.longest_source for member in self.members)

    def room(self, source_length: int) -> int:
        return min(member.room(source_length) for member in self.members)

    def begin(self, sources: list[Sequence[int]], limit: int) -> tuple[Tensor, MemberStates]:
        begun = [member.begin(sources, limit) for member in self.members]
        return _mean_probability([logits for logits, _ in begun]), MemberStates([state for _, state in begun])

    def extend(self, tokens: Tensor, state: MemberStates) -> Tensor:
        extended = [member.extend(tokens, own) for member, own in zip(self.members, state.states, strict=True)]
        return _mean_probability(extended)


def _mean_probability(logits: list[Tensor]) -> Tensor:
    """Logits of the mean of several distributions, each [B, vocabulary]."""
    return torch.stack([each.float().log_softmax(-1) for each in logits]).logsumexp(0)


@dataclass
class MemberStates:
    """The states of an ensemble's members."""

    states: list[Any]

    def select(self, rows: Tensor) -> MemberStates:
        """Those of `rows`, indices [B']."""
        return MemberStates([state.select(rows) for state in self.states])


@dataclass
class SourceState:
    """The state of an encoder-decoder, and which source each of its rows decodes: sources [B]."""

    state: State
    sources: Tensor

    def select(self, rows: Tensor) -> SourceState:
        """The state of `rows`, indices [B']."""
        sources, encoded = self.sources[rows], self.state.encoded
        # Rows of one source remember the same, and that is most of the state: hypotheses that change places leave it.
        if not torch.equal(sources, self.sources):
            encoded = encoded.select(rows)
        return SourceState(State([hidden[rows] for hidden in self.state.hidden], encoded), sources)
