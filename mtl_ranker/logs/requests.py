"""A log of one row a request as one row an impression.

MIND (Wu et al., ACL 2020), EB-NeRD (Kruse et al., RecSys Challenge 2024) and ranking events are
such logs: a row has the list of items that were shown, and the list of those that were clicked.
"""

from __future__ import annotations

import re

import polars as pl

from mtl_ranker.config import REQUEST, STRAY, UNEVEN, Log, Requests
from mtl_ranker.errors import ProjectError

SHOWN, CLICKED = "items shown", "items clicked"  # columns while requests are divided
COUNT, PLACE = "number of items", "place of the item"


def shown_items(rows: pl.LazyFrame, log: Log, place: str) -> pl.LazyFrame:
    """One row for each item of a request, in the order of its list.

    Columns of the request are repeated. Further columns are `log.item`, `log.position` (from 1, in
    the order of the list, unless `requests.per_item` names it), `log.request` (the number of the
    row where the log has no id), `requests.label` (Int64) and `STRAY`; for each
    list of `requests.per_item` one with `UNEVEN`. The lists are left out. A
    clicked item that the request does not have is a row of its own, for the contract to refuse. A
    request without items has no row.

    Args:
        log: with `requests`.
        place: the file, for messages.

    Raises ProjectError for a list that is missing or of a wrong type, and where the log has a
    column of a name that is made.
    """
    requests = log.requests
    assert requests is not None
    schema = rows.collect_schema()
    _check_columns(schema, log, requests, place)
    if log.request == REQUEST and REQUEST not in schema:
        rows = rows.with_row_index(REQUEST).with_columns(pl.col(REQUEST).cast(pl.Int64))
    shown = _values(requests.items, schema, requests)
    rows = rows.with_columns(shown.alias(SHOWN))
    inner = pl.List(rows.collect_schema()[SHOWN].inner)  # type: ignore[attr-defined]
    clicked = pl.lit(None, inner)
    if requests.clicked is not None:
        clicked = _values(requests.clicked, schema, requests).cast(inner)
    stray = clicked.fill_null([]).list.set_difference(pl.col(SHOWN).fill_null([]))
    rows = rows.with_columns(clicked.alias(CLICKED), pl.col(SHOWN).list.len().alias(COUNT))
    together = pl.col(SHOWN).fill_null([]).list.concat(stray)
    rows = rows.with_columns(together.alias(SHOWN))
    whole = pl.col(SHOWN).list.len()
    uneven = []
    for name in requests.per_item:  # a list that is null or empty has no values
        length = pl.col(name).cast(pl.List(_inner(schema[name]))).list.len()
        is_uneven = (length > 0) & (length != pl.col(COUNT))
        uneven.append(is_uneven.fill_null(False).alias(f"{name}{UNEVEN}"))
    rows = rows.with_columns(uneven)
    values = [
        pl.col(name)
        .cast(pl.List(_inner(schema[name])))
        .fill_null([])
        .list.gather(pl.int_ranges(0, whole), null_on_oob=True)
        for name in requests.per_item
    ]
    rows = rows.with_columns(pl.int_ranges(1, whole + 1).alias(PLACE), *values)
    rows = rows.explode(SHOWN, PLACE, *requests.per_item)
    is_stray = pl.col(PLACE) > pl.col(COUNT).fill_null(0)
    hit = pl.col(SHOWN).is_in(pl.col(CLICKED)).cast(pl.Int64)
    item, label = pl.col(SHOWN), pl.when(~is_stray).then(hit).otherwise(None)
    if requests.mark is not None:
        item, label = _marked(requests.mark)
    made = [item.alias(log.item), is_stray.alias(STRAY)]
    made += [pl.col(f"{name}{UNEVEN}") for name in requests.per_item]
    if requests.labelled:
        made.append(label.alias(requests.label))
    if log.position is not None and log.position not in requests.per_item:
        made.append(pl.when(~is_stray).then(pl.col(PLACE)).alias(log.position))
    names = {requests.items, requests.clicked, *requests.per_item}
    kept = [name for name in schema if name not in names]
    kept += [REQUEST] if log.request == REQUEST and REQUEST not in schema else []
    return rows.select(*kept, *requests.per_item, *made)


def _check_columns(schema: pl.Schema, log: Log, requests: Requests, place: str) -> None:
    """Raise ProjectError for lists that are missing or of a wrong type, and for names in use."""
    named = {"items": [requests.items], "clicked": [], "per_item": requests.per_item}
    if requests.clicked is not None:
        named["clicked"] = [requests.clicked]
    for setting, columns in named.items():
        for column in columns:
            if column not in schema:
                raise ProjectError(
                    f"{place}: column {column!r} (named by log.requests.{setting}) is missing; it "
                    f"has: {', '.join(schema.names())}"
                )
            dtype = schema[column]
            text = dtype == pl.String and setting != "per_item"
            if not (text or dtype == pl.Null or isinstance(dtype, pl.List)):
                allowed = "a list" if setting == "per_item" else "a list, or text with a separator"
                raise ProjectError(
                    f"{place}: column {column!r} (log.requests.{setting}) is {dtype}; allowed: "
                    f"{allowed}"
                )
    if requests.mark is not None and schema[requests.items] != pl.String:
        raise ProjectError(
            f"{place}: column {requests.items!r} (log.requests.items) is "
            f"{schema[requests.items]}; allowed with log.requests.mark: text"
        )
    kinds = [_values_type(schema[c]) for c in (requests.items, requests.clicked) if c is not None]
    if len({dtype for dtype in kinds if dtype != pl.Null}) > 1:
        raise ProjectError(
            f"{place}: {requests.items!r} holds {kinds[0]} and {requests.clicked!r} holds "
            f"{kinds[1]} (log.requests); allowed: ids of one type"
        )
    lists = {requests.items, requests.clicked, *requests.per_item}
    made = {"item": log.item, "position": log.position, "requests.label": requests.label}
    if not requests.labelled:
        del made["requests.label"]
    for setting, name in made.items():
        if name in schema and name not in lists:
            raise ProjectError(
                f"{place}: has a column {name!r} beside the lists of log.requests, of which "
                f"log.{setting} makes one of that name; allowed: log.{setting} of another name"
            )


def _inner(dtype: pl.DataType) -> pl.DataType:
    return dtype.inner if isinstance(dtype, pl.List) else pl.Null()  # type: ignore[return-value]


def _values_type(dtype: pl.DataType) -> pl.DataType:
    """The type of the values of a list, native or text."""
    return pl.String() if dtype == pl.String else _inner(dtype)


def _values(column: str, schema: pl.Schema, requests: Requests) -> pl.Expr:
    """A list of values; missing where the column's value is."""
    if schema[column] == pl.Null:
        return pl.lit(None, pl.List(pl.Null))
    if schema[column] != pl.String:
        return pl.col(column)
    value = pl.element().str.strip_chars()
    return pl.col(column).str.split(requests.separator).list.eval(value.filter(value != ""))


def _marked(mark: str) -> tuple[pl.Expr, pl.Expr]:
    """Item and label of texts such as N55689-1; the label of a text without a mark is missing."""
    parts = rf"^(.*){re.escape(mark)}(.*)$"
    item = pl.coalesce(pl.col(SHOWN).str.extract(parts, 1), pl.col(SHOWN))
    return item, pl.col(SHOWN).str.extract(parts, 2).cast(pl.Int64, strict=False)
