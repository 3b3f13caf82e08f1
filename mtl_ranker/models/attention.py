"""What an item has to do with what its user did last."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TargetAttention(nn.Module):
    """A user's latest impressions, weighed by what they have to do with the item in question.

    Deep interest network (Zhou et al., KDD 2018, section 4.3) with scaled dot products instead of
    its small network, normalised: with t the item's own embeddings, h_1 … h_K those of the latest
    impressions and w = softmax_k(tᵀ M h_k / √W + r_k), the outputs are v = Σ w_k h_k and t ∘ v.
    M (which starts as the identity) and r, a weight for how long ago, are learned. A user without
    history has zeros.

    Args:
        columns: of an impression, C embeddings each of width D.
        width: D.
        length: K at most.
        heads: parts of every embedding that attend by themselves and share nothing.

    Shape: target [B, C, D], history [B, K, C, D], filled [B, K] → [B, 2·C·D].
    """

    def __init__(self, columns: int, width: int, length: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        inner = columns * width // heads
        self.mix = nn.Parameter(torch.eye(inner).repeat(heads, 1, 1))
        self.recency = nn.Parameter(torch.zeros(heads, length))

    def forward(self, target: Tensor, history: Tensor, filled: Tensor) -> Tensor:
        rows, length, columns, width = history.shape
        parts = (columns, self.heads, width // self.heads)
        t = target.view(rows, *parts).transpose(1, 2).flatten(2)  # [B, heads, W]
        h = history.view(rows, length, *parts).permute(0, 3, 1, 2, 4).flatten(3)  # [B, heads, K, W]
        asked = torch.einsum("bhw,hwx->bhx", t, self.mix) * t.shape[2] ** -0.5
        score = (h @ asked.unsqueeze(3)).squeeze(3) + self.recency  # [B, heads, K]
        known = filled.unsqueeze(1)
        weight = score.masked_fill(~known, -1e9).softmax(2) * known
        v = (weight.unsqueeze(2) @ h).squeeze(2)  # [B, heads, W]
        v = v.view(rows, self.heads, columns, -1).transpose(1, 2).flatten(1)  # [B, C·D]
        return torch.cat([v, target.flatten(1) * v], 1)
