"""The translators that are evaluated here, as `Decoder`s; and what else is particular to each.

Each belongs to a training script: `config` are its options, `build` makes its untrained model, `pairs` reads the pairs
of a part that fit the model as the training reads them. `attention` is what the model looked at from a source to a
target; None without attention, or where both together are too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training import gpt, seq2seq
from training.data.prepared import Part
from training.data.tokenizers import EOS, PAD, SEP, SOS, Tokenizer
from training.evaluation.translations.attention_maps import Sheet, alignment_map, attention_sheet
from training.models.attention_gru import AttentionGRU, State
from training.models.gpt import GPT, Cache


class GPTDecoder:
    """A GPT as a `Decoder`: the prompt is `<sos> source <sep>`, the state is the key-value cache."""

    config = gpt.GPTConfig

    def __init__(self, model: GPT):
        self.model = model
        self.device = next(model.parameters()).device

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

    @staticmethod
    def build(config: gpt.GPTConfig, source_vocabulary_size: int, target_vocabulary_size: int) -> GPT:
        return GPT(config.model, target_vocabulary_size)

    def pairs(self, part: Part) -> gpt.Sequences:
        return gpt.Sequences(part, self.model.options.context)

    @torch.inference_mode()
    def attention(
        self,
        source: Sequence[int],
        target: Sequence[int],
        source_tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
    ) -> Sheet | None:
        begin, end = [SOS, *source, SEP], [*target, EOS]
        if len(begin) + len(end) > self.model.options.context:
            return None
        labels = [*source_tokenizer.token_texts(begin), *target_tokenizer.token_texts(end)]
        maps = self.model.attention_maps(torch.tensor([*begin, *end], device=self.device))
        return attention_sheet(maps, labels, separator=len(source) + 1)


class AttentionGRUDecoder:
    """An encoder-decoder as a `Decoder`: the encoder reads `source <eos>`, the decoder begins with `<sos>`."""

    config = seq2seq.Seq2SeqConfig

    def __init__(self, model: AttentionGRU):
        self.model = model
        self.device = next(model.parameters()).device

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

    @staticmethod
    def build(config: seq2seq.Seq2SeqConfig, source_vocabulary_size: int, target_vocabulary_size: int) -> AttentionGRU:
        return AttentionGRU(config.model, source_vocabulary_size, target_vocabulary_size)

    def pairs(self, part: Part) -> seq2seq.TwoSides:
        return seq2seq.TwoSides(part, self.model.options.max_length)

    @torch.inference_mode()
    def attention(
        self,
        source: Sequence[int],
        target: Sequence[int],
        source_tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
    ) -> Sheet | None:
        if self.model.options.attention == "none":
            return None
        read, said = [*source, EOS], [*target, EOS]
        inputs = (torch.tensor(ids, device=self.device) for ids in (read, [SOS, *target]))
        weights = self.model.attention_map(*inputs)
        return alignment_map(weights, source_tokenizer.token_texts(read), target_tokenizer.token_texts(said))


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


DECODERS: dict[str, Any] = {"gpt": GPTDecoder, "seq2seq": AttentionGRUDecoder}  # by the name of the training
