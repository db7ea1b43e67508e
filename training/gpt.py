"""Trains a GPT to translate Chinese to English, as one sequence `<sos> Chinese <sep> English <eos>`.

    torchrun --nproc-per-node=2 -m training.gpt configs/gpt/sample.yaml
    python -m training.gpt configs/gpt/base.yaml --optim.lr 5e-4 --dry-run

The same command starts, resumes, and says so when the run is finished.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from training.base.console import UserError, run_main
from training.base.environment import staged
from training.base.options import parse
from training.data.prepared import Part, open_prepared
from training.data.tokenizers import EOS, PAD, SEP, SOS
from training.engine.batch_plan import BatchPlan
from training.engine.cluster import Cluster
from training.engine.loop import train
from training.engine.task import RunOptions, Share, Task, Validation
from training.models.gpt import GPT, GPTOptions
from training.translation import Pairs, TranslationLoss, held_out_scores


class LossOptions(TranslationLoss):
    """Which tokens are learned, and how."""

    source_weight: float = Field(0.0, ge=0, description="weight of a source token's loss; a target token's is 1")


class GPTConfig(RunOptions):
    """All options of a GPT training."""

    model: GPTOptions = Field(default_factory=GPTOptions)
    loss: LossOptions = Field(default_factory=LossOptions)


class Sequences(Pairs):
    """`<sos> source <sep> target` of every pair that fits the context; `<eos>` is predicted but never an input.

    lengths [n]: input tokens. The source's last prediction is `<sep>`.
    """

    def __init__(self, part: Part, context: int):
        lengths = part.source.lengths + part.target.lengths + 2
        super().__init__(part, lengths <= context)
        self.lengths = lengths[self.rows]
        self.source_tokens = part.source.lengths[self.rows] + 1

    def weights(self, source_weight: float) -> np.ndarray:
        """Each sequence's share in the loss's denominator, [n]."""
        return self.target_tokens + source_weight * self.source_tokens

    def batch(self, samples: np.ndarray, *, with_source: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs [B, T], padded on the right, and the N positions that are scored.

        Returns inputs, scored [N] (indices into the B*T positions), labels [N], and is_target [N]: whether the label
        belongs to the target side. Without `with_source`, only those that do are scored.
        """
        rows = self.rows[samples]
        source, target = self.part.source, self.part.target
        longest = int(self.lengths[samples].max())
        full = np.full((len(rows), longest + 1), PAD, dtype=np.int64)  # one more than inputs: <eos> is a label only
        full[:, 0] = SOS
        position = np.arange(full.shape[1])
        separator = 1 + source.lengths[rows][:, None]
        end = separator + 1 + target.lengths[rows][:, None]
        padded_source, padded_target = source.padded(rows, PAD), target.padded(rows, PAD)
        inside_source = np.arange(padded_source.shape[1]) < separator - 1
        inside_target = np.arange(padded_target.shape[1]) < end - separator - 1
        full[(position >= 1) & (position < separator)] = padded_source[inside_source]
        np.put_along_axis(full, separator, SEP, axis=1)
        full[(position > separator) & (position < end)] = padded_target[inside_target]
        inputs = full[:, :-1].copy()
        np.put_along_axis(full, end, EOS, axis=1)  # behind the copy: a label only
        predicts_target = (position >= separator) & (position < end)
        scored = (position < end) if with_source else predicts_target
        labels, scored, predicts_target = full[:, 1:], scored[:, :-1], predicts_target[:, :-1]
        return (
            torch.from_numpy(inputs),
            torch.from_numpy(np.flatnonzero(scored)),
            torch.from_numpy(labels[scored]),
            torch.from_numpy(predicts_target[scored]),
        )


def summed_loss(
    model: nn.Module, sequences: Sequences, samples: np.ndarray, options: LossOptions, device: torch.device
) -> Tensor:
    """Cross-entropy summed over a micro-batch's scored tokens, the source's weighted: a scalar, with gradient."""
    batch = sequences.batch(options.read(samples), with_source=options.source_weight > 0)
    inputs, scored, labels, is_target = (tensor.to(device, non_blocking=True) for tensor in batch)
    losses = options.losses(model(inputs, scored), labels)
    if options.source_weight == 0:
        return losses.sum()
    return (losses * torch.where(is_target[: len(losses)], 1.0, options.source_weight)).sum()


def validation_scores(
    model: nn.Module, sequences: Sequences, cluster: Cluster, share: Share | None = None
) -> Validation:
    """Loss and accuracy over all target tokens, the reference being given up to each."""

    def predict(replica: nn.Module, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        batch = sequences.batch(samples, with_source=False)
        inputs, scored, labels, _ = (tensor.to(cluster.device) for tensor in batch)
        return replica(inputs, scored), labels

    return held_out_scores(model, sequences, predict, cluster, share)


def plan_of(config: GPTConfig, pairs: Sequences) -> BatchPlan:
    """The order in which the run trains on `pairs`."""
    weights, optim = pairs.weights(config.loss.source_weight), config.optim
    return BatchPlan(pairs.lengths, weights, config.batch, seed=config.seed, epochs=optim.epochs, steps=optim.steps)


def main() -> int:
    config, dry_run = parse(GPTConfig, sys.argv[1:], prog="python -m training.gpt", about=__doc__)
    data = open_prepared(staged(config.data))
    if not data.joint_vocabulary:
        raise UserError(
            f"{config.data} has two vocabularies, but a GPT reads and writes one: prepare with --vocabularies joint"
        )
    pairs, held_out = (Sequences(data.part(name), config.model.context) for name in ("train", "validation"))
    for each in (pairs, held_out):
        each.check(f"model.context ({config.model.context})")

    with Cluster(config.session.hang_timeout + 60, deterministic=config.deterministic) as cluster:
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        model = GPT(config.model, data.source_tokenizer.vocabulary_size)
        plan = plan_of(config, pairs)
        scored = pairs.target_tokens.sum() + (pairs.source_tokens.sum() if config.loss.source_weight else 0)
        task = Task(
            name="gpt",
            model=model,
            plan=plan,
            loss=lambda replica, samples: summed_loss(replica, pairs, samples, config.loss, cluster.device),
            validate=lambda replica, share: validation_scores(replica, held_out, cluster, share),
            flops_per_token=config.loss.readings
            * model.flops_per_token(float(pairs.lengths.mean()), float(scored / pairs.lengths.sum())),
        )
        return train(config, task, data, cluster, dry_run=dry_run)


if __name__ == "__main__":
    run_main(main)
