"""What the two trainings on sentence pairs have in common: which pairs fit, and how held-out ones are scored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.prepared import Part
from launch.console import UserError, say
from training.engine.batch_plan import batches_by_length
from training.engine.cluster import Cluster
from training.engine.task import Share, Validation

# Positions of a validation batch. Its logits are the widest tensor of all, and must not outgrow those of training.
VALIDATION_TOKENS = 2048


class Pairs:
    """The sentence pairs of a part that a model can take, in an order of their own: sample i is row `rows[i]`.

    lengths [n, k]: the positions that a sample takes, column by column as the model lays it out. source_tokens,
    target_tokens [n]: predictions that belong to each side; the target's last is `<eos>`. left_out: pairs that do not
    fit.
    """

    lengths: np.ndarray
    source_tokens: np.ndarray
    target_tokens: np.ndarray

    def __init__(self, part: Part, fits: np.ndarray):
        self.part = part
        self.rows = np.flatnonzero(fits)
        self.left_out = len(fits) - len(self.rows)
        self.target_tokens = part.target.lengths[self.rows] + 1

    def check(self, bound: str) -> None:
        """Tells how many pairs do not fit, and why: `bound` names the option. Raises UserError when none does."""
        if not len(self.rows):
            raise UserError(
                f"the {self.part.name} part has {self.left_out:,} pairs and none that fits {bound}: raise that, or "
                "prepare other data"
            )
        if self.left_out:
            say(f"{self.left_out:,} {self.part.name} pairs are longer than {bound}: left out")


@torch.no_grad()
def held_out_scores(
    model: nn.Module,
    pairs: Pairs,
    predict: Callable[[nn.Module, np.ndarray], tuple[Tensor, Tensor]],
    cluster: Cluster,
    share: Share | None = None,
) -> Validation:
    """Loss and accuracy over all target tokens, without smoothing or dropout; every rank scores its share.

    predict(model, samples): logits [N, vocabulary] and labels [N] of the samples' target tokens.
    """
    model.eval()
    batches = batches_by_length(pairs.lengths, VALIDATION_TOKENS)
    totals = torch.zeros(2, dtype=torch.float64)
    for samples in (share or cluster.share)(batches):
        logits, labels = predict(model, samples)
        logits = logits.float()
        totals[0] += F.cross_entropy(logits, labels, reduction="sum").item()
        totals[1] += (logits.argmax(-1) == labels).sum().item()
    model.train()
    loss, right = (cluster.sum(totals.to(cluster.device)) / int(pairs.target_tokens.sum())).tolist()
    return Validation(loss, right)
