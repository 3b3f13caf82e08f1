"""Target attention of an item to its user's latest impressions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TargetAttention(nn.Module):
    """The mean of a user's latest impressions, weighted by their similarity to the item.

    Deep interest network (Zhou et al., KDD 2018, section 4.3) with a scaled dot product and softmax
    as attention. With t the item's embeddings, h_1 … h_L those of the latest impressions, W their
    width and w = softmax_l(tᵀ M h_l / √W + r_l), the outputs are v = Σ_l w_l h_l and t ∘ v. M and r
    are learned: M starts as the identity, and r is a bias per recency. The outputs are zero for a
    user without history.

    Args:
        columns: C, embeddings per impression.
        width: D, width of each embedding.
        length: L, number of impressions at most.
        heads: each embedding is divided into so many parts with separate attention.

    Shape: target [B, C, D], history [B, L, C, D], filled [B, L] booleans → [B, 2·C·D].
    """

    def __init__(self, columns: int, width: int, length: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        inner = columns * width // heads
        self.mix = nn.Parameter(torch.eye(inner).repeat(heads, 1, 1))
        self.recency = nn.Parameter(torch.zeros(heads, length))

    def forward(self, target: Tensor, history: Tensor, filled: Tensor) -> Tensor:
        rows, length, columns, width = history.shape
        by_head = (columns, self.heads, width // self.heads)
        t = target.view(rows, *by_head).transpose(1, 2).flatten(2)  # [B, heads, W]
        h = history.view(rows, length, *by_head)
        h = h.permute(0, 3, 1, 2, 4).flatten(3)  # [B, heads, L, W]
        query = torch.einsum("bhw,hwx->bhx", t, self.mix) * t.shape[2] ** -0.5
        score = (h @ query.unsqueeze(3)).squeeze(3) + self.recency  # [B, heads, L]
        mask = filled.unsqueeze(1)
        weight = score.masked_fill(~mask, -1e9).softmax(2) * mask
        v = (weight.unsqueeze(2) @ h).squeeze(2)  # [B, heads, W]
        v = v.view(rows, self.heads, columns, -1).transpose(1, 2).flatten(1)  # [B, C·D]
        return torch.cat([v, target.flatten(1) * v], 1)
