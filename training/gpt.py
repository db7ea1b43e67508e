"""Trains a GPT to translate, as one sequence `<sos> source <sep> target <eos>`.

    python -m launch.run configs/gpt/sample.yaml
    python -m training.gpt configs/gpt/base.yaml --optim.lr 5e-4 --dry-run

The same command starts, resumes, and says so when the run is finished.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from training.base.console import UserError, run_main
from training.base.environment import staged
from training.base.options import parse
from training.data.prepared import Part, Prepared, open_prepared
from training.data.tokenizers import EOS, PAD
from training.engine.budget import within_budget
from training.engine.loop import train
from training.engine.task import RunOptions
from training.engine.watchdog import watched_ranks
from training.models.decoders import GPTDecoder
from training.models.gpt import GPT, GPTOptions, Vocabularies
from training.translation import Pairs, Translating, TranslationChooser, TranslationLoss


class LossOptions(TranslationLoss):
    """Which tokens are learned, and how."""

    source_weight: float = Field(0.0, ge=0, description="weight of a source token's loss; a target token's is 1")


class GPTConfig(RunOptions):
    """All options of a GPT training."""

    model: GPTOptions = Field(default_factory=GPTOptions)
    loss: LossOptions = Field(default_factory=LossOptions)


class Sequences(Pairs[LossOptions]):
    """`<sos> source <sep> target` of every pair that fits the context; `<eos>` is predicted but never an input.

    lengths [n]: input tokens. The last prediction that counts as the source's is `<sep>`.
    """

    def __init__(self, part: Part, context: int, vocabularies: Vocabularies):
        lengths = part.source.lengths + part.target.lengths + 2
        super().__init__(part, lengths <= context)
        self.vocabularies = vocabularies
        self.lengths = lengths[self.rows]
        self.source_tokens = part.source.lengths[self.rows] + 1

    @classmethod
    def of(cls, data: Prepared, part: str, context: int) -> Sequences:
        """Those of a part of prepared data."""
        return cls(data.part(part), context, Vocabularies.of(data.source_tokenizer, data.target_tokenizer))

    def weights(self, options: LossOptions) -> np.ndarray:
        return self.target_tokens + options.source_weight * self.source_tokens

    def predictions(
        self, model: nn.Module, samples: np.ndarray, device: torch.device, options: LossOptions | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Pairs`."""
        source_weight = options.source_weight if options else 0.0
        batch = self.batch(samples, with_source=source_weight > 0)
        inputs, scored, labels, is_target = (tensor.to(device, non_blocking=True) for tensor in batch)
        weights = torch.where(is_target, 1.0, source_weight) if source_weight else None
        return model(inputs, scored), labels, weights

    def batch(self, samples: np.ndarray, *, with_source: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs [B, T], padded on the right, and the N positions that are scored.

        Returns inputs, scored [N] (indices into the B*T positions), labels [N], and is_target [N]: whether the label
        belongs to the target side. Without `with_source`, only those that do are scored.
        """
        source, target, rows = self.part.source, self.part.target, self.rows[samples]
        prompt = self.vocabularies.prompt
        whole = [torch.from_numpy(np.concatenate((prompt(source[row]), target[row], [EOS]))) for row in rows]
        inputs, labels = (
            pad_sequence(each, batch_first=True, padding_value=PAD)
            for each in ([row[:-1] for row in whole], [row[1:] for row in whole])
        )
        position = torch.arange(inputs.shape[1])
        separator = torch.from_numpy(self.source_tokens[samples])[:, None]
        inside = position < torch.from_numpy(self.lengths[samples])[:, None]
        is_target = inside & (position >= separator)
        scored = inside if with_source else is_target
        return inputs, scored.flatten().nonzero().squeeze(1), labels[scored], is_target[scored]


def main() -> int:
    config, dry_run = parse(GPTConfig, sys.argv[1:], prog="python -m training.gpt", about=__doc__)
    data = open_prepared(staged(config.data))
    if config.loss.source_weight and not data.joint_vocabulary:
        raise UserError(
            f"{config.data} has two vocabularies, of which a GPT writes the target's only, so loss.source_weight must "
            "be 0: or prepare with --vocabularies joint"
        )
    pairs, held_out = (Sequences.of(data, name, config.model.context) for name in ("train", "validation"))
    for each in (pairs, held_out):
        each.check(f"model.context ({config.model.context})")

    with watched_ranks(config) as cluster:

        def build(config: GPTConfig) -> Translating:
            torch.manual_seed(config.seed)  # the same initial weights on every rank
            model = GPT(config.model, pairs.vocabularies)
            scored = pairs.target_tokens + (pairs.source_tokens if config.loss.source_weight else 0)
            flops = model.flops_per_token(float(pairs.lengths.mean()), float(scored.mean()))
            decoder, tokenizer = GPTDecoder(model), data.target_tokenizer
            return Translating("gpt", config, decoder, pairs, held_out, tokenizer, cluster, flops)

        chooser = TranslationChooser(pairs)
        config = within_budget(config, build, data, cluster, sys.argv[1:], chooser, dry_run=dry_run)
        return train(config, build(config), data, cluster, dry_run=dry_run)


if __name__ == "__main__":
    run_main(main)
