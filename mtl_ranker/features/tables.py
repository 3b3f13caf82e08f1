"""The user and item tables as of a day, joined to rows."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from datetime import date, timedelta

import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context, Source
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.contract import used_columns
from mtl_ranker.workspace import fingerprint


def tables_as_of(source: Source, day: date) -> dict[str, pl.LazyFrame]:
    """The user and the item table by their key, where the project has them.

    Args:
        day: D, at whose start the values are known.
    """
    tables = {"user_id": source.table("users", day), "item_id": source.table("items", day)}
    return {key: table for key, table in tables.items() if table is not None}


def join_tables(tables: Mapping[str, pl.LazyFrame], rows: pl.LazyFrame) -> pl.LazyFrame:
    """Join rows to user and item tables.

    A table is skipped where the rows have no column of its key. A column that the rows have already
    is not replaced.
    """
    for key, table in tables.items():
        schema = rows.collect_schema()
        if key not in schema:
            continue
        rows = rows.join(new_columns(table, [key], schema), on=key, how="left")
    return rows


def new_columns(
    table: pl.LazyFrame, keys: Sequence[str], schema: Mapping[str, pl.DataType]
) -> pl.LazyFrame:
    """A table with its keys in the types of rows to be joined, and the columns they do not have.

    Args:
        schema: of the rows.
    """
    new = [c for c in table.collect_schema().names() if c in keys or c not in schema]
    return table.select(new).cast({key: schema[key] for key in keys})


def local_date(project: Project) -> pl.Expr:
    """The date of an event's timestamp in the log's time zone."""
    return pl.col("timestamp").dt.convert_time_zone(project.log.timezone).dt.date()


def tables_fingerprint(context: Context, day: date) -> str:
    """Hash of the rows of the user and item tables that the day's events join.

    Rows of other users and items do not count, so a refreshed table affects only the days whose
    rows have changed, and a snapshot only the days that use it.
    """
    source, workspace, log = context.source, context.workspace, context.project.log
    seen = [day]
    if log.day_tolerance_hours and any(t is not None and t.dated for t in (log.users, log.items)):
        seen.append(day - timedelta(days=1))  # of events with a timestamp of the day before
    state = [text for own in seen for text in source.tables_state(own)]
    events = workspace.published_fingerprint("events", day)
    if not state or events is None:
        return fingerprint(*state)

    def rows_digest() -> str:
        rows = workspace.scan("events", [day])
        digest = hashlib.sha256()
        for key, table in [pair for own in seen for pair in tables_as_of(source, own).items()]:
            keys, dtype = rows.select(key).unique(), rows.collect_schema()[key]
            check_table_keys(context, key, table, dtype)
            joined = table.cast({key: dtype}).join(keys, on=key, how="semi")
            content = io.BytesIO()
            joined.sort(key).collect().rechunk().write_ipc(content, compression="uncompressed")
            digest.update(content.getbuffer())
        return digest.hexdigest()

    subject = fingerprint("table rows", day, log.users, log.items)
    return workspace.cached(subject, fingerprint(events, *state), rows_digest)


def check_table_keys(context: Context, key: str, table: pl.LazyFrame, dtype: pl.DataType) -> None:
    """Raise ProjectError unless every key of a table can be read as an id of the log's type."""
    own = table.collect_schema()[key]
    if own == dtype or (own.is_integer() and dtype.is_integer()):
        return
    lost = table.filter(pl.col(key).is_not_null() & ~survives(key, own, dtype))
    examples = lost.select(key).head(3).collect()[key].to_list()
    if examples or not (own.is_integer() or own == pl.String):
        which = "users" if key == "user_id" else "items"
        settings = getattr(context.project.log, which)
        column = getattr(context.project.log, key.removesuffix("_id"))
        raise ProjectError(
            f"{context.source.root / settings.path}: key {settings.key!r} (log.{which}.key) is "
            f"{own} and holds {examples}, but {column!r} in the log is {dtype}; allowed: ids of "
            "one kind, whole numbers or text"
        )


def read_as(column: str, given: pl.DataType, dtype: pl.DataType) -> pl.Expr:
    """A column in another type, null where that is not possible.

    Text may be a date or a time. Whole floating-point numbers are text as integers are.
    """
    value = pl.col(column)
    if given == pl.String and dtype == pl.Date:
        return value.str.to_date(strict=False)
    if given == pl.String and isinstance(dtype, pl.Datetime):
        zone = dtype.time_zone
        return value.str.to_datetime(strict=False, time_unit=dtype.time_unit, time_zone=zone)
    if given.is_float() and dtype == pl.String:  # an id as 7.0, from a column with missing values
        whole = value.cast(pl.Int64, strict=False)
        return pl.when(whole.cast(given) == value).then(whole).cast(pl.String)
    return value.cast(dtype, strict=False)


def survives(column: str, given: pl.DataType, dtype: pl.DataType) -> pl.Expr:
    """Whether a value is the same after a cast to `dtype` and back: 1.9 is not user 1."""
    cast = read_as(column, given, dtype)
    if given == pl.String and dtype.is_temporal():
        return cast.is_not_null()
    same = (cast.cast(given, strict=False) == pl.col(column)).fill_null(False)
    if given.is_float() and dtype.is_integer():
        same &= pl.col(column).abs() <= 2**53  # beyond, floats do not hold every integer
    return same


def scan_events(context: Context, days: list[date]) -> pl.LazyFrame:
    """Published events with every column that the project's settings read.

    A column that the log does not have any more is null; it takes the type of the latest day that
    has it.
    """
    workspace = context.workspace
    rows = workspace.scan("events", days)
    log = context.project.log
    # Of another scan: polars does not skip row groups for a row index on one with a known schema.
    have = set(workspace.scan("events", days).collect_schema())
    missing = used_columns(context.project) - have - log.joined_columns
    if not missing:
        return rows
    types: dict[str, pl.DataType] = {}
    for day in reversed(workspace.days("events")):
        schema = workspace.scan("events", [day]).collect_schema()
        types = {name: schema[name] for name in missing if name in schema} | types
        if missing <= set(types):
            break
    return rows.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in types.items())
