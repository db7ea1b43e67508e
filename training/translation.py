"""What the two trainings on sentence pairs have in common: which pairs fit, and how held-out ones are scored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from training.base.console import UserError, say
from training.base.options import Options
from training.data.prepared import Part
from training.engine.batch_plan import batches_by_length
from training.engine.cluster import Cluster
from training.engine.task import Share, Validation
from training.models.cross_entropy import token_losses, twin_losses

# Positions of a validation batch. Its logits are the widest tensor of all, and must not outgrow those of training.
VALIDATION_TOKENS = 2048


class TranslationLoss(Options):
    """How target tokens are learned."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="probability spread evenly over the vocabulary")
    r_drop: float = Field(
        0.0,
        ge=0,
        description="R-Drop: each pair is read twice a step, which doubles a micro-batch's positions, and differing "
        "predictions cost so much; 0: once",
    )

    @property
    def readings(self) -> int:
        """How often the model reads each pair in a step."""
        return 2 if self.r_drop else 1

    def read(self, samples: np.ndarray) -> np.ndarray:
        """The samples as the model has to read them: with R-Drop twice, one pass behind the other."""
        return np.tile(samples, self.readings)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each token; logits [N, V] and labels [N] of what `read` gave, with R-Drop [N / 2] losses."""
        if self.r_drop:
            return twin_losses(logits.float(), labels.chunk(2)[0], self.label_smoothing, self.r_drop)
        return token_losses(logits.float(), labels, self.label_smoothing)


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
