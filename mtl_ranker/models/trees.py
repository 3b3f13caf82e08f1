"""Boosted trees stored as tensors, whose predictions are averaged with a network's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

TREES_AT_A_TIME = 64  # their comparisons with 1,024 rows fit a core's cache


class TreeArrays(NamedTuple):
    """The M trees of one objective, all of depth D.

    Node n has the children 2n + 1 and 2n + 2. A row goes right where its number is greater than the
    node's threshold. A node without split has an infinite threshold.

    Attributes:
        feature: [M, 2^D - 1], number that each node compares.
        threshold: [M, 2^D - 1].
        missing_right: [M, 2^D - 1] booleans, whether missing numbers go right.
        leaf: [M, 2^D], values of the leaves.
        start: initial logit, to which the trees are added.
    """

    feature: Tensor
    threshold: Tensor
    missing_right: Tensor
    leaf: Tensor
    start: float


class Forest(nn.Module):
    """Sums of regression trees, z_t = b_t + Σ_m leaf_m(x) (Friedman, 2001, algorithm 1).

    All trees are complete, of the same depth D: a node without split sends every row to the left,
    and the leaves below a leaf of lower depth have its value.

    Args:
        features: F, numbers per row.
        trees: [T], number of trees of each objective; may be 0.
        depth: D.

    Shape: numbers [B, F], NaN where missing → logits [B, T], NaN for objectives without trees.

    >>> forest = Forest(features=1, trees=[1, 0], depth=1)
    >>> nodes = torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([[False]])
    >>> forest.fill(0, TreeArrays(*nodes, leaf=torch.tensor([[-1.0, 1.0]]), start=0.25))
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
        # Columns F to 2F - 1 are the same numbers with missing ones above all others.
        self.register_buffer("column", torch.zeros(total, inner, dtype=torch.long))
        self.register_buffer("threshold", torch.full((total, inner), float("inf")))
        self.register_buffer("leaf", torch.zeros(total, inner + 1))
        self.register_buffer("start", torch.zeros(len(trees)))

    def fill(self, objective: int, arrays: TreeArrays) -> None:
        """Set the trees of one objective."""
        first = sum(self.trees[:objective])
        trees = slice(first, first + self.trees[objective])
        self.column[trees] = arrays.feature + self.features * arrays.missing_right.long()
        self.threshold[trees] = arrays.threshold
        self.leaf[trees] = arrays.leaf.float()
        self.start[objective] = arrays.start

    def forward(self, numbers: Tensor) -> Tensor:
        # Batch last: each comparison then accesses memory contiguously.
        x = numbers.t()
        x = torch.cat([x.nan_to_num(nan=float("-inf")), x.nan_to_num(nan=float("inf"))])
        logits, first = [], 0
        for objective, count in enumerate(self.trees):
            value = self.start[objective].expand(numbers.shape[0])
            for begin in range(first, first + count, TREES_AT_A_TIME):
                trees = slice(begin, min(begin + TREES_AT_A_TIME, first + count))
                value = value + self._sum(trees, x)
            logits.append(value if count else torch.full_like(value, float("nan")))
            first += count
        return torch.stack(logits, 1)

    def _sum(self, trees: slice, x: Tensor) -> Tensor:
        """The sum of these trees for each row: [2F, B] → [B]."""
        column, threshold = self.column[trees], self.threshold[trees]
        right = x.index_select(0, column.flatten()) > threshold.view(-1, 1)
        right = right.view(*column.shape, -1)  # [M, nodes, B]
        node, first = right[:, :1].long(), 1  # number within its level, [M, 1, B]
        for level in range(1, self.depth):
            nodes = right[:, first : first + 2**level]
            node, first = 2 * node + nodes.gather(1, node), first + 2**level
        return self.leaf[trees].gather(1, node.squeeze(1)).sum(0)


def averaged(prediction: Tensor, forest: Tensor, share: float = 0.5) -> Tensor:
    """Average a network's probabilities with a forest, as log-odds.

    Args:
        prediction: [B, T], kept where the objective has no trees.
        forest: logits [B, T], NaN for objectives without trees.
        share: weight of the forest, from 0 to 1.
    """
    network = torch.logit(prediction, eps=1e-7)
    both = torch.sigmoid((1 - share) * network + share * forest)
    return torch.where(torch.isnan(forest), prediction, both)


def tree_numbers(categorical: Tensor, numeric: Tensor) -> Tensor:
    """Inputs of trees: numerics, NaN where missing, and indices of categoricals: [B, F + C]."""
    return torch.cat([numeric, categorical.to(numeric.dtype)], 1)
