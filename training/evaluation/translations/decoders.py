"""The kinds of models that are evaluated here: what is particular to each, and nothing else.

A family is one training script's: its options, its model, and how that is decoded, scored and looked into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from training import gpt, seq2seq
from training.data.prepared import Part
from training.data.tokenizers import EOS, PAD, SEP, SOS, Tokenizer
from training.engine.task import RunOptions
from training.evaluation.translations.attention_maps import Sheet, alignment_map, attention_sheet
from training.evaluation.translations.decoding import Decoder
from training.models.attention_gru import AttentionGRU, State
from training.models.gpt import GPT, Cache
from training.translation import Pairs


class Family(Protocol):
    """See the module's docstring."""

    @property
    def config(self) -> type[RunOptions]: ...

    def build(self, config: Any, source_vocabulary_size: int, target_vocabulary_size: int) -> nn.Module:
        """The untrained model."""

    def decoder(self, model: Any) -> Decoder:
        """The model as `training.evaluation.translations.decoding` asks it."""

    def pairs(self, config: Any, part: Part) -> Pairs:
        """The pairs of the part that fit the model, as its training reads them."""

    def attention(
        self,
        model: Any,
        source: Sequence[int],
        target: Sequence[int],
        source_tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
    ) -> Sheet | None:
        """What the model looked at from `source` to `target`; None without attention, or where both are too long."""


class GPTFamily:
    """Models of `training.gpt`."""

    config = gpt.GPTConfig

    def build(self, config: gpt.GPTConfig, source_vocabulary_size: int, target_vocabulary_size: int) -> GPT:
        return GPT(config.model, target_vocabulary_size)

    def decoder(self, model: GPT) -> GPTDecoder:
        return GPTDecoder(model)

    def pairs(self, config: gpt.GPTConfig, part: Part) -> gpt.Sequences:
        return gpt.Sequences(part, config.model.context)

    @torch.inference_mode()
    def attention(
        self,
        model: GPT,
        source: Sequence[int],
        target: Sequence[int],
        source_tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
    ) -> Sheet | None:
        begin, end = [SOS, *source, SEP], [*target, EOS]
        if len(begin) + len(end) > model.options.context:
            return None
        labels = [*source_tokenizer.token_texts(begin), *target_tokenizer.token_texts(end)]
        maps = model.attention_maps(torch.tensor([*begin, *end], device=device_of(model)))
        return attention_sheet(maps, labels, separator=len(source) + 1)


class Seq2SeqFamily:
    """Models of `training.seq2seq`."""

    config = seq2seq.Seq2SeqConfig

    def build(
        self, config: seq2seq.Seq2SeqConfig, source_vocabulary_size: int, target_vocabulary_size: int
    ) -> AttentionGRU:
        return AttentionGRU(config.model, source_vocabulary_size, target_vocabulary_size)

    def decoder(self, model: AttentionGRU) -> AttentionGRUDecoder:
        return AttentionGRUDecoder(model)

    def pairs(self, config: seq2seq.Seq2SeqConfig, part: Part) -> seq2seq.TwoSides:
        return seq2seq.TwoSides(part, config.model.max_length)

    @torch.inference_mode()
    def attention(
        self,
        model: AttentionGRU,
        source: Sequence[int],
        target: Sequence[int],
        source_tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
    ) -> Sheet | None:
        if model.options.attention == "none":
            return None
        read, said = [*source, EOS], [*target, EOS]
        device = device_of(model)
        weights = model.attention_map(torch.tensor(read, device=device), torch.tensor([SOS, *target], device=device))
        return alignment_map(weights, source_tokenizer.token_texts(read), target_tokenizer.token_texts(said))


FAMILIES: dict[str, Family] = {"gpt": GPTFamily(), "seq2seq": Seq2SeqFamily()}


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


class GPTDecoder:
    """A GPT as a `Decoder`: the prompt is `<sos> source <sep>`, the state is the key-value cache."""

    def __init__(self, model: GPT):
        self.model = model
        self.device = device_of(model)

    @property
    def longest_source(self) -> int:
        return self.model.options.context - 3

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


class AttentionGRUDecoder:
    """An encoder-decoder as a `Decoder`: the encoder reads `source <eos>`, the decoder begins with `<sos>`."""

    def __init__(self, model: AttentionGRU):
        self.model = model
        self.device = device_of(model)

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
