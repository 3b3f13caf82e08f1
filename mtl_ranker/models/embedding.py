"""Embedding of encoded rows: categoricals, lists, histories, numerics and projected vectors."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mtl_ranker.models.attention import TargetAttention


class RowInput:
    """The input x of the first layer in two parts: embeddings [B, I_l] and numerics [B, I_f].

    `fixed`, the encoded numerics, has no parameters: kept separate, it needs no gradient.
    I = I_l + I_f.
    """

    def __init__(self, learned: Tensor, fixed: Tensor) -> None:
        self.learned, self.fixed = learned, fixed

    def project(self, weight: Tensor, bias: Tensor | None = None, reader: object = None) -> Tensor:
        """W xᵀ + b: the product of a layer's weight with the rows, batch last.

        Args:
            reader: the layer, where products of its weight may be reused (see `PairInput`).

        Shape: weight [U, I], bias [U] → [U, B].
        """
        split = self.learned.shape[1]
        if split == 0:
            product = weight @ self.fixed.t()
        else:
            product = weight[:, :split] @ self.learned.t()
            if self.fixed.shape[1] > 0:
                # In place, except under autocast, which casts only newly allocated results.
                add = product.addmm_ if product.dtype == weight.dtype else product.addmm
                product = add(weight[:, split:], self.fixed.t())
        return product if bias is None else product.add_(bias.unsqueeze(1))

    def row(self) -> Tensor:
        """x as one tensor [B, I]."""
        return torch.cat([self.learned, self.fixed], 1)


class EmbeddedHistory(NamedTuple):
    """A user's latest impressions: vectors [B, L, C, D], and filled [B, L], which of them exist."""

    vectors: Tensor
    filled: Tensor


class PiecewiseLinear(nn.Module):
    """Piecewise-linear encoding of numbers (Gorishniy et al., NeurIPS 2022, eq. 1).

    Feature f with edges b_0 < … < b_n becomes n values, the t-th being
    `clip((x - b_{t-1}) / (b_t - b_{t-1}), 0, 1)`. A missing value (NaN) becomes zeros; features in
    `missing` get one more output that is 1 for it.

    Args:
        edges: for each of the F features, its ascending edges; their number may differ.
        missing: for each feature, whether it gets an indicator of missing values.
        standardise: no clipping, so that two edges standardise: (x - b_0) / (b_1 - b_0).

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
        column = [f for f, own in enumerate(edges) for _ in own[1:]]
        low = torch.tensor([b for own in edges for b in own[:-1]], dtype=torch.float64)
        high = torch.tensor([b for own in edges for b in own[1:]], dtype=torch.float64)
        self.standardise = standardise
        self.register_buffer("column", torch.tensor(column, dtype=torch.long))
        # (x - low) / (high - low) as one fused multiply-add: x · scale + shift.
        self.register_buffer("scale", (1.0 / (high - low)).float().unsqueeze(1))
        self.register_buffer("shift", (-low / (high - low)).float().unsqueeze(1))
        indicators = [f for f, flag in enumerate(missing) if flag]
        self.register_buffer("indicator", torch.tensor(indicators, dtype=torch.long))
        self.width = len(column) + len(indicators)
        bins = {len(own) - 1 for own in edges}
        self.bins = bins.pop() if len(bins) == 1 else 0  # of every feature, if they have the same
        self.sources = column + indicators  # which feature each output comes from

    def of(self, features: Sequence[int]) -> PiecewiseLinear:
        """The encoding of these features only."""
        edges = [self.edges[f] for f in features]
        part = PiecewiseLinear(edges, [self.missing[f] for f in features], self.standardise)
        return part.to(self.scale.device)

    def forward(self, numbers: Tensor) -> Tensor:
        # Batch last: selecting a feature's column for each of its bins then copies whole rows.
        x = numbers.t().contiguous()  # [F, B]
        if self.bins:
            grid = (self.features, self.bins, 1)
            code = torch.addcmul(self.shift.view(grid), x.unsqueeze(1), self.scale.view(grid))
            code = code.flatten(0, 1)  # [bins, B]
        else:
            code = torch.addcmul(self.shift, x.index_select(0, self.column), self.scale)
        code = code if self.standardise else code.clamp_(0.0, 1.0)
        code = code.nan_to_num_(0.0)  # a missing value is still NaN here
        if not len(self.indicator):
            return code.t()
        absent = torch.isnan(x.index_select(0, self.indicator)).to(code.dtype)
        return torch.cat([code, absent]).t()


class ContentProjection(nn.Module):
    """A trained projection of given vectors: W (v - mean) / rms.

    A missing vector (NaN) has a trained vector in its place.

    Args:
        mean: [D_v].
        rms: a number above 0.
        width: D.

    Shape: [B, D_v] → [B, D].
    """

    mean: Tensor

    def __init__(self, mean: Sequence[float], rms: float, width: int) -> None:
        super().__init__()
        self.size, self.rms = len(mean), rms
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.weight = nn.Parameter(torch.empty(width, self.size))
        nn.init.uniform_(self.weight, -(self.size**-0.5), self.size**-0.5)
        self.absent = nn.Parameter(torch.zeros(width))

    def forward(self, vectors: Tensor) -> Tensor:
        missing = torch.isnan(vectors[:, :1])
        centred = ((vectors - self.mean) / self.rms).nan_to_num(0.0)
        return torch.where(missing, self.absent, functional.linear(centred, self.weight))


def table_layout(sizes: Sequence[int], share: Sequence[str | None]) -> tuple[list[int], int]:
    """The first row of each field in the table of embeddings, and the number of rows.

    Args:
        sizes: rows of each field.
        share: for each field a name or None; fields with the same name have the same rows. Empty
            without such names.

    >>> table_layout([3, 2, 3], ["tag", None, "tag"])
    ([0, 3, 0], 5)
    """
    starts, total = [], 0
    first: dict[str, int] = {}
    for field, size in enumerate(sizes):
        name = share[field] if share else None
        starts.append(total if name is None else first.setdefault(name, total))
        total += size if starts[-1] == total else 0
    return starts, total


class FeatureEmbedding(nn.Module):
    """All fields of a row as one vector, from one table of embeddings.

    The vector of a list field is the mean over its filled slots; the lists of a history give the
    outputs of target attention instead.

    Args:
        sizes: vocabulary sizes of the C categorical fields; index 0 = unknown.
        bags: (vocabulary size, slots) of each list field.
        numerics: encoding of the F numeric fields.
        width: D, width of an embedding.
        names: of all fields (categoricals, lists, numerics, vectors), for groups of features.
        share: for each categorical and list field, a name or None; fields with the same name have
            the same vocabulary and use the same embeddings.
        histories: for each history, pairs of fields (numbers among categoricals and lists): a field
            of the item, and the list with the same field of the user's latest impressions. These
            lists are the last ones.
        heads: of the target attention.
        contents: projections of E columns of vectors.

    Attributes:
        outputs: I, width of x.
        sources: [I], the field that each column of x comes from.
        attended: columns of x that come from target attention.
        sparse: whether the table's gradient is a sparse tensor, of the batch's rows only.

    Shape: categorical [B, C], bags [B, all slots], numeric [B, F + numbers of all vectors] →
    x [B, I] as a RowInput.
    """

    offset: Tensor
    bag_offset: Tensor
    attended: Tensor

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
        contents: Sequence[ContentProjection] = (),
    ) -> None:
        super().__init__()
        rows = [*sizes, *(size for size, _ in bags)]
        offsets, total = table_layout(rows, share)
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
        self.histories = [[(field, past) for field, past in history] for history in histories]
        self.attention = nn.ModuleList()
        in_history = [past for history in self.histories for _, past in history]
        plain = [f for f in range(len(rows)) if f not in in_history]
        fields = [f for f in plain for _ in range(width)]
        begin = len(fields)
        for history in self.histories:
            length = bags[history[0][1] - len(sizes)][1]
            self.attention.append(TargetAttention(len(history), width, length, heads))
            fields += 2 * [past for _, past in history for _ in range(width)]
        attended = torch.arange(begin, len(fields))
        self.register_buffer("attended", attended, persistent=False)
        self.contents = nn.ModuleList(contents)
        self.sizes = [numerics.features, *(content.size for content in contents)]
        first = len(rows) + numerics.features
        fields += [first + e for e in range(len(contents)) for _ in range(width)]
        self.sources = fields + [len(rows) + f for f in numerics.sources]
        self.outputs = len(self.sources)

    def forward(self, categorical: Tensor, bags: Tensor, numeric: Tensor) -> RowInput:
        vectors, past = self.vectors(categorical, bags)
        columns = [vectors.flatten(1)]
        for attention, history, impressions in zip(
            self.attention, self.histories, past, strict=True
        ):
            target = vectors[:, [field for field, _ in history]]
            columns.append(attention(target, *impressions))
        numeric, *given = numeric.split(self.sizes, 1) if self.contents else (numeric,)
        columns += [content(own) for content, own in zip(self.contents, given, strict=True)]
        learned = torch.cat(columns, 1) if len(columns) > 1 else columns[0]
        return RowInput(learned, self.numerics(numeric))

    def vectors(self, categorical: Tensor, bags: Tensor) -> tuple[Tensor, list[EmbeddedHistory]]:
        """Vectors of the categorical and the plain list fields, and the embedded histories.

        Shape: [B, C + plain lists, D].
        """
        columns = [self._rows(categorical + self.offset).flatten(1)]  # [B, C·D]
        past = []
        if self.slots:
            is_filled = bags > 0
            filled = is_filled.to(self.table.weight.dtype).unsqueeze(-1)
            in_slots = (self._rows(bags + self.bag_offset) * filled).split(self.slots, 1)
            plain = len(self.slots) - sum(len(history) for history in self.histories)
            masks = filled.split(self.slots, 1)
            for vector, mask in zip(in_slots[:plain], masks[:plain], strict=True):
                columns.append(vector.sum(1) / mask.sum(1).clamp(min=1.0))
            present = is_filled.split(self.slots, 1)
            for history in self.histories:
                lists = [field - len(self.offset) for _, field in history]
                impressions = torch.stack([in_slots[n] for n in lists], 2)
                exists = torch.stack([present[n] for n in lists]).any(0)
                past.append(EmbeddedHistory(impressions, exists))
        vectors = torch.cat(columns, 1) if len(columns) > 1 else columns[0]
        return vectors.view(categorical.shape[0], -1, self.table.embedding_dim), past

    def _rows(self, index: Tensor) -> Tensor:
        """Rows of the table: [B, C] → [B, C, D]."""
        if self.sparse:
            return functional.embedding(index, self.table.weight, sparse=True)
        # On a CPU its gradient takes an eighth of the time of nn.Embedding's dense one.
        rows = self.table.weight.index_select(0, index.flatten())
        return rows.view(*index.shape, self.table.embedding_dim)

    def columns_of(self, patterns: Sequence[str]) -> Tensor:
        """Which columns of x come from features that match a pattern, such as `user_*`.

        Returns [I] booleans. Raises ValueError when no feature matches.
        """
        chosen = [any(fnmatchcase(name, p) for p in patterns) for name in self.names]
        if not any(chosen):
            raise ValueError(f"{list(patterns)} match none of the features {self.names}")
        return torch.tensor([chosen[field] for field in self.sources])

    def columns_of_part(self, part: int, parts: int) -> Tensor:
        """Which columns of x belong to one of several models that share no embeddings.

        Model `part` of `parts` has its share of every embedding, and all numerics.
        Returns [I] booleans.
        """
        width = self.table.embedding_dim
        learned = self.outputs - self.numerics.width  # embeddings and outputs of target attention
        column = torch.arange(self.outputs)
        in_share = (column % width) // (width // parts) == part
        return in_share | (column >= learned)
