"""Trains a GRU encoder-decoder with attention to translate.

    python -m launch.run configs/seq2seq/sample.yaml
    python -m training.seq2seq configs/seq2seq/base.yaml --optim.lr 5e-4 --dry-run

The same command starts, resumes, and says so when the run is finished.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from training.base.console import run_main
from training.base.environment import staged
from training.base.options import parse
from training.data.prepared import Part, open_prepared
from training.data.tokenizers import EOS, PAD, SOS
from training.engine.budget import within_budget
from training.engine.loop import train
from training.engine.task import RunOptions
from training.engine.watchdog import watched_ranks
from training.models.attention_gru import AttentionGRU, AttentionGRUOptions
from training.models.decoders import AttentionGRUDecoder
from training.translation import Pairs, Translating, TranslationChooser, TranslationLoss


class LossOptions(TranslationLoss):
    """What is learned, and from which inputs."""

    teacher_forcing: float = Field(
        1.0, ge=0, le=1, description="share of input words that are the reference's; the others are the model's own"
    )


class Seq2SeqConfig(RunOptions):
    """All options of a seq2seq training."""

    model: AttentionGRUOptions = Field(default_factory=AttentionGRUOptions)
    loss: LossOptions = Field(default_factory=LossOptions)


class TwoSides(Pairs[LossOptions]):
    """`source <eos>` for the encoder, `<sos> target` for the decoder, `target <eos>` to be predicted.

    lengths [n, 2]: target, then source, special tokens included. Batches are sorted by the target first, because a step
    of the decoder costs more than one of the encoder.
    """

    def __init__(self, part: Part, max_length: int):
        super().__init__(part, np.maximum(part.source.lengths, part.target.lengths) <= max_length)
        self.source_tokens = part.source.lengths[self.rows] + 1
        self.lengths = np.stack([self.target_tokens, self.source_tokens], axis=1)

    def batch(self, samples: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """source [B, S], source lengths [B], inputs [B, T], the N scored positions (of B*T), their labels [N]."""
        rows = self.rows[samples]
        source, source_lengths = _followed_by_end(self.part.source.padded(rows, PAD), self.source_tokens[samples])
        labels, target_lengths = _followed_by_end(self.part.target.padded(rows, PAD), self.target_tokens[samples])
        inputs = np.concatenate([np.full((len(rows), 1), SOS), labels[:, :-1]], axis=1)
        scored = np.flatnonzero(np.arange(labels.shape[1]) < target_lengths[:, None])
        learned = labels.reshape(-1)[scored]
        sources, lengths = torch.from_numpy(source), torch.from_numpy(source_lengths)
        return sources, lengths, torch.from_numpy(inputs), torch.from_numpy(scored), torch.from_numpy(learned)

    def predictions(
        self, model: nn.Module, samples: np.ndarray, device: torch.device, options: LossOptions | None = None
    ) -> tuple[Tensor, Tensor, None]:
        """See `Pairs`."""
        source, lengths, inputs, scored, labels = self.batch(samples)
        # Drawn on the CPU, so that it is the same on every device.
        own = torch.rand(inputs.shape) >= options.teacher_forcing if options and options.teacher_forcing < 1 else None
        source, inputs, scored, labels = (
            tensor.to(device, non_blocking=True) for tensor in (source, inputs, scored, labels)
        )
        return model(source, lengths, inputs, scored, None if own is None else own.to(device)), labels, None


def _followed_by_end(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`ids` [B, L] with `<eos>` behind each row's end, [B, L + 1]; and the `lengths` [B], which count it."""
    longer = np.pad(ids, ((0, 0), (0, 1)), constant_values=PAD)
    np.put_along_axis(longer, lengths[:, None] - 1, EOS, axis=1)
    return longer, lengths


def main() -> int:
    config, dry_run = parse(Seq2SeqConfig, sys.argv[1:], prog="python -m training.seq2seq", about=__doc__)
    data = open_prepared(staged(config.data))
    pairs, held_out = (TwoSides(data.part(name), config.model.max_length) for name in ("train", "validation"))
    for each in (pairs, held_out):
        each.check(f"model.max_length ({config.model.max_length})")

    with watched_ranks(config) as cluster:

        def build(config: Seq2SeqConfig) -> Translating:
            torch.manual_seed(config.seed)  # the same initial weights on every rank
            sizes = data.source_tokenizer.vocabulary_size, data.target_tokenizer.vocabulary_size
            model = AttentionGRU(config.model, *sizes)
            flops = model.flops_per_token(float(pairs.source_tokens.mean()), float(pairs.target_tokens.mean()))
            decoder, tokenizer = AttentionGRUDecoder(model), data.target_tokenizer
            return Translating("seq2seq", config, decoder, pairs, held_out, tokenizer, cluster, flops, calls_vary=True)

        chooser = TranslationChooser(pairs)
        config = within_budget(config, build, data, cluster, sys.argv[1:], chooser, dry_run=dry_run)
        return train(config, build(config), data, cluster, dry_run=dry_run)


if __name__ == "__main__":
    run_main(main)
