"""Rows divided into blocks of whole users, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl


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
