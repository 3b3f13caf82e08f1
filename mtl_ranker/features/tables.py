"""The static user and item tables, joined to rows."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

import polars as pl

from mtl_ranker.context import Context, Source
from mtl_ranker.logs.contract import used_columns


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


def scan_events(context: Context, days: list[date]) -> pl.LazyFrame:
    """Published events with every column that the project's settings read.

    A column that the log does not have any more is null; it takes the type of the latest day that
    has it.
    """
    workspace = context.workspace
    rows = workspace.scan("events", days)
    have = set(rows.collect_schema())
    tables = static_tables(context.source)
    have |= {name for table in tables.values() for name in table.collect_schema()}
    missing = used_columns(context.project) - have
    if not missing:
        return rows
    types: dict[str, pl.DataType] = {}
    for day in reversed(workspace.days("events")):
        schema = workspace.scan("events", [day]).collect_schema()
        types = {name: schema[name] for name in missing if name in schema} | types
        if missing <= set(types):
            break
    return rows.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in types.items())
