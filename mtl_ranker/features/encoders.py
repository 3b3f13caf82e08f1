"""Encode feature columns as arrays; fitted on training days only, and saved as JSON.

A categorical becomes an index (0 for unknown and missing values), a list column a padded row of
indices, a numeric stays a number, NaN where missing: the model's embedding encodes it piecewise
linearly (Gorishniy et al., NeurIPS 2022) from the bin edges that the encoder holds. A vector
becomes its row in a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mtl_ranker.config import Categorical, Features, ListColumn, Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.columns import check_shared, numeric_features, table_sides
from mtl_ranker.features.matches import Match, find_matches, with_matches
from mtl_ranker.features.vectors import VectorTable, read_vectors

HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Vocabulary:
    """Indices of one categorical or list column: known values are 1..n, all others 0.

    Attributes:
        values: known values, ascending, then those that each extension adds; empty if values are
            hashed.
        hash_buckets: number of buckets, or None for a vocabulary.
        max_length: most values per row of a list column.
        share: columns with the same name here have the same vocabulary and embeddings.
    """

    column: str
    values: list[Any]
    hash_buckets: int | None = None
    max_length: int | None = None
    share: str | None = None

    @property
    def size(self) -> int:
        return 1 + (self.hash_buckets if self.hash_buckets is not None else len(self.values))


@dataclass(frozen=True)
class Content:
    """A column of vectors and its scale in training: (v - mean) / rms has a mean square of 1.

    Attributes:
        mean: [D], of the training rows' distinct vectors.
        rms: root mean square of their numbers minus the mean.
    """

    column: str
    mean: list[float]
    rms: float

    @classmethod
    def fit(cls, column: str, vectors: np.ndarray) -> Content:
        """Of K distinct vectors [K, D]. Raises ProjectError without one."""
        if not len(vectors):
            raise ProjectError(
                f"features.embeddings ({column}): no training row has a vector; allowed: at least "
                "one"
            )
        mean = vectors.mean(0, dtype=np.float64)
        rms = float(np.sqrt(np.square(vectors - mean).mean()))
        return cls(column, [float(value) for value in mean], rms if rms > 0 else 1.0)


@dataclass(frozen=True)
class Encoded:
    """Arrays of N rows: categorical [N, C], bags [N, sum of lengths], numeric [N, F].

    C categorical columns, and F numeric ones. Bags are the padded rows of all list columns.

    Attributes:
        vectors: [N, E], rows of the tables of E columns of vectors; 0 = missing.
        tables: of each of these columns, float32 [V + 1, D] with NaN in row 0.
    """

    categorical: np.ndarray
    bags: np.ndarray
    numeric: np.ndarray
    vectors: np.ndarray
    tables: list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A fitted encoder; part of the model artifact.

    Attributes:
        edges: ascending bin edges of each numeric, at least two.
        missing: for each numeric, whether it was ever missing in training.
        numerics: names; the last ones are those of the match features.
        histories: for each history, pairs of fields (numbers among categoricals and lists): a
            field of the item, and the list with the same field of the user's latest impressions.
        contents: columns of vectors.
        tables: their vectors by key, for rows that have keys; not saved.
    """

    categoricals: list[Vocabulary]
    lists: list[Vocabulary]
    numerics: list[str]
    edges: list[list[float]]
    numeric_encoding: str
    missing: list[bool]
    histories: list[list[list[int]]] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    contents: list[Content] = field(default_factory=list)
    tables: Mapping[str, VectorTable] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def fit(
        cls,
        features: Features,
        numerics: Sequence[str],
        rows: pl.DataFrame | pl.LazyFrame,
        sample_rows: int | None = None,
        sides: Mapping[str, str] | None = None,
    ) -> Encoder:
        """Fit on training rows. Raises ProjectError for an infinite numeric.

        Args:
            numerics: names of the numeric columns.
            sides: column → "user" or "item"; columns of both sides with common values get a match
                feature (`find_matches`).
            rows: vocabularies and missing values come from all of them, streamed if lazy.
            sample_rows: number of evenly spaced rows from which the edges come; None for all.
        """
        lazy = rows.lazy()
        categoricals, lists = _vocabularies(features, lazy)
        known = {} if sides is None or features.matches == "none" else sides
        matches = find_matches(categoricals, lists, known, features.matches == "share")
        lazy = with_matches(lazy, matches)
        numerics = [*numerics, *(match.name for match in matches)]
        histories = _add_histories(features, categoricals, lists)
        numbers = lazy.select(pl.col(n).cast(pl.Float32, strict=False) for n in numerics)
        is_missing = pl.all().is_null() | pl.all().is_nan().fill_null(False)
        flags = (
            numbers.select(
                is_missing.any().name.suffix(" missing"),
                pl.all().is_infinite().any().name.suffix(" infinite"),
            ).collect(engine="streaming")
            if numerics
            else pl.DataFrame()
        )
        for name in numerics:
            if flags[f"{name} infinite"][0]:
                raise ProjectError(f"features: numeric column {name!r} holds infinite values")
        missing = [bool(flags[f"{name} missing"][0]) for name in numerics]
        if sample_rows is not None:
            step = -(-lazy.select(pl.len()).collect().item() // sample_rows)
            numbers = numbers.gather_every(max(step, 1))
        matrix = numeric_matrix(numbers.collect(engine="streaming"), numerics)
        edges = []
        for column in range(len(numerics)):
            values = matrix[:, column]
            edges.append(_edges(values[~np.isnan(values)], features))
        return cls(
            categoricals=categoricals,
            lists=lists,
            numerics=list(numerics),
            edges=edges,
            numeric_encoding=features.numeric_encoding,
            missing=missing,
            histories=histories,
            matches=matches,
        )

    def extended(self, features: Features, rows: pl.DataFrame | pl.LazyFrame) -> Encoder:
        """The encoder with the values of further rows after its own, whose indices stay.

        Edges, and which numerics have an indicator of missing values, stay as well.

        Args:
            features: of this encoder; a value needs `min_count` of the further rows.
        """
        categoricals, lists = _vocabularies(features, rows.lazy())
        found = {v.column: v.values for v in (*categoricals, *lists)}
        # The list of a history has the values of the fields that it shares with.
        shared = {
            v.share: found[v.column]
            for v in (*self.categoricals, *self.lists)
            if v.share is not None and v.column in found
        }

        def grown(own: Vocabulary) -> Vocabulary:
            known = set(own.values)
            values = found[own.column] if own.share is None else shared[own.share]
            return replace(own, values=[*own.values, *(v for v in values if v not in known)])

        return replace(
            self,
            categoricals=[grown(v) for v in self.categoricals],
            lists=[grown(v) for v in self.lists],
        )

    def with_contents(
        self, columns: Sequence[str], tables: Mapping[str, VectorTable], rows: pl.LazyFrame
    ) -> Encoder:
        """The encoder with columns of vectors, whose scale is that of these training rows.

        Raises ProjectError for a column without a vector.

        Args:
            tables: with the vectors that the rows' keys name, among others.
        """
        contents = []
        for column in columns:
            keys = rows.select(column).drop_nulls().unique().sort(column)
            table = tables[column]
            known = table.rows(keys.collect(engine="streaming")[column])
            contents.append(Content.fit(column, table.vectors[known]))
        return replace(self, contents=contents, tables=tables)

    @property
    def columns(self) -> list[str]:
        """The columns that `transform` reads."""
        names = [v.column for v in (*self.categoricals, *self.lists)]
        numbers = self.numerics[: len(self.numerics) - len(self.matches)]
        return list(dict.fromkeys([*names, *numbers, *(c.column for c in self.contents)]))

    def transform(self, frame: pl.DataFrame) -> Encoded:
        """Encode N rows. Raises ProjectError when a column is missing."""
        absent = [c for c in self.columns if c not in frame.columns]
        if absent:
            raise ProjectError(f"features missing from the rows to score: {', '.join(absent)}")
        codes = [_codes(frame[v.column], v) for v in self.categoricals]
        categorical = np.stack(codes, 1) if codes else np.zeros((frame.height, 0), np.int64)
        padded = [_padded(frame[v.column], v) for v in self.lists]
        bags = np.concatenate(padded, 1) if padded else np.zeros((frame.height, 0), np.int64)
        numeric = numeric_matrix(with_matches(frame, self.matches), self.numerics)
        found = [self._vectors(frame[content.column], content) for content in self.contents]
        rows = [rows for rows, _ in found]
        vectors = np.stack(rows, 1) if rows else np.zeros((frame.height, 0), np.int64)
        return Encoded(categorical, bags, numeric, vectors, [table for _, table in found])

    def _vectors(self, series: pl.Series, content: Content) -> tuple[np.ndarray, np.ndarray]:
        """The row of each of N values, and the table; of keys that of `tables`."""
        size, missing = len(content.mean), np.full((1, len(content.mean)), np.nan, np.float32)
        if series.null_count() == len(series):
            return np.zeros(len(series), np.int64), missing
        if series.dtype.is_integer():
            table = self.tables.get(content.column, VectorTable(np.zeros(0, np.int64), missing))
            if table.vectors.shape[1] != size:
                raise ProjectError(
                    f"features.embeddings: vectors in {content.column!r} have "
                    f"{table.vectors.shape[1]} numbers; allowed: {size}, as in training"
                )
            return table.rows(series), table.vectors
        ids = pl.Series("row", np.arange(len(series)))
        known, vectors = read_vectors(series, ids, "features.embeddings", size)
        return np.where(known, known.cumsum(), 0), np.concatenate([missing, vectors])

    def with_vectors(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Rows with the vectors themselves, lists of numbers, in place of their keys."""
        columns = []
        for content in self.contents:
            series = frame[content.column]
            if not isinstance(series.dtype, pl.List | pl.Array):
                rows, table = self._vectors(series, content)
                vectors = pl.Series(content.column, table[rows]).cast(pl.List(pl.Float32))
                columns.append(vectors.set(pl.Series(rows == 0), None))
        return frame.with_columns(columns)

    def save(self, path: Path) -> None:
        content = asdict(replace(self, tables={}))
        del content["tables"]
        path.write_text(json.dumps(content), "utf-8")

    @classmethod
    def load(cls, path: Path) -> Encoder:
        content = json.loads(path.read_text("utf-8"))
        for key in ("categoricals", "lists"):
            content[key] = [Vocabulary(**vocabulary) for vocabulary in content[key]]
        content["matches"] = [Match(**match) for match in content.get("matches", [])]
        content["contents"] = [Content(**own) for own in content.get("contents", [])]
        return cls(**content)


def fit_encoder(
    project: Project,
    rows: pl.DataFrame | pl.LazyFrame,
    sample_rows: int | None = None,
    tables: Mapping[str, VectorTable] | None = None,
) -> Encoder:
    """An encoder of a project's features, fitted on training rows (see `Encoder.fit`).

    Args:
        tables: of the columns `features.embeddings`, with the vectors of these rows and of all
            that are to be encoded.
    """
    numerics, sides = numeric_features(project), table_sides(project)
    encoder = Encoder.fit(project.features, numerics, rows, sample_rows, sides)
    return encoder.with_contents(project.features.embeddings, tables or {}, rows.lazy())


def _vocabularies(
    features: Features, rows: pl.LazyFrame
) -> tuple[list[Vocabulary], list[Vocabulary]]:
    """The vocabularies of categorical and of list columns, from their values in these rows."""
    shared = _shared(features, rows)
    categoricals = [
        Vocabulary(c.column, [], c.hash_buckets, share=c.share)
        if c.hash_buckets is not None
        else Vocabulary(
            c.column,
            shared[c.share] if c.share else _frequent(rows.select(c.column), c.min_count),
            share=c.share,
        )
        for c in features.categoricals
    ]
    lists = [
        Vocabulary(
            c.column,
            shared[c.share]
            if c.share
            else _frequent(rows.select(pl.col(c.column).explode()), c.min_count),
            max_length=c.max_length,
            share=c.share,
        )
        for c in features.lists
    ]
    return categoricals, lists


def _add_histories(
    features: Features, categoricals: list[Vocabulary], lists: list[Vocabulary]
) -> list[list[list[int]]]:
    """Append each history's lists, which share vocabulary and embeddings with the items' fields.

    Changes both lists in place; returns the pairs of fields (`Encoder.histories`).
    """
    fields = [*categoricals, *lists]
    number_of = {vocabulary.column: number for number, vocabulary in enumerate(fields)}
    histories = []
    for history in features.histories:
        pairs = []
        for column in history.columns:
            number = number_of[column]
            fields[number] = replace(fields[number], share=fields[number].share or f"={column}")
            feature = history.feature(column)
            fields.append(replace(fields[number], column=feature, max_length=history.length))
            pairs.append([number, len(fields) - 1])
        histories.append(pairs)
    categoricals[:], lists[:] = fields[: len(categoricals)], fields[len(categoricals) :]
    return histories


def _shared(features: Features, rows: pl.LazyFrame) -> dict[str, list[Any]]:
    """The vocabulary of each shared name: values that are frequent in all its columns together.

    The least `min_count` of the columns counts. Raises ProjectError as `check_shared` does.
    """
    values_of: dict[str, list[pl.LazyFrame]] = {}
    min_count: dict[str, int] = {}
    columns: list[Categorical | ListColumn] = [*features.categoricals, *features.lists]
    for c in columns:
        if c.share is None:
            continue
        value = pl.col(c.column).explode() if isinstance(c, ListColumn) else pl.col(c.column)
        values_of.setdefault(c.share, []).append(rows.select(value.alias(c.share)))
        min_count[c.share] = min(c.min_count, min_count.get(c.share, c.min_count))
    check_shared(features, rows.select(c.column for c in columns).collect_schema())
    vocabularies = {}
    for name, frames in values_of.items():
        vocabularies[name] = _frequent(pl.concat(frames, how="vertical_relaxed"), min_count[name])
    return vocabularies


def _frequent(column: pl.LazyFrame, min_count: int) -> list[Any]:
    """Values of a frame's single column that occur at least `min_count` times, ascending.

    Dates and times are text, which JSON holds; `_codes` casts a column to its vocabulary's type.
    """
    name, dtype = next(iter(column.collect_schema().items()))
    if dtype.is_temporal():
        column, dtype = column.cast(pl.String), pl.String()
    value = pl.col(name)
    known = value.is_not_null() & value.is_not_nan() if dtype.is_float() else value.is_not_null()
    counts = column.filter(known).group_by(name).len().filter(pl.col("len") >= min_count)
    return counts.select(name).sort(name).collect(engine="streaming")[name].to_list()


def _codes(series: pl.Series, vocabulary: Vocabulary) -> np.ndarray:
    """Indices of N values: [N]."""
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
    """Buckets 1..n of N values, 0 = missing: [N]. The same in every version.

    Fibonacci hashing; strings are first hashed to integers with BLAKE2.
    """
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
    """Indices of the first values of N lists, padded with 0: [N, max_length]."""
    length = vocabulary.max_length or 1
    if not isinstance(series.dtype, pl.List):
        series = series.cast(pl.List(pl.String))
    rows = np.zeros((len(series), length), np.int64)
    flat = pl.DataFrame({"row": np.arange(len(series)), "value": series.list.head(length)})
    flat = flat.explode("value").with_columns(slot=pl.int_range(pl.len()).over("row"))
    rows[flat["row"].to_numpy(), flat["slot"].to_numpy()] = _codes(flat["value"], vocabulary)
    return rows


def numeric_matrix(frame: pl.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Columns as float32 [N, F], NaN where missing."""
    if not names:
        return np.zeros((frame.height, 0), np.float32)
    wide = frame.select(pl.col(n).cast(pl.Float32, strict=False).fill_null(np.nan) for n in names)
    return np.ascontiguousarray(wide.to_numpy(writable=True))


def _edges(values: np.ndarray, features: Features) -> list[float]:
    """Edges of one numeric from its values; with "standardise", the mean and one deviation more."""
    if len(values) == 0:
        return [0.0, 1.0]
    if features.numeric_encoding == "standardise":
        spread = float(values.std()) or 1.0
        return [float(values.mean()), float(values.mean()) + spread]
    edges = quantile_edges(values.astype(np.float64), features.bins, features.tail_edges)
    if len(edges) == 1:
        return [float(edges[0]), float(edges[0]) + 1.0]
    return [float(edge) for edge in edges]


def quantile_edges(values: np.ndarray, bins: int, tail: int = 0) -> np.ndarray:
    """Ascending, distinct edges of about `bins` bins with equal numbers of values.

    A value so frequent that it would fill whole bins (most people have no capital gains) becomes an
    edge, and the remaining bins divide the other values.

    Args:
        values: without missing ones.
        tail: further edges at most in each long tail (see `tail_edges`).
    """
    quantiles = np.quantile(values, np.linspace(0, 1, bins + 1), method="inverted_cdf")
    distinct, times = np.unique(quantiles, return_counts=True)
    frequent = distinct[times > 1]
    others = values[~np.isin(values, frequent)]
    if len(frequent) and len(others):
        remaining = max(bins + 1 - len(frequent), 2)
        inner = np.quantile(others, np.linspace(0, 1, remaining), method="nearest")
        distinct = np.unique(np.r_[frequent, inner])
    elif len(frequent):
        return frequent
    upper, lower = tail_edges(values, distinct, tail), tail_edges(-values, -distinct[::-1], tail)
    return np.unique(np.r_[distinct, upper, -lower])


def tail_edges(values: np.ndarray, edges: np.ndarray, most: int) -> np.ndarray:
    """Up to `most` further edges in the upper tail.

    While the last bin is wider than all bins below it together, it is divided at the median of its
    values. Large values are rare, but rare objectives depend on them (the few users who like
    often), and within one wide bin the encoding is only linear.
    """
    further: list[float] = []
    low, high = float(edges[-2]) if len(edges) > 1 else float(edges[0]), float(edges[-1])
    first = float(edges[0])
    while len(further) < most and high - low > low - first:
        above = values[values > low]
        edge = float(np.quantile(above, 0.5, method="nearest"))
        if edge >= high:
            break
        further.append(edge)
        low = edge
    return np.array(further)
