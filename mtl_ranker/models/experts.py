"""The expert layer: E equal networks as one batched matrix product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ExpertBank(nn.Module):
    """E multi-layer perceptrons of the same shape (the f_i of Ma et al., KDD 2018, eq. 5).

    Expert e computes `relu(W_e x + b_e)` per hidden layer. All experts are one tensor, so the
    first layer is a single matrix product of the batch with all experts' weights, and each further
    layer one batched product. Every expert starts from different random weights.

    Args:
        inputs: width of x.
        hidden: units of each hidden layer; the last is H.
        experts: E.
        dropout: on the units of every layer.

    Shape: [B, inputs] → [E, B, H].

    >>> ExpertBank(inputs=10, hidden=[32, 16], experts=8)(torch.randn(4, 10)).shape
    torch.Size([8, 4, 16])
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], experts: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        self.experts = experts
        self.units = widths[-1]
        self.dropout = nn.Dropout(dropout)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, units in zip(widths[:-1], widths[1:], strict=True):
            weight, bias = batched_linear(experts, fan_in, units)
            self.weights.append(weight)
            self.biases.append(bias)

    def forward(self, x: Tensor) -> Tensor:
        first = self.weights[0].flatten(0, 1)  # [E·H, inputs]
        shared = nn.functional.linear(x, first, self.biases[0].flatten())  # [B, E·H]
        h = shared.unflatten(1, (self.experts, -1)).transpose(0, 1)  # [E, B, H]
        h = self.dropout(torch.relu(h))
        for weight, bias in zip(list(self.weights)[1:], list(self.biases)[1:], strict=True):
            h = torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))  # [E, B, H']
            h = self.dropout(torch.relu(h))
        return h


def batched_linear(networks: int, fan_in: int, units: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights [networks, units, fan_in] and biases [networks, units], drawn as in nn.Linear."""
    bound = 1.0 / math.sqrt(fan_in)
    weight = torch.empty(networks, units, fan_in).uniform_(-bound, bound)
    bias = torch.empty(networks, units).uniform_(-bound, bound)
    return nn.Parameter(weight), nn.Parameter(bias)
