"""Trains a GPT to translate Chinese to English, as one sequence `<sos> Chinese <sep> English <eos>`.

    torchrun --nproc-per-node=2 -m training.gpt configs/gpt/sample.yaml
    python -m training.gpt configs/gpt/base.yaml --optim.lr 5e-4 --dry-run

The same command starts, resumes, and says so when the run is finished.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from training.base.console import UserError, run_main
from training.base.environment import staged
from training.base.options import parse
from training.data.prepared import Part, Prepared, open_prepared
from training.data.tokenizers import EOS, PAD
from training.engine.loop import train
from training.engine.task import RunOptions
from training.engine.watchdog import watched_ranks
from training.models.decoders import GPTDecoder
from training.models.gpt import GPT, GPTOptions, Vocabularies
from training.translation import Pairs, Translating, TranslationLoss


class LossOptions(TranslationLoss):
    """Which tokens are learned, and how."""

    source_weight: float = Field(0.0, ge=0, description="weight of a source token's loss; a target token's is 1")


class GPTConfig(RunOptions):
    """All options of a GPT training."""

    model: GPTOptions = Field(default_factory=GPTOptions)
    loss: LossOptions = Field(default_factory=LossOptions)

    @model_validator(mode="after")
    def _source_is_predicted(self) -> GPTConfig:
        if self.loss.source_weight and self.model.source == "both":
            raise ValueError(
                "loss.source_weight needs model.source causal: a token that is seen from both sides is not predicted"
            )
        return self


class Sequences(Pairs[LossOptions]):
    """`<sos> source <sep> target` of every pair that fits the context; `<eos>` is predicted but never an input.

    lengths [n]: input tokens; where the source is read both ways [n, 2], prompt and target, which are padded apart. The
    last prediction that counts as the source's is `<sep>`.
    """

    def __init__(self, part: Part, model: GPTOptions, vocabularies: Vocabularies):
        prompt, target = part.source.lengths + 2, part.target.lengths
        super().__init__(part, prompt + target <= model.context)
        self.apart = model.source == "both"
        self.vocabularies = vocabularies
        lengths = np.stack([prompt, target], axis=1)[self.rows]
        self.lengths = lengths if self.apart else lengths.sum(axis=1)
        self.prompts = lengths[:, 0]
        self.source_tokens = self.prompts - 1

    @classmethod
    def of(cls, data: Prepared, part: str, model: GPTOptions) -> Sequences:
        """Those of a part of prepared data."""
        return cls(data.part(part), model, Vocabularies.of(data.source_tokenizer, data.target_tokenizer))

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
        return model(inputs, scored, torch.from_numpy(self.prompts[samples])), labels, weights

    def batch(self, samples: np.ndarray, *, with_source: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs [B, T], laid out as `GPT.forward` reads them, and the N positions that are scored.

        Returns inputs, scored [N] (indices into the B*T positions), labels [N], and is_target [N]: whether the label
        belongs to the target side. Without `with_source`, only those that do are scored.
        """
        prompts = self.prompts[samples]
        begins = np.full_like(prompts, prompts.max()) if self.apart else prompts  # the target's column
        ends = begins + self.target_tokens[samples] - 1
        inputs, labels = np.full((2, len(samples), ends.max()), PAD)
        is_target = np.zeros(inputs.shape, bool)
        for place, row in enumerate(self.rows[samples]):
            target, prompt, begin, end = self.part.target[row], prompts[place], begins[place], ends[place]
            inputs[place, :prompt] = self.vocabularies.prompt(self.part.source[row])
            inputs[place, begin:end] = target
            labels[place, : prompt - 1] = inputs[place, 1:prompt]
            predicted = np.r_[prompt - 1, begin:end]
            labels[place, predicted] = *target, EOS
            is_target[place, predicted] = True
        scored = labels != PAD if with_source else is_target
        places, learned = torch.from_numpy(np.flatnonzero(scored)), torch.from_numpy(labels[scored])
        return torch.from_numpy(inputs), places, learned, torch.from_numpy(is_target[scored])


def main() -> int:
    config, dry_run = parse(GPTConfig, sys.argv[1:], prog="python -m training.gpt", about=__doc__)
    data = open_prepared(staged(config.data))
    if config.loss.source_weight and not data.joint_vocabulary:
        raise UserError(
            f"{config.data} has two vocabularies, of which a GPT writes the target's only, so loss.source_weight must "
            "be 0: or prepare with --vocabularies joint"
        )
    pairs, held_out = (Sequences.of(data, name, config.model) for name in ("train", "validation"))
    for each in (pairs, held_out):
        each.check(f"model.context ({config.model.context})")

    with watched_ranks(config) as cluster:
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        model = GPT(config.model, pairs.vocabularies)
        prompt, written = float(pairs.prompts.mean()), float(pairs.target_tokens.mean())
        scored = written + (prompt - 1 if config.loss.source_weight else 0)
        flops = model.flops_per_token(prompt, written - 1, scored)
        decoder, tokenizer = GPTDecoder(model), data.target_tokenizer
        task = Translating("gpt", config, decoder, pairs, held_out, tokenizer, cluster, flops)
        return train(config, task, data, cluster, dry_run=dry_run)


if __name__ == "__main__":
    run_main(main)
