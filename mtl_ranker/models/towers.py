"""Towers: from what an objective hears to its logit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtl_ranker.models.experts import batched_linear


class Towers(nn.Module):
    """T equal networks, one per objective, y_k = h^k(f^k(x)) (Ma et al., KDD 2018, eq. 6).

    Args:
        inputs: H, width of what each objective hears.
        hidden: units of each hidden layer; may be empty.
        objectives: T.

    Shape: [T, B, H] → logits [B, T].

    >>> Towers(inputs=16, hidden=[8], objectives=3)(torch.randn(3, 5, 16)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], objectives: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, 1]
        layers = [
            batched_linear(objectives, fan_in, units)
            for fan_in, units in zip(widths[:-1], widths[1:], strict=True)
        ]
        self.weights = nn.ParameterList(weight for weight, _ in layers)
        self.biases = nn.ParameterList(bias for _, bias in layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        last = len(self.weights) - 1
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))  # [T, B, units]
            if depth < last:
                h = self.dropout(torch.relu(h))
        return h.squeeze(-1).transpose(0, 1)  # [B, T]
