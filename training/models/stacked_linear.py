"""Linear layers of one input, computed as one."""

from __future__ import annotations

from torch import nn


class StackedLinear(nn.Linear):
    """`stacked` linear layers, their weights above each other, which an optimizer of matrices tells apart."""

    def __init__(self, inputs: int, outputs: int, stacked: int, *, bias: bool = True):
        """outputs: of each layer."""
        super().__init__(inputs, stacked * outputs, bias)
        self.stacked = stacked
