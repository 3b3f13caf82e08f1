"""The input of (user, item) pairs, so that what only a user or an item needs is done once for each.

A candidate set pairs few users with few items many times. The first layer and the gates are linear
in x, and every column of x belongs to the user, to the item, or to the pair:
W x = W_u x_u + W_i x_i + W_p x_p. The first two products, by far the larger ones, are made once a
user and once an item; a pair adds two rows and its own small part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mtl_ranker.models.embedding import FeatureEmbedding, RowInput

USER, ITEM, PAIR = range(3)
Inputs = tuple[Tensor, Tensor, Tensor]  # categorical, bags, numeric


class ItemSide:
    """V items, embedded once for all users that meet them.

    Args:
        embedding: of encoded rows; it is not trained here.
        items: encoded rows in which only their own fields count.
        part: of each field (categoricals, lists, numerics): USER, ITEM or PAIR; only numerics can
            be a pair's. Histories are a user's; an item attends to them in each pair.
    """

    def __init__(self, embedding: FeatureEmbedding, items: Inputs, part: Sequence[int]) -> None:
        first = len(part) - embedding.numerics.features
        if PAIR in part[:first]:
            raise ValueError("only numbers can belong to a pair; embed its other fields as rows")
        own = torch.tensor([part[field] for field in embedding.sources])
        own[embedding.attended] = PAIR  # a user's history, as the item attends to it
        self.embedding, self.part = embedding, part
        self.columns = [(own == p).nonzero().squeeze(1) for p in (USER, ITEM, PAIR)]
        self.rows = embedding(*items).row()[:, self.columns[ITEM]]  # [V, I_i]
        self.vectors = embedding.vectors(*items[:2])[0] if embedding.histories else None
        self.pair_numbers = [n for n, p in enumerate(part[first:]) if p == PAIR]
        self.encode_pair = embedding.numerics.of(self.pair_numbers)
        self._products: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def products(self, weight: Tensor, reader: object) -> tuple[Tensor, Tensor, Tensor]:
        """W_i x_i of all items [V, N], and the other weights W_u [N, I_u] and W_p [N, I_p].

        Computed once for each reader, whose weight [N, I] must not change meanwhile.
        """
        if id(reader) not in self._products:
            user, item, pair = (weight.index_select(1, c) for c in self.columns)
            self._products[id(reader)] = self.rows @ item.t(), user, pair
        return self._products[id(reader)]


class Sides:
    """U users and the items that they meet.

    Args:
        users: encoded rows in which only their own fields count.
    """

    def __init__(self, items: ItemSide, users: Inputs) -> None:
        embedding, part = items.embedding, items.part
        self.items = items
        self.users = embedding(*users).row()[:, items.columns[USER]]  # [U, I_u]
        self.memories: list[tuple[Tensor, Tensor]] = []
        self.targets: list[list[tuple[int, Tensor]]] = []
        if items.vectors is not None:
            of_user, self.memories = embedding.vectors(*users[:2])
            of_item = items.vectors
            self.targets = [
                [(part[f], (of_user if part[f] == USER else of_item)[:, f]) for f, _ in history]
                for history in embedding.histories
            ]
        self._products: dict[int, tuple[Tensor, Tensor]] = {}

    def products(self, weight: Tensor, reader: object) -> tuple[Tensor, Tensor]:
        """Rows W_u x_u of all users, then W_i x_i of all items [U + V, N], and W_p [N, I_p]."""
        if id(reader) not in self._products:
            of_items, user, pair = self.items.products(weight, reader)
            self._products[id(reader)] = torch.cat([self.users @ user.t(), of_items]), pair
        return self._products[id(reader)]


class PairInput(RowInput):
    """x of B pairs.

    Args:
        sides: the users and items.
        user, item: [B], which of them each pair joins.
        numeric: [B, F_p], the pairs' own numbers, in the order of `ItemSide.pair_numbers`.
    """

    def __init__(self, sides: Sides, user: Tensor, item: Tensor, numeric: Tensor) -> None:
        self.sides, self.user, self.item = sides, user, item
        self.index = torch.stack([user, item + len(sides.users)], 1)  # [B, 2]
        attended = [
            attention(
                torch.stack([v.index_select(0, user if p == USER else item) for p, v in target], 1),
                *(memory.index_select(0, user) for memory in memories),
            )
            for attention, target, memories in zip(
                sides.items.embedding.attention, sides.targets, sides.memories, strict=True
            )
        ]
        own = sides.items.encode_pair(numeric)
        self.pair = torch.cat([*attended, own], 1) if attended else own  # [B, I_p]

    def project(self, weight: Tensor, bias: Tensor | None = None, reader: object = None) -> Tensor:
        rows, own = self.sides.products(weight, reader)
        # [B, N] → [N, B]: from here to the towers the batch is last.
        product = functional.embedding_bag(self.index, rows, mode="sum").t().contiguous()
        if self.pair.shape[1]:
            product = product.addmm_(own, self.pair.t())
        return product if bias is None else product.add_(bias.unsqueeze(1))

    def row(self) -> Tensor:
        sides, items = self.sides, self.sides.items
        x = self.pair.new_empty(len(self.user), sum(len(c) for c in items.columns))
        x[:, items.columns[USER]] = sides.users.index_select(0, self.user)
        x[:, items.columns[ITEM]] = items.rows.index_select(0, self.item)
        x[:, items.columns[PAIR]] = self.pair
        return x
