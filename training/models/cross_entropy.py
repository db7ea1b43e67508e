"""Cross-entropy with label smoothing that passes over the logits less often than torch's.

Beside the output layer's products, a small model with a vocabulary of thousands spends most on reading and writing
logits. Here the log-probabilities are computed once, and turned into the gradient in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of each token, [N], with gradient; logits [N, V] in fp32, labels [N].

    label_smoothing e as in Szegedy et al. 2016, section 7: the target is 1 - e at the label and e / V everywhere.
    """
    return _TokenLosses.apply(logits, labels, label_smoothing)


def twin_losses(logits: Tensor, labels: Tensor, label_smoothing: float, agreement: float) -> Tensor:
    """R-Drop (Liang et al. 2021): each token is predicted twice, under two dropout masks, and both are to agree.

    logits [2N, V] in fp32, row N + i for the same token as row i; labels [N]. Returns, for each token, [N], with
    gradient, the mean of its two cross-entropies, and on top `agreement` / 4 times the sum of the two
    Kullback-Leibler divergences, from one prediction to the other and back (the paper's loss, halved).
    """
    losses = token_losses(logits, labels.repeat(2), label_smoothing).view(2, -1).mean(0)
    return losses + agreement / 4 * _Divergence.apply(*logits.chunk(2))


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        log_probabilities = torch.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_probabilities, labels)
        ctx.smoothing = smoothing
        losses = -(1 - smoothing) * log_probabilities.gather(1, labels[:, None])[:, 0]
        return losses - smoothing * log_probabilities.mean(1) if smoothing else losses

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor, None, None]:
        log_probabilities, labels = ctx.saved_tensors
        # In place: a second backward pass would find that out, and raise.
        gradient = log_probabilities.exp_()
        if ctx.smoothing:
            gradient -= ctx.smoothing / gradient.shape[1]
        gradient[torch.arange(len(labels), device=labels.device), labels] -= 1 - ctx.smoothing
        return gradient.mul_(by_loss[:, None]), None, None


class _Divergence(torch.autograd.Function):
    """KL(p || q) + KL(q || p) of the distributions with logits a and b, [N, V] each: [N]."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ratio, p, q = a.log_softmax(-1), a.softmax(-1), b.softmax(-1)
        ratio -= b.log_softmax(-1)
        there, back = (p * ratio).sum(-1), -(q * ratio).sum(-1)
        ctx.save_for_backward(ratio, p, q, there, back)
        return there + back

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor, Tensor]:
        ratio, p, q, there, back = ctx.saved_tensors
        difference = p - q
        by_a = torch.addcmul(difference, p, ratio - there[:, None])
        by_b = torch.addcmul(difference, q, ratio + back[:, None]).neg_()
        return by_a.mul_(by_loss[:, None]), by_b.mul_(by_loss[:, None])
