"""Content embeddings: vectors of the user and item tables, stored once and named by a key.

A key is a hash of a vector's numbers, so a vector that changes has another one. Examples hold keys;
the vectors are in `vectors/` of the workspace, in files that are only added, until `prune_vectors`
removes what no examples name. Two runs may add the same vector at the same time: a key names the
same numbers in both files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import polars as pl

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.columns import is_vector
from mtl_ranker.workspace import Workspace, fingerprint

VECTORS = "vectors"


@dataclass(frozen=True)
class VectorTable:
    """V vectors by their keys.

    Attributes:
        keys: [V], ascending.
        vectors: float32 [V + 1, D]; row 0 is that of a missing vector, NaN, and row n + 1 that of
            key n.
    """

    keys: np.ndarray
    vectors: np.ndarray

    def rows(self, keys: pl.Series) -> np.ndarray:
        """The row of each of N keys: [N], 0 for null. Raises ProjectError for an unknown key."""
        known = keys.is_not_null().to_numpy()
        wanted = keys.fill_null(0).cast(pl.Int64).to_numpy()
        place = np.searchsorted(self.keys, wanted)
        found = np.append(self.keys, 0)[place] == wanted
        lacking = known & ~(found & (place < len(self.keys)))
        if lacking.any():
            raise ProjectError(
                f"features.embeddings: column {keys.name!r} names {int(lacking.sum()):,} vectors "
                "that were not read; allowed: rows of which the vectors are read, or lists of "
                "numbers in place of keys"
            )
        return np.where(known, place + 1, 0)


def read_vectors(
    column: pl.Series, ids: pl.Series, place: str, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which of N values are no null, and the numbers of those: [N] booleans and float32 [K, D].

    Raises ProjectError for a column that is no list of numbers, and naming the id of a vector of
    another length or with a number that is missing or not finite.

    Args:
        ids: of the rows [N], for messages.
        place: file or setting, for messages.
        size: D; None for that of most vectors.
    """
    known = column.is_not_null()
    if not known.any():
        return known.to_numpy(), np.zeros((0, size or 0), np.float32)
    if not is_vector(column.dtype):
        raise ProjectError(
            f"{place}: column {column.name!r} is {column.dtype}; allowed: lists or arrays of "
            "numbers, null without a vector"
        )
    lists, own = column.filter(known).cast(pl.List(pl.Float32), strict=False), ids.filter(known)
    lengths = lists.list.len()
    size = size or int(lengths.filter(lengths > 0).mode().sort().first() or 0)  # type: ignore[arg-type]
    other = (lengths != size) | (lengths == 0)
    if other.any():
        found = int(other.arg_true()[0])
        raise ProjectError(
            f"{place}: column {column.name!r}: the vector of {ids.name} {own[found]!r} has "
            f"{lengths[found]} numbers; allowed: {size or 'at least 1'}, or null without a vector"
        )
    numbers = lists.explode(empty_as_null=False).fill_null(np.nan).to_numpy()
    vectors = np.ascontiguousarray(numbers, np.float32).reshape(len(lists), size)
    wrong = ~np.isfinite(vectors)
    if wrong.any():
        row = int(wrong.any(1).argmax())
        raise ProjectError(
            f"{place}: column {column.name!r}: the vector of {ids.name} {own[row]!r} holds "
            f"{vectors[row][wrong[row]][0]}; allowed: finite numbers"
        )
    return known.to_numpy(), vectors


def vector_keys(vectors: np.ndarray) -> np.ndarray:
    """The key of each of K vectors [K, D]: int64 [K], the same in every version."""
    digests = (blake2b(row.tobytes(), digest_size=8).digest() for row in vectors.astype("<f4"))
    return np.array([int.from_bytes(each, "little", signed=True) for each in digests], np.int64)


def with_keys(
    context: Context, tables: Mapping[str, pl.LazyFrame], rows: pl.LazyFrame, store: bool = True
) -> dict[str, pl.LazyFrame]:
    """The tables with keys in place of the vectors of `features.embeddings`.

    A table with vectors then has the users or items of `rows` only. Their vectors are stored.

    Args:
        tables: by the column of rows that they are joined on.
        store: if False, nothing is written.

    Raises ProjectError as `read_vectors` does, and for a column that the rows have too.
    """
    wanted, found, schema = context.project.features.embeddings, dict(tables), rows.collect_schema()
    for key, table in tables.items():
        columns = [c for c in wanted if c in table.collect_schema()]
        if not columns or key not in schema:
            continue
        for column in columns:
            if column in schema:
                raise ProjectError(
                    f"features.embeddings ({column}): is a column of {context.log_path} too; "
                    "allowed: a column of log.users or log.items alone"
                )
        own = table.cast({key: schema[key]}).join(rows.select(key).unique(), on=key, how="semi")
        frame = own.collect(engine="streaming")
        keyed = []
        for column in columns:
            known, vectors = read_vectors(frame[column], frame[key], _file(context, key))
            keys = vector_keys(vectors)
            if store:
                _store(context.workspace, keys, vectors)
            values = np.zeros(frame.height, np.int64)
            values[known] = keys
            keyed.append(pl.Series(column, values).set(pl.Series(~known), None))
        found[key] = frame.with_columns(keyed).lazy()
    return found


def _file(context: Context, key: str) -> str:
    """The file or folder of the table with this key."""
    log = context.project.log
    table = log.users if key == "user_id" else log.items
    return str(context.source.root / table.path) if table is not None else "features.embeddings"


def _stored(workspace: Workspace) -> pl.LazyFrame:
    """All stored vectors; a key may occur twice, with the same numbers."""
    files = workspace.files(list(workspace.places(VECTORS)))
    if not files:
        return pl.LazyFrame(schema={"key": pl.Int64, "vector": pl.List(pl.Float32)})
    return pl.scan_parquet(files, glob=False)


def _store(workspace: Workspace, keys: np.ndarray, vectors: np.ndarray) -> None:
    known = _stored(workspace).select("key").collect()["key"].to_numpy()
    _, first = np.unique(keys, return_index=True)
    new = first[~np.isin(keys[first], known)]
    if len(new):
        vector = pl.Series("vector", vectors[new]).cast(pl.List(pl.Float32))
        rows = pl.DataFrame([pl.Series("key", keys[new]), vector])
        _write(workspace, rows)


def _write(workspace: Workspace, rows: pl.DataFrame) -> str:
    """Publish vectors with their keys; returns the place."""
    place = f"{VECTORS}/{fingerprint(*rows['key'])}.parquet"
    with workspace.published(place) as temporary:
        rows.write_parquet(temporary)
    return place


def named_vectors(workspace: Workspace, datasets: Sequence[str]) -> pl.Series:
    """Stored keys that occur in these datasets of examples, also unfinished ones.

    A key is a digest of 64 bits, so every column of Int64 is searched: which of them hold keys is
    said by settings that may have changed since the examples were built.
    """
    stored = _stored(workspace).select("key").unique().collect()["key"].implode()
    places = [workspace.place(each, day) for each in datasets for day in workspace.days(each)]
    places += [place for each in datasets for place in workspace.unfinished_parts(each)]
    keys = [pl.LazyFrame(schema={"key": pl.Int64})]
    for file in workspace.files(places):
        rows = pl.scan_parquet(file, glob=False)
        schema = rows.collect_schema()
        own = [column for column, dtype in schema.items() if dtype == pl.Int64]
        keys += [
            rows.select(pl.col(column).alias("key").unique()).filter(pl.col("key").is_in(stored))
            for column in own
        ]
    return pl.concat(keys).unique().drop_nulls().collect(engine="streaming")["key"]


def prune_vectors(workspace: Workspace, needed: pl.Series, dry_run: bool) -> tuple[int, int]:
    """Remove stored vectors whose key is not needed; the number of those, and of the others.

    A file with vectors of both kinds is replaced, after those that are needed are in another one.
    """
    unused, kept = _stored(workspace).unique("key"), needed.implode()
    counts = unused.select(pl.col("key").is_in(kept).alias("needed")).collect()["needed"]
    if dry_run or counts.all():
        return int((~counts).sum()), int(counts.sum())
    replaced, rows = [], []
    for place in workspace.places(VECTORS):
        file = pl.read_parquet(workspace.file(place))
        own = file.filter(pl.col("key").is_in(kept))
        if own.height < file.height:
            replaced.append(place)
            rows.append(own)
    moved = pl.concat(rows).unique("key", maintain_order=True)
    written = _write(workspace, moved) if moved.height else None
    for place in replaced:
        if place != written:
            workspace.remove(place)
    return int((~counts).sum()), int(counts.sum())


def load_vectors(
    workspace: Workspace, columns: Sequence[str], frames: Sequence[pl.LazyFrame]
) -> dict[str, VectorTable]:
    """The stored vectors that the keys in these columns of examples name, by column.

    Raises ProjectError for vectors that are not there, and for vectors of several lengths.
    """
    tables = {}
    for column in columns:
        named = pl.concat([frame.select(pl.col(column).cast(pl.Int64)) for frame in frames])
        keys = named.drop_nulls().unique().sort(column).collect(engine="streaming")[column]
        chosen = _stored(workspace).filter(pl.col("key").is_in(keys.implode()))
        found = chosen.unique("key").sort("key").collect(engine="streaming")
        if found.height < len(keys):
            raise ProjectError(
                f"{workspace.where(VECTORS)}: lacks {len(keys) - found.height:,} of "
                f"{len(keys):,} vectors that examples name in {column!r}; remove the examples, so "
                "that both are built again"
            )
        lengths = found["vector"].list.len().unique().sort().to_list()
        if len(lengths) > 1:
            raise ProjectError(
                f"features.embeddings ({column}): the examples' vectors have "
                f"{', '.join(map(str, lengths))} numbers; allowed: one length on all days, so that "
                "other embeddings need another column"
            )
        size = lengths[0] if lengths else 0
        vectors = np.full((found.height + 1, size), np.nan, np.float32)
        if found.height:
            vectors[1:] = found["vector"].explode().to_numpy().reshape(-1, size)
        tables[column] = VectorTable(found["key"].to_numpy(), vectors)
    return tables
