"""The input of (user, item) pairs, computed once per user and once per item where possible.

A candidate set has many pairs of few users and few items. The first layer and the gates are linear
in x, and every column of x belongs to the user, the item, or the pair:
W x = W_u x_u + W_i x_i + W_p x_p. The first two products, by far the larger ones, are computed once
per user and per item; for each pair they are added to the small third one.

Shapes: B pairs of U users and V items; x has I = I_u + I_i + I_p columns; W has N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mtl_ranker.models.embedding import EmbeddedHistory, FeatureEmbedding, RowInput

USER, ITEM, PAIR = range(3)
Inputs = tuple[Tensor, Tensor, Tensor]  # categorical, bags, numeric


class ItemSide:
    """V items, embedded once for all users they are paired with.

    Raises ValueError where a field other than a numeric belongs to the pair.

    Args:
        embedding: of encoded rows; its parameters must not change meanwhile.
        items: encoded rows [V, ·]; only the fields of the item are used.
        part: for each field (categoricals, lists, numerics, vectors), USER, ITEM or PAIR. Histories
            belong to the user; target attention is computed for each pair.
    """

    def __init__(self, embedding: FeatureEmbedding, items: Inputs, part: Sequence[int]) -> None:
        last = len(part) - len(embedding.contents)
        first = last - embedding.numerics.features
        if PAIR in part[:first] or PAIR in part[last:]:
            raise ValueError("only numbers can belong to a pair; embed its other fields as rows")
        column_part = torch.tensor([part[field] for field in embedding.sources])
        # Target attention depends on user and item.
        column_part[embedding.attended.cpu()] = PAIR
        column_part = column_part.to(embedding.table.weight.device)
        self.embedding, self.part = embedding, part
        self.columns = [(column_part == p).nonzero().squeeze(1) for p in (USER, ITEM, PAIR)]
        self.rows = embedding(*items).row()[:, self.columns[ITEM]]  # [V, I_i]
        self.vectors = embedding.vectors(*items[:2])[0] if embedding.histories else None
        self.pair_numbers = [n for n, p in enumerate(part[first:last]) if p == PAIR]
        self.encode_pair = embedding.numerics.of(self.pair_numbers)
        self._products: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def products(self, weight: Tensor, reader: object) -> tuple[Tensor, Tensor, Tensor]:
        """W_i x_i of all items [V, N], and the other weights W_u [N, I_u] and W_p [N, I_p].

        Computed once for each reader (the layer), whose weight [N, I] must not change meanwhile.
        """
        if id(reader) not in self._products:
            user, item, pair = (weight.index_select(1, c) for c in self.columns)
            self._products[id(reader)] = self.rows @ item.t(), user, pair
        return self._products[id(reader)]


class Sides:
    """U users and the V items they are paired with.

    Args:
        users: encoded rows [U, ·]; only the fields of the user are used.
    """

    def __init__(self, items: ItemSide, users: Inputs) -> None:
        embedding, part = items.embedding, items.part
        self.items = items
        self.users = embedding(*users).row()[:, items.columns[USER]]  # [U, I_u]
        self.histories: list[EmbeddedHistory] = []
        # For each history and field of the item in it: its part, and its vectors [U or V, D].
        self.targets: list[list[tuple[int, Tensor]]] = []
        if items.vectors is not None:
            user_vectors, self.histories = embedding.vectors(*users[:2])
            vectors = {USER: user_vectors, ITEM: items.vectors}
            self.targets = [
                [(part[f], vectors[part[f]][:, f]) for f, _ in history]
                for history in embedding.histories
            ]
        self._products: dict[int, tuple[Tensor, Tensor]] = {}

    def products(self, weight: Tensor, reader: object) -> tuple[Tensor, Tensor]:
        """W_u x_u of all users followed by W_i x_i of all items [U + V, N]; and W_p [N, I_p]."""
        if id(reader) not in self._products:
            item_products, user, pair = self.items.products(weight, reader)
            self._products[id(reader)] = torch.cat([self.users @ user.t(), item_products]), pair
        return self._products[id(reader)]


class PairInput(RowInput):
    """The input x of B pairs.

    Args:
        sides: the users and items.
        user, item: [B], index of the user and of the item of each pair.
        numeric: [B, F_p], numerics of the pairs, in the order of `ItemSide.pair_numbers`.
    """

    def __init__(self, sides: Sides, user: Tensor, item: Tensor, numeric: Tensor) -> None:
        self.sides, self.user, self.item = sides, user, item
        self.index = torch.stack([user, item + len(sides.users)], 1)  # [B, 2]
        attended = [
            attention(
                torch.stack([v.index_select(0, user if p == USER else item) for p, v in target], 1),
                *(tensor.index_select(0, user) for tensor in history),
            )
            for attention, target, history in zip(
                sides.items.embedding.attention, sides.targets, sides.histories, strict=True
            )
        ]
        encoded = sides.items.encode_pair(numeric)
        self.pair = torch.cat([*attended, encoded], 1) if attended else encoded  # [B, I_p]

    def project(self, weight: Tensor, bias: Tensor | None = None, reader: object = None) -> Tensor:
        rows, pair_weight = self.sides.products(weight, reader)
        # [B, N] → [N, B]: from here to the towers the batch is last.
        product = functional.embedding_bag(self.index, rows, mode="sum").t().contiguous()
        if self.pair.shape[1]:
            product = product.addmm_(pair_weight, self.pair.t())
        return product if bias is None else product.add_(bias.unsqueeze(1))

    def row(self) -> Tensor:
        sides, items = self.sides, self.sides.items
        x = self.pair.new_empty(len(self.user), sum(len(c) for c in items.columns))
        x[:, items.columns[USER]] = sides.users.index_select(0, self.user)
        x[:, items.columns[ITEM]] = items.rows.index_select(0, self.item)
        x[:, items.columns[PAIR]] = self.pair
        return x
