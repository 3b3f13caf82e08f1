"""The static user and item tables, joined to rows."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from mtl_ranker.context import Source


def static_tables(source: Source) -> dict[str, pl.LazyFrame]:
    """The user and the item table by their key, where the project has them."""
    tables = {"user_id": source.table("users"), "item_id": source.table("items")}
    return {key: table for key, table in tables.items() if table is not None}


def join_tables(tables: Mapping[str, pl.LazyFrame], rows: pl.LazyFrame) -> pl.LazyFrame:
    """Join rows to the static user and item tables.

    A table is skipped where the rows have no column of its key. A column that the rows have already
    is not replaced.
    """
    for key, table in tables.items():
        schema = rows.collect_schema()
        if key not in schema:
            continue
        new = [c for c in table.collect_schema().names() if c == key or c not in schema]
        rows = rows.join(table.select(new).cast({key: schema[key]}), on=key, how="left")
    return rows
