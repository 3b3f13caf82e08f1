"""Boosted trees as a handful of tensors, to be averaged with a network's predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

TREES_AT_A_TIME = 64  # whose comparisons of 1,024 rows fit a core's cache


class Forest(nn.Module):
    """Sums of regression trees, z_t = b_t + Σ_m leaf_m(x) (Friedman, 2001, algorithm 1).

    All trees have the same depth D: a node that does not divide sends every row to the left, and
    the leaves below one that ended early share its value. Node n has the children 2n + 1 and
    2n + 2, and a row goes right where its number is greater than the node's threshold. A missing
    number (NaN) goes the node's own way.

    Args:
        features: F, numbers a row.
        trees: of each objective; 0 for one that has none.
        depth: D.

    Shape: numbers [B, F] → logits [B, T], NaN for objectives without trees.

    >>> forest = Forest(features=1, trees=[1, 0], depth=1)
    >>> forest.fill(0, [[0]], [[0.5]], [[False]], [[-1.0, 1.0]], start=0.25)
    >>> forest(torch.tensor([[0.0], [0.9], [float("nan")]])).tolist()
    [[-0.75, nan], [1.25, nan], [-0.75, nan]]
    """

    column: Tensor
    threshold: Tensor
    leaf: Tensor
    start: Tensor

    def __init__(self, features: int, trees: Sequence[int], depth: int) -> None:
        super().__init__()
        self.features, self.trees, self.depth = features, list(trees), depth
        inner, total = 2**depth - 1, sum(trees)
        # Columns F and above hold the same numbers, with missing ones above all others.
        self.register_buffer("column", torch.zeros(total, inner, dtype=torch.long))
        self.register_buffer("threshold", torch.full((total, inner), float("inf")))
        self.register_buffer("leaf", torch.zeros(total, inner + 1))
        self.register_buffer("start", torch.zeros(len(trees)))

    def fill(
        self,
        objective: int,
        feature: Sequence[Sequence[int]],
        threshold: Sequence[Sequence[float]],
        missing_right: Sequence[Sequence[bool]],
        leaf: Sequence[Sequence[float]],
        start: float,
    ) -> None:
        """Set the trees of one objective: [M, 2^D − 1] of nodes and [M, 2^D] of leaves."""
        first = sum(self.trees[:objective])
        own = slice(first, first + self.trees[objective])
        right = torch.as_tensor(missing_right).long()
        self.column[own] = torch.as_tensor(feature) + self.features * right
        self.threshold[own] = torch.as_tensor(threshold)
        self.leaf[own] = torch.as_tensor(leaf).float()
        self.start[objective] = start

    def forward(self, numbers: Tensor) -> Tensor:
        # Batch last: each comparison then runs along memory.
        x = numbers.t()
        x = torch.cat([x.nan_to_num(nan=float("-inf")), x.nan_to_num(nan=float("inf"))])
        found, first = [], 0
        for objective, count in enumerate(self.trees):
            value = self.start[objective].expand(len(numbers))
            for begin in range(first, first + count, TREES_AT_A_TIME):
                some = slice(begin, min(begin + TREES_AT_A_TIME, first + count))
                value = value + self._sum(some, x)
            found.append(value if count else torch.full_like(value, float("nan")))
            first += count
        return torch.stack(found, 1)

    def _sum(self, some: slice, x: Tensor) -> Tensor:
        """What some trees add to each row: [2F, B] → [B]."""
        column, threshold = self.column[some], self.threshold[some]
        right = x.index_select(0, column.flatten()) > threshold.view(-1, 1)
        right = right.view(*column.shape, -1)  # [M, nodes, B]
        place, first = right[:, :1].long(), 1  # within its level, [M, 1, B]
        for level in range(1, self.depth):
            nodes = right[:, first : first + 2**level]
            place, first = 2 * place + nodes.gather(1, place), first + 2**level
        return self.leaf[some].gather(1, place.squeeze(1)).sum(0)


def averaged(prediction: Tensor, forest: Tensor) -> Tensor:
    """Probabilities [B, T] and the forest's logits [B, T], averaged as log-odds.

    Objectives without trees (NaN) keep their prediction.
    """
    own = torch.logit(prediction, eps=1e-7)
    return torch.where(torch.isnan(forest), prediction, torch.sigmoid((own + forest) / 2))


def tree_numbers(categorical: Tensor, numeric: Tensor) -> Tensor:
    """What trees read: the numbers, NaN where missing, and the categories' codes: [B, F + C]."""
    return torch.cat([numeric, categorical.to(numeric.dtype)], 1)
