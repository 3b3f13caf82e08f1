"""Rows divided into blocks of whole users, so that memory does not grow with their number.

Partitions of large days are stored by ascending user. Parquet's statistics tell which row groups
have a user, so a process that works on a block reads little more than its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl

from mtl_ranker.workspace import Provenance, Workspace

ROW_GROUP = (8_192, 131_072)  # rows that are read together, at least and at most
SORTED_AT_ONCE = 4_000_000  # rows
BLOCK, ROW = "block of users", "row of the file"  # columns of temporary files


@dataclass(frozen=True)
class Block:
    """Rows of the users from `first` to `last`, both included.

    Attributes:
        rows: their number.
        everything: the block has all rows, and needs no filter.
    """

    first: Any
    last: Any
    rows: int
    everything: bool

    def of(self, rows: pl.LazyFrame) -> pl.LazyFrame:
        """Those of `rows` that belong to the block."""
        if self.everything:
            return rows
        return rows.filter(users_between(self.first, self.last))


def users_between(first: Any, last: Any) -> pl.Expr:
    """Whether a row's user lies in first..last, both included; ids are numbers or text."""
    return pl.col("user_id").is_between(pl.lit(first), pl.lit(last))  # bare text names a column


def joined(blocks: Sequence[Block]) -> Block:
    """Neighbouring blocks as one."""
    rows, everything = sum(b.rows for b in blocks), any(b.everything for b in blocks)
    return Block(blocks[0].first, blocks[-1].last, rows, everything)


def user_blocks(rows: pl.LazyFrame, size: int) -> list[Block]:
    """Divide rows into blocks of about `size`, by ascending user; no user is divided."""
    counts = rows.group_by("user_id").len().sort("user_id").collect(engine="streaming")
    if counts.is_empty():
        return []
    number = ((pl.col("len").cum_sum() - 1) // size).alias("block")
    blocks = (
        counts.group_by(number, maintain_order=True)
        .agg(
            pl.col("user_id").first().alias("first"),
            pl.col("user_id").last().alias("last"),
            pl.col("len").sum().alias("rows"),
        )
        .drop("block")
    )
    return [Block(**row, everything=blocks.height == 1) for row in blocks.iter_rows(named=True)]


def publish_by_user(
    workspace: Workspace,
    dataset: str,
    day: date,
    rows: pl.LazyFrame,
    provenance: Provenance,
    count: int,
) -> None:
    """`Workspace.publish` with the rows by ascending user; those of a user keep their order.

    Args:
        count: of the rows, at most. More than `SORTED_AT_ONCE` are sorted in parts.
    """
    group = min(max(count // 128, ROW_GROUP[0]), ROW_GROUP[1])
    if count <= SORTED_AT_ONCE:
        ordered = rows.sort("user_id", maintain_order=True)
        workspace.publish(dataset, day, ordered, provenance, row_group_size=group)
        return
    with (
        workspace.temporary_folder() as folder,
        sorted_by_user(rows, folder, SORTED_AT_ONCE) as ordered,
    ):
        workspace.publish(dataset, day, ordered, provenance, row_group_size=group)


@contextmanager
def sorted_by_user(rows: pl.LazyFrame, folder: Path, size: int) -> Iterator[pl.LazyFrame]:
    """The rows by ascending user, to be read within the context; a user's keep their order.

    All rows are written twice: as they come, and divided into blocks, which are then sorted one at
    a time.

    Args:
        folder: an empty one, for temporary files.
        size: of a block, in rows.
    """
    unsorted = folder / "unsorted.parquet"
    rows.sink_parquet(unsorted, compression="lz4", engine="streaming")
    scanned = pl.scan_parquet(unsorted, glob=False).with_row_index(ROW)
    blocks = user_blocks(scanned, size)
    if len(blocks) <= 1:
        yield _sorted(scanned)
        return
    dtype = scanned.collect_schema()["user_id"]
    firsts = pl.lit(pl.Series([block.first for block in blocks], dtype=dtype))
    number = firsts.search_sorted(pl.col("user_id"), side="right").alias(BLOCK)
    by_block = pl.PartitionBy(folder, key=BLOCK, include_key=False, approximate_bytes_per_file=None)
    scanned.with_columns(number).sink_parquet(by_block, compression="lz4", engine="streaming")
    unsorted.unlink()
    files = []
    for count in range(1, len(blocks) + 1):
        parts = sorted(folder.glob(f"*={count}/*.parquet"))
        files.append(folder / f"{count}.parquet")
        ordered = _sorted(pl.scan_parquet(parts, glob=False))
        ordered.sink_parquet(files[-1], compression="lz4", engine="streaming")
        for part in parts:
            part.unlink()
    yield pl.scan_parquet(files, glob=False)


def _sorted(rows: pl.LazyFrame) -> pl.LazyFrame:
    return rows.sort("user_id", ROW).drop(ROW)
