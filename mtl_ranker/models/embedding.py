"""Encoded rows to one input vector: embeddings, bags and piecewise-linear numbers."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional

from mtl_ranker.models.attention import TargetAttention


class RowInput:
    """The input vector x of each row in two parts: [B, learned] ‖ [B, fixed].

    The fixed part (numbers) needs no gradient; kept apart, it costs none.
    """

    def __init__(self, learned: Tensor, fixed: Tensor) -> None:
        self.learned, self.fixed = learned, fixed

    def project(self, weight: Tensor, bias: Tensor | None = None, reader: object = None) -> Tensor:
        """W xᵀ + b for `reader`, whose weight it is. Shape: weight [N, I], bias [N] → [N, B]."""
        split = self.learned.shape[1]
        if split == 0:
            product = weight @ self.fixed.t()
        else:
            product = weight[:, :split] @ self.learned.t()
            if self.fixed.shape[1] > 0:
                # In place, but under autocast, which casts only what is made anew.
                add = product.addmm_ if product.dtype == weight.dtype else product.addmm
                product = add(weight[:, split:], self.fixed.t())
        return product if bias is None else product.add_(bias.unsqueeze(1))

    def row(self) -> Tensor:
        """x as one tensor [B, I]."""
        return torch.cat([self.learned, self.fixed], 1)


class PiecewiseLinear(nn.Module):
    """Piecewise-linear encoding of numbers (Gorishniy et al., NeurIPS 2022, eq. 1).

    Feature f with edges b_0 < … < b_n becomes n values, the t-th being
    `clip((x - b_{t-1}) / (b_t - b_{t-1}), 0, 1)`; a missing value (NaN) is all zeros, and one more
    input per feature in `missing` says that it was missing.

    Args:
        edges: ascending edges of each of the F features; features may differ in their number.
        missing: for each feature, whether it gets an indicator of missing values.
        standardise: keep (x - b_0) / (b_1 - b_0) unclipped instead: standardisation.

    Shape: [B, F] → [B, `width`].

    >>> code = PiecewiseLinear([[0.0, 1.0, 3.0]], [True])
    >>> code(torch.tensor([[2.0], [float("nan")]])).tolist()
    [[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]]
    """

    column: Tensor
    scale: Tensor
    shift: Tensor
    indicator: Tensor

    def __init__(
        self, edges: Sequence[Sequence[float]], missing: Sequence[bool], standardise: bool = False
    ) -> None:
        super().__init__()
        self.edges, self.missing = list(edges), list(missing)
        self.features = len(self.edges)
        column = [f for f, edge in enumerate(edges) for _ in edge[1:]]
        low = torch.tensor([b for edge in edges for b in edge[:-1]], dtype=torch.float64)
        high = torch.tensor([b for edge in edges for b in edge[1:]], dtype=torch.float64)
        self.standardise = standardise
        self.register_buffer("column", torch.tensor(column, dtype=torch.long))
        # (x - low) / (high - low) as one fused multiply-add: x · scale + shift.
        self.register_buffer("scale", (1.0 / (high - low)).float().unsqueeze(1))
        self.register_buffer("shift", (-low / (high - low)).float().unsqueeze(1))
        indicators = [f for f, flag in enumerate(missing) if flag]
        self.register_buffer("indicator", torch.tensor(indicators, dtype=torch.long))
        self.width = len(column) + len(indicators)
        self.sources = column + indicators  # which feature each output comes from

    def of(self, features: Sequence[int]) -> PiecewiseLinear:
        """The encoding of some features alone."""
        edges = [self.edges[f] for f in features]
        return PiecewiseLinear(edges, [self.missing[f] for f in features], self.standardise)

    def forward(self, numbers: Tensor) -> Tensor:
        # Batch last, so that picking a feature's column for each of its bins copies whole rows.
        x = numbers.t().contiguous()  # [F, B]
        code = torch.addcmul(self.shift, x.index_select(0, self.column), self.scale)  # [bins, B]
        code = code if self.standardise else code.clamp_(0.0, 1.0)
        code = code.nan_to_num_(0.0)  # NaN, a missing value, has passed through until here
        if not len(self.indicator):
            return code.t()
        absent = torch.isnan(x.index_select(0, self.indicator)).to(code.dtype)
        return torch.cat([code, absent]).t()


class FeatureEmbedding(nn.Module):
    """All fields of a row as one vector, from one table of embeddings.

    Args:
        sizes: vocabulary sizes of the C categorical fields (index 0 = unknown).
        bags: (vocabulary size, slots) of each list field; its vector is the mean over filled slots.
        numerics: the encoding of the numeric fields.
        width: embedding width D.
        names: the fields' names (categoricals, lists, numerics), for groups of features.
        share: of each categorical and list field, a name or None; fields of one name, whose indices
            mean the same, have one set of embeddings.
        histories: of each history, pairs of fields (of categoricals and lists): an item's own, and
            the list of the same in its user's latest impressions. Such lists come last, and give no
            mean but what the item attends to.
        heads: parts of an embedding that attend by themselves.

    `sparse` (False) makes the table's gradient a sparse tensor of the rows that a batch has.

    Shape: categorical [B, C], bags [B, slots of all], numeric [B, F] → x of width `outputs`.
    """

    offset: Tensor
    bag_offset: Tensor
    attended: Tensor  # columns of x that histories give

    def __init__(
        self,
        sizes: Sequence[int],
        bags: Sequence[tuple[int, int]],
        numerics: PiecewiseLinear,
        width: int,
        names: Sequence[str] = (),
        share: Sequence[str | None] = (),
        histories: Sequence[Sequence[Sequence[int]]] = (),
        heads: int = 1,
    ) -> None:
        super().__init__()
        rows = [*sizes, *(size for size, _ in bags)]
        offsets, total = [], 0
        first: dict[str, int] = {}
        for field, size in enumerate(rows):
            name = share[field] if share else None
            offsets.append(total if name is None else first.setdefault(name, total))
            total += size if offsets[-1] == total else 0
        self.sparse = False
        self.slots = [slots for _, slots in bags]
        self.register_buffer("offset", torch.tensor(offsets[: len(sizes)], dtype=torch.long))
        starts = [
            o for o, n in zip(offsets[len(sizes) :], self.slots, strict=False) for _ in range(n)
        ]
        self.register_buffer("bag_offset", torch.tensor(starts, dtype=torch.long))
        self.table = nn.Embedding(max(total, 1), width)
        nn.init.normal_(self.table.weight, std=0.01)
        self.numerics = numerics
        self.names = list(names)
        self.histories = [[(own, of) for own, of in history] for history in histories]
        self.attention = nn.ModuleList()
        remembered = [of for history in self.histories for _, of in history]
        plain = [f for f in range(len(rows)) if f not in remembered]
        fields = [f for f in plain for _ in range(width)]
        begin = len(fields)
        for history in self.histories:
            length = bags[history[0][1] - len(sizes)][1]
            self.attention.append(TargetAttention(len(history), width, length, heads))
            fields += 2 * [of for _, of in history for _ in range(width)]
        attended = torch.arange(begin, len(fields))
        self.register_buffer("attended", attended, persistent=False)
        self.sources = fields + [len(rows) + f for f in numerics.sources]
        self.outputs = len(self.sources)

    def forward(self, categorical: Tensor, bags: Tensor, numeric: Tensor) -> RowInput:
        own, memories = self.vectors(categorical, bags)
        parts = [own.flatten(1)]
        for attention, history, memory in zip(
            self.attention, self.histories, memories, strict=True
        ):
            target = own[:, [field for field, _ in history]]
            parts.append(attention(target, *memory))
        learned = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return RowInput(learned, self.numerics(numeric))

    def vectors(
        self, categorical: Tensor, bags: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """A vector of each categorical and plain list field [B, C + L, D], and of each history its
        impressions [B, K, columns, D] with which of them there are [B, K].
        """
        parts = [self._rows(categorical + self.offset).flatten(1)]  # [B, C·D]
        memories = []
        if self.slots:
            is_filled = bags > 0
            filled = is_filled.to(self.table.weight.dtype).unsqueeze(-1)
            vectors = (self._rows(bags + self.bag_offset) * filled).split(self.slots, 1)
            plain = len(self.slots) - sum(len(history) for history in self.histories)
            masks = filled.split(self.slots, 1)
            for vector, mask in zip(vectors[:plain], masks[:plain], strict=True):
                parts.append(vector.sum(1) / mask.sum(1).clamp(min=1.0))
            known = is_filled.split(self.slots, 1)
            for history in self.histories:
                lists = [field - len(self.offset) for _, field in history]
                impressions = torch.stack([vectors[n] for n in lists], 2)
                there = torch.stack([known[n] for n in lists]).any(0)
                memories.append((impressions, there))
        own = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return own.view(len(categorical), -1, self.table.embedding_dim), memories

    def _rows(self, index: Tensor) -> Tensor:
        """Rows of the table, [B, C] → [B, C, D]; the gradient of index_select takes an eighth of
        the time of nn.Embedding's on a CPU, unless it is sparse.
        """
        if self.sparse:
            return functional.embedding(index, self.table.weight, sparse=True)
        rows = self.table.weight.index_select(0, index.flatten())
        return rows.view(*index.shape, self.table.embedding_dim)

    def columns_of(self, patterns: Sequence[str]) -> Tensor:
        """Which columns of x come from features that match a pattern such as `user_*`: [I] bools.

        Raises ValueError when no feature matches.
        """
        chosen = [any(fnmatchcase(name, p) for p in patterns) for name in self.names]
        if not any(chosen):
            raise ValueError(f"{list(patterns)} match none of the features {self.names}")
        return torch.tensor([chosen[field] for field in self.sources])

    def columns_of_part(self, part: int, parts: int) -> Tensor:
        """Which columns of x model `part` of `parts` sees: [I] bools.

        Its own share of every embedding, and all numbers.
        """
        width = self.table.embedding_dim
        learned = self.outputs - self.numerics.width  # whole embeddings, those attended to as well
        column = torch.arange(self.outputs)
        own = (column % width) // (width // parts) == part
        return own | (column >= learned)
