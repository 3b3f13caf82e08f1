"""Raw feature rows to arrays, fitted on training days only; saved as JSON, never pickled.

A categorical becomes an index (0 is the unknown bucket, also for missing values), a list column a
padded row of indices, a numeric stays a number with NaN for missing: the model's embedding turns
it into a piecewise-linear code (Gorishniy et al., NeurIPS 2022) from the bin edges kept here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mtl_ranker.config import Categorical, Features, ListColumn
from mtl_ranker.errors import ProjectError

HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Vocabulary:
    """One categorical or list column: known values to 1..n, everything else to 0."""

    column: str
    values: list[Any]
    hash_buckets: int | None = None
    max_length: int | None = None
    share: str | None = None  # columns of one name here have one vocabulary and embedding

    @property
    def size(self) -> int:
        return 1 + (self.hash_buckets if self.hash_buckets is not None else len(self.values))


@dataclass(frozen=True)
class Encoded:
    """Arrays of N rows: categorical [N, C], bags [N, sum of lengths], numeric [N, F]."""

    categorical: np.ndarray
    bags: np.ndarray
    numeric: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """The fitted encoder; travels inside the model artifact."""

    categoricals: list[Vocabulary]
    lists: list[Vocabulary]
    numerics: list[str]
    edges: list[list[float]]  # ascending bin edges of each numeric, at least two
    numeric_encoding: str
    missing: list[bool]  # whether the numeric was ever missing in training
    # Of each history, pairs of fields (among categoricals and lists): an item's own, and the list
    # of the same that was remembered.
    histories: list[list[list[int]]] = field(default_factory=list)

    @classmethod
    def fit(
        cls,
        features: Features,
        numerics: Sequence[str],
        rows: pl.DataFrame | pl.LazyFrame,
        sample_rows: int | None = None,
    ) -> Encoder:
        """Fit on training rows. Raises ProjectError for an infinite numeric.

        Vocabularies and gaps are counted over all rows, streaming if the frame is lazy. With
        `sample_rows` the numerics' edges come from so many rows, evenly from all.
        """
        lazy = rows.lazy()
        shared = _shared(features, lazy)
        categoricals = [
            Vocabulary(c.column, [], c.hash_buckets, share=c.share)
            if c.hash_buckets is not None
            else Vocabulary(
                c.column,
                shared[c.share] if c.share else _frequent(lazy.select(c.column), c.min_count),
                share=c.share,
            )
            for c in features.categoricals
        ]
        lists = [
            Vocabulary(
                c.column,
                shared[c.share]
                if c.share
                else _frequent(lazy.select(pl.col(c.column).explode()), c.min_count),
                max_length=c.max_length,
                share=c.share,
            )
            for c in features.lists
        ]
        histories = _add_histories(features, categoricals, lists)
        numbers = lazy.select(pl.col(n).cast(pl.Float32, strict=False) for n in numerics)
        gaps = pl.all().is_null() | pl.all().is_nan().fill_null(False)
        found = (
            numbers.select(
                gaps.any().name.suffix(" gap"),
                pl.all().is_infinite().any().name.suffix(" infinite"),
            ).collect(engine="streaming")
            if numerics
            else pl.DataFrame()
        )
        for name in numerics:
            if found[f"{name} infinite"][0]:
                raise ProjectError(f"features: numeric column {name!r} holds infinite values")
        missing = [bool(found[f"{name} gap"][0]) for name in numerics]
        if sample_rows is not None:
            step = -(-lazy.select(pl.len()).collect().item() // sample_rows)
            numbers = numbers.gather_every(max(step, 1))
        matrix = numeric_matrix(numbers.collect(engine="streaming"), numerics)
        edges = []
        for column in range(len(numerics)):
            values = matrix[:, column]
            edges.append(_edges(values[~np.isnan(values)], features))
        return cls(
            categoricals,
            lists,
            list(numerics),
            edges,
            features.numeric_encoding,
            missing,
            histories,
        )

    @property
    def columns(self) -> list[str]:
        names = [v.column for v in (*self.categoricals, *self.lists)]
        return list(dict.fromkeys([*names, *self.numerics]))

    def transform(self, frame: pl.DataFrame) -> Encoded:
        """Encode N rows. Raises ProjectError when a column is missing."""
        absent = [c for c in self.columns if c not in frame.columns]
        if absent:
            raise ProjectError(f"features missing from the rows to score: {', '.join(absent)}")
        codes = [_codes(frame[v.column], v) for v in self.categoricals]
        categorical = np.stack(codes, 1) if codes else np.zeros((frame.height, 0), np.int64)
        padded = [_padded(frame[v.column], v) for v in self.lists]
        bags = np.concatenate(padded, 1) if padded else np.zeros((frame.height, 0), np.int64)
        return Encoded(categorical, bags, numeric_matrix(frame, self.numerics))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), "utf-8")

    @classmethod
    def load(cls, path: Path) -> Encoder:
        content = json.loads(path.read_text("utf-8"))
        for key in ("categoricals", "lists"):
            content[key] = [Vocabulary(**vocabulary) for vocabulary in content[key]]
        return cls(**content)


def _add_histories(
    features: Features, categoricals: list[Vocabulary], lists: list[Vocabulary]
) -> list[list[list[int]]]:
    """Append each history's lists, which share the vocabulary and embeddings of the items' own."""
    known = [*categoricals, *lists]
    place = {vocabulary.column: number for number, vocabulary in enumerate(known)}
    histories = []
    for history in features.histories:
        pairs = []
        for column in history.columns:
            number = place[column]
            group = known[number].share or f"={column}"
            known[number] = replace(known[number], share=group)
            own = replace(known[number], column=history.feature(column), max_length=history.length)
            known.append(own)
            pairs.append([number, len(known) - 1])
        histories.append(pairs)
    categoricals[:], lists[:] = known[: len(categoricals)], known[len(categoricals) :]
    return histories


def _shared(features: Features, rows: pl.LazyFrame) -> dict[str, list[Any]]:
    """The vocabulary of each shared name: values that are frequent in its columns together."""
    columns: dict[str, list[pl.LazyFrame]] = {}
    least: dict[str, int] = {}
    every: list[Categorical | ListColumn] = [*features.categoricals, *features.lists]
    for c in every:
        if c.share is None:
            continue
        value = pl.col(c.column).explode() if isinstance(c, ListColumn) else pl.col(c.column)
        columns.setdefault(c.share, []).append(rows.select(value.alias(c.share)))
        least[c.share] = min(c.min_count, least.get(c.share, c.min_count))
    found = {}
    for name, parts in columns.items():
        types = {str(part.collect_schema()[name]) for part in parts}
        if len(types) > 1:
            raise ProjectError(
                f"features: columns that share {name!r} hold {', '.join(sorted(types))}; "
                "allowed: one type"
            )
        found[name] = _frequent(pl.concat(parts), least[name])
    return found


def _frequent(column: pl.LazyFrame, min_count: int) -> list[Any]:
    """The values of a frame's one column that occur often enough, ascending."""
    name, dtype = next(iter(column.collect_schema().items()))
    value = pl.col(name)
    known = value.is_not_null() & value.is_not_nan() if dtype.is_float() else value.is_not_null()
    counts = column.filter(known).group_by(name).len().filter(pl.col("len") >= min_count)
    return counts.select(name).sort(name).collect(engine="streaming")[name].to_list()


def _codes(series: pl.Series, vocabulary: Vocabulary) -> np.ndarray:
    if vocabulary.hash_buckets is not None:
        return _hashed(series, vocabulary.hash_buckets)
    if not vocabulary.values:
        return np.zeros(len(series), np.int64)
    known = pl.Series("value", vocabulary.values)
    # A pandas caller's integers may arrive as floats and vice versa: compare in the known type.
    series = series.cast(known.dtype, strict=False)
    codes = pl.DataFrame({"value": series}).select(
        pl.col("value").replace_strict(
            known, pl.int_range(1, len(known) + 1, eager=True), default=0, return_dtype=pl.Int64
        )
    )
    return codes["value"].fill_null(0).to_numpy()


def _hashed(series: pl.Series, buckets: int) -> np.ndarray:
    """Fibonacci hashing of integers, BLAKE2 of strings; 0 = missing. Stable across versions."""
    null = series.is_null().to_numpy()
    if series.dtype == pl.String:
        distinct = series.unique().drop_nulls()
        number = {t: int.from_bytes(blake2b(t.encode(), digest_size=8).digest()) for t in distinct}
        whole = np.array([number.get(t, 0) for t in series.to_list()], np.uint64)
    else:
        whole = series.cast(pl.Int64, strict=False).fill_null(0).to_numpy().astype(np.uint64)
    with np.errstate(over="ignore"):
        mixed = (whole * HASH_MULTIPLIER) >> np.uint64(32)
    return np.where(null, 0, 1 + (mixed % np.uint64(buckets)).astype(np.int64))


def _padded(series: pl.Series, vocabulary: Vocabulary) -> np.ndarray:
    length = vocabulary.max_length or 1
    if not isinstance(series.dtype, pl.List):
        series = series.cast(pl.List(pl.String))
    rows = np.zeros((len(series), length), np.int64)
    flat = pl.DataFrame({"row": np.arange(len(series)), "value": series.list.head(length)})
    flat = flat.explode("value").with_columns(slot=pl.int_range(pl.len()).over("row"))
    rows[flat["row"].to_numpy(), flat["slot"].to_numpy()] = _codes(flat["value"], vocabulary)
    return rows


def numeric_matrix(frame: pl.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Columns as numbers [N, F], NaN where missing."""
    if not names:
        return np.zeros((frame.height, 0), np.float32)
    wide = frame.select(pl.col(n).cast(pl.Float32, strict=False).fill_null(np.nan) for n in names)
    return np.ascontiguousarray(wide.to_numpy(writable=True))


def _edges(known: np.ndarray, features: Features) -> list[float]:
    if len(known) == 0:
        return [0.0, 1.0]
    if features.numeric_encoding == "standardise":
        spread = float(known.std()) or 1.0
        return [float(known.mean()), float(known.mean()) + spread]
    edges = quantile_edges(known.astype(np.float64), features.bins, features.tail_edges)
    if len(edges) == 1:
        return [float(edges[0]), float(edges[0]) + 1.0]
    return [float(edge) for edge in edges]


def quantile_edges(known: np.ndarray, bins: int, tail: int = 0) -> np.ndarray:
    """Ascending, distinct edges of about `bins` bins that hold equally many values.

    A value so frequent that it would fill whole bins (most people have no capital gains) becomes an
    edge of its own, and the bins left over divide the other values. Long tails get up to `tail`
    edges of their own (`tail_edges`).
    """
    grid = np.quantile(known, np.linspace(0, 1, bins + 1), method="inverted_cdf")
    distinct, times = np.unique(grid, return_counts=True)
    heavy = distinct[times > 1]
    rest = known[~np.isin(known, heavy)]
    if len(heavy) and len(rest):
        left = max(bins + 1 - len(heavy), 2)
        inner = np.quantile(rest, np.linspace(0, 1, left), method="nearest")
        distinct = np.unique(np.r_[heavy, inner])
    elif len(heavy):
        return heavy
    upper, lower = tail_edges(known, distinct, tail), tail_edges(-known, -distinct[::-1], tail)
    return np.unique(np.r_[distinct, upper, -lower])


def tail_edges(known: np.ndarray, edges: np.ndarray, cuts: int) -> np.ndarray:
    """Further edges in the upper tail: while the last bin is wider than all below it together, it
    is cut at the median of its values.

    Rare, large values decide rare objectives (the few users who like often); in one wide bin they
    are one straight line.
    """
    found: list[float] = []
    low, high = float(edges[-2]) if len(edges) > 1 else float(edges[0]), float(edges[-1])
    first = float(edges[0])
    while len(found) < cuts and high - low > low - first:
        above = known[known > low]
        cut = float(np.quantile(above, 0.5, method="nearest"))
        if cut >= high:
            break
        found.append(cut)
        low = cut
    return np.array(found)
