"""Gates: how much each objective listens to each expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SoftmaxGates(nn.Module):
    """One softmax gate per objective, g^k(x) = softmax(W_gk x) (Ma et al., KDD 2018, eq. 7).

    Args:
        inputs: width of x.
        visible: [T, E] booleans, which experts objective t may listen to. One visible expert needs
            no gate: its weight is 1 (single-task, shared-bottom).
        tied: all objectives share one gate (OMoE, eq. 5).

    Shape: [B, inputs] → [B, T, E]; each row over E sums to 1.

    >>> gates = SoftmaxGates(10, torch.ones(2, 4, dtype=torch.bool))
    >>> gates(torch.randn(3, 10)).sum(-1).allclose(torch.ones(3, 2))
    True
    """

    visible: Tensor

    def __init__(self, inputs: int, visible: Tensor, tied: bool = False) -> None:
        super().__init__()
        self.objectives, self.experts = visible.shape
        self.register_buffer("visible", visible)
        self.gates = 1 if tied else self.objectives
        choice = bool((visible.sum(1) > 1).any())
        outputs = self.gates * self.experts
        self.linear = nn.Linear(inputs, outputs, bias=False) if choice else None

    def forward(self, x: Tensor) -> Tensor:
        if self.linear is None:
            return self.visible.to(x.dtype).expand(x.shape[0], -1, -1)
        logits = self.linear(x).unflatten(1, (self.gates, self.experts))  # [B, 1 or T, E]
        logits = logits.expand(-1, self.objectives, -1)
        logits = logits.masked_fill(~self.visible, float("-inf"))
        return torch.softmax(logits, -1)


def combine(weights: Tensor, experts: Tensor) -> Tensor:
    """What each objective hears, f^k(x) = Σ_i g^k(x)_i f_i(x) (Ma et al., eq. 6).

    Shape: weights [B, T, E], experts [E, B, H] → [T, B, H].
    """
    return (weights.permute(1, 2, 0).unsqueeze(-1) * experts.unsqueeze(0)).sum(1)
