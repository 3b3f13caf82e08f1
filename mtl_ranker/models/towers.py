"""Towers, from an objective's mixture of experts to its logit, and the bias of the position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtl_ranker.models.embedding import RowInput
from mtl_ranker.models.experts import batched_linear


class Towers(nn.Module):
    """One network per objective and member, y_k = h^k(f^k(x)) (Ma et al., KDD 2018, eq. 6).

    Args:
        inputs: H, width of a mixture.
        hidden: units of each hidden layer; may be empty.
        objectives: T.
        members: K.

    Shape: mixtures [T, K, H, B], or [1, K, H, B] if all objectives have the same → logits
    [K, B, T].

    >>> Towers(inputs=16, hidden=[8], objectives=3)(torch.randn(3, 1, 16, 5)).shape
    torch.Size([1, 5, 3])
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        objectives: int,
        dropout: float = 0.0,
        members: int = 1,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, 1]
        layers = [
            batched_linear(objectives * members, fan_in, units)
            for fan_in, units in zip(widths[:-1], widths[1:], strict=True)
        ]
        self.members = members
        self.weights = nn.ParameterList(weight for weight, _ in layers)
        self.biases = nn.ParameterList(bias for _, bias in layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        last, same = len(self.weights) - 1, h.shape[0] == 1
        if not same:
            h = h.expand(-1, self.members, -1, -1).flatten(0, 1)  # [T·K, H, B]
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if depth == 0 and same:
                h = self._multiply_same(h[0], weight) + bias.unsqueeze(2)
            else:
                h = torch.baddbmm(bias.unsqueeze(2), weight, h)  # [T·K, units, B]
            if depth < last:
                h = self.dropout(torch.relu(h))
        return h.squeeze(1).unflatten(0, (-1, self.members)).permute(1, 2, 0)  # [K, B, T]

    def of_rows(self, row: RowInput) -> Tensor:
        """Logits [1, B, T] that are linear in the rows, for towers without hidden layers."""
        weight, bias = self.weights[0].squeeze(1), self.biases[0].squeeze(1)  # [T, I], [T]
        return row.project(weight, bias, self).t().unsqueeze(0)

    def _multiply_same(self, h: Tensor, weight: Tensor) -> Tensor:
        """Products of all objectives' weights with one mixture: [K, H, B] → [T·K, units, B]."""
        product = weight.unflatten(0, (-1, self.members)).transpose(0, 1).flatten(1, 2) @ h
        units = weight.shape[1]
        return product.unflatten(1, (-1, units)).transpose(0, 1).flatten(0, 1)

    def start_at(self, values: Tensor) -> None:
        """Set the last bias of every tower to its objective's value: [T]."""
        with torch.no_grad():
            self.biases[-1].copy_(values.repeat_interleave(self.members).unsqueeze(1))


class PositionBias(nn.Module):
    """A bias per position and objective (Zhao et al., RecSys 2019, 4.3).

    It is added to the logits in training and left out at scoring. In training, a row's position is
    dropped (treated as unknown) with some probability, so that the towers do not rely on it.

    Args:
        positions: P; positions from P on share one bias.
        objectives: T.
        dropout: probability of dropping a row's position in training.

    Shape: position [B], integers from 0, -1 = unknown → [B, T]; zero where unknown.

    >>> PositionBias(positions=20, objectives=2)(torch.tensor([-1])).tolist()
    [[0.0, 0.0]]
    """

    def __init__(self, positions: int, objectives: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.logits = nn.Embedding(positions + 1, objectives, padding_idx=0)
        nn.init.zeros_(self.logits.weight)
        self.positions = positions
        self.dropout = dropout

    def forward(self, position: Tensor) -> Tensor:
        index = (position + 1).clamp(0, self.positions)
        if self.training and self.dropout > 0:
            index = index * (torch.rand(index.shape, device=index.device) >= self.dropout)
        return self.logits(index)
