"""Cross-entropy with label smoothing that passes over the logits less often than torch's.

Next to the output layer's products, the logits are the largest thing that a small model with a vocabulary of thousands
reads and writes. Here the logarithms of the probabilities are made once, and become the gradient where they lie.
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
