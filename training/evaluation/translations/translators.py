"""The translators that are evaluated here: `Decoder`s, and what else is particular to each.

Each belongs to a training script: `config` are its options, `build` makes its untrained model, `pairs` reads the pairs
of a part that fit the model as the training reads them. `attention` is what the model looked at from a source to a
target; None without attention, or where both together are too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from training import gpt, seq2seq
from training.data.prepared import Part
from training.data.tokenizers import EOS, SEP, SOS, Tokenizer
from training.evaluation.translations.attention_maps import alignment_map, attention_sheet
from training.models.attention_gru import AttentionGRU
from training.models.decoders import AttentionGRUDecoder, Ensemble, GPTDecoder
from training.models.gpt import GPT, Vocabularies
from training.report.sheets import Sheet


class GPTTranslator(GPTDecoder):
    """Of the training `gpt`."""

    config = gpt.GPTConfig

    @staticmethod
    def build(config: gpt.GPTConfig, source: Tokenizer, target: Tokenizer) -> GPT:
        return GPT(config.model, Vocabularies.of(source, target))

    def pairs(self, part: Part) -> gpt.Sequences:
        return gpt.Sequences(part, self.model.options.context, self.model.vocabularies)

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
        tokens = torch.tensor([*self.model.vocabularies.prompt(source), *end], device=self.device)
        return attention_sheet(self.model.attention_maps(tokens), labels, separator=len(source) + 1)


class AttentionGRUTranslator(AttentionGRUDecoder):
    """Of the training `seq2seq`."""

    config = seq2seq.Seq2SeqConfig

    @staticmethod
    def build(config: seq2seq.Seq2SeqConfig, source: Tokenizer, target: Tokenizer) -> AttentionGRU:
        return AttentionGRU(config.model, source.vocabulary_size, target.vocabulary_size)

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


class EnsembleTranslator(Ensemble):
    """Of several runs; what its members look at are as many maps, of which none is the ensemble's."""

    def attention(self, *_: object) -> None:
        return None


TRANSLATORS: dict[str, Any] = {"gpt": GPTTranslator, "seq2seq": AttentionGRUTranslator}  # by the name of the training
