"""Candidate sets: given as Parquet files, or generated from the log.

A given set is a Parquet file, or a folder of days in the layout of the log (`log.partition`), or as
`date=YYYY-MM-DD`. Its columns are user and item, by the log's names or as `user_id` and `item_id`,
and those of `log.context`; a context column that it lacks is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import polars as pl

from mtl_ranker.config import Log, Project
from mtl_ranker.context import Context, Place
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.tables import read_as, scan_events, survives, tables_as_of
from mtl_ranker.logs.contract import outside, within
from mtl_ranker.logs.places import listed
from mtl_ranker.logs.sources import (
    day_folders,
    parquet_files,
    parquet_schema,
    scan_files,
    shown_layout,
)

EVIDENCE = 500_000  # rows of a day from which it is read what context depends on
LESS = 0.8  # share of the variation within a user, below which that within an item is smaller
CONSTANT = 0.05  # share of the variation, up to which context is the same within a request
TOGETHER = 0.5  # share of impressions in requests of several, for that to be judged


def prepared_candidates(context: Context, day: date, checked: bool = False) -> pl.LazyFrame:
    """The eligible candidates of day D in the log's types, with every context column.

    Raises ProjectError as `load_candidates` does, and for a value that cannot be cast; with
    `checked` the rows are not validated again.
    """
    project = context.project
    candidates = load_candidates(context, day, checked)
    schema = published_types(context)
    candidates = cast_keys(candidates, schema, day, project.log.context, checked)
    for column in project.log.context:
        if column not in candidates.collect_schema():
            candidates = candidates.with_columns(pl.lit(None, schema[column]).alias(column))
    if not checked:
        _check_ranges(project, candidates, day)
    if project.scoring.candidates is not None:
        candidates = _only_eligible(context, day, candidates)
    return candidates


def _only_eligible(context: Context, day: date, rows: pl.LazyFrame) -> pl.LazyFrame:
    """The rows whose items have a true value in `scoring.eligible` on the day, in their order."""
    project, column = context.project, context.project.scoring.eligible
    if column is None:
        return rows
    assert project.log.items is not None
    flags = project.log.items.model_copy(
        update={"columns": [column], "lists": {}, "published": None}
    )
    log = project.log.model_copy(update={"items": flags})
    table = context.source.with_log(log).table("items", day)
    assert table is not None
    dtype = table.collect_schema()[column]
    if not (dtype == pl.Boolean or dtype.is_integer()):
        raise ProjectError(
            f"{context.source.root / flags.path}: column {column!r} (scoring.eligible) is {dtype}; "
            "allowed: Boolean, or 1 and 0"
        )
    key = rows.collect_schema()["item_id"]
    items = table.filter(pl.col(column).cast(pl.Boolean)).select(
        pl.col("item_id").cast(key, strict=False), pl.lit(True).alias("eligible item")
    )
    joined = rows.join(items, on="item_id", how="left", maintain_order="left")
    return joined.filter(pl.col("eligible item")).drop("eligible item")


def _check_ranges(project: Project, candidates: pl.LazyFrame, day: date) -> None:
    """Raise ProjectError for a context value that `[log.ranges]` would quarantine in the log."""
    for column in project.log.context:
        allowed = project.log.ranges.get(column)
        if allowed is None:
            continue
        wrong = candidates.filter(~within(pl.col(column), allowed)).select(column)
        found = wrong.select(pl.len(), pl.col(column).head(3).implode()).collect()
        count, examples = found.row(0)
        if count:
            raise ProjectError(
                f"candidates of {day}: column {column!r} holds {examples} in {count:,} rows, "
                f"{outside(allowed)} (log.ranges.{column})"
            )


def load_candidates(context: Context, day: date, checked: bool = False) -> pl.LazyFrame:
    """The candidate set of day D: given (the day's folder or one file), or generated.

    Raises ProjectError if a given set is missing or unreadable, or lacks a column, a user or an
    item; with `checked` the rows are not validated again.
    """
    project, source = context.project, context.source
    given = project.scoring.candidates
    if given is None:
        return generate_candidates(context, day)
    path = source.root / given
    files = candidate_files(context, day)
    if not files:
        layout = _layout(context).layout or ""
        path = path / day.strftime(layout) if path.is_dir() else path
        raise ProjectError(f"{path}: no candidate set for {day} (scoring.candidates = {given!r})")
    path = files[0] if len(files) == 1 else files[0].parent
    own = {project.log.user, project.log.item, "user_id", "item_id", *project.log.context}
    lazy = scan_files(files, own)
    columns = lazy.collect_schema().names()
    for key, column in (("user_id", project.log.user), ("item_id", project.log.item)):
        if key != column and {key, column} <= set(columns):
            raise ProjectError(f"{path}: has both {column!r} and {key!r}; allowed: one of them")
    renames = {project.log.user: "user_id", project.log.item: "item_id"}
    lazy = lazy.rename({c: r for c, r in renames.items() if c in columns and c != r})
    columns = lazy.collect_schema().names()
    for key, column in (("user_id", project.log.user), ("item_id", project.log.item)):
        if key not in columns:
            raise ProjectError(
                f"{path}: column {column!r} (the {key.removesuffix('_id')}) is missing; "
                f"it has: {', '.join(parquet_schema(files[0]).names())}"
            )
    if checked:
        return lazy
    incomplete = (
        lazy.select(pl.col("user_id").null_count() + pl.col("item_id").null_count())
        .collect()
        .item()
    )
    if incomplete:
        raise ProjectError(f"{path}: {incomplete} rows lack a user or an item; allowed: none")
    return lazy


def describe_candidates(context: Context, day: date) -> str:
    """How many candidates a given set has, and how many of its users and items are unknown.

    Unknown ones have no event in the days of the longest window, as unknown values of context
    columns, floating-point numbers apart. Raises ProjectError as
    `prepared_candidates` does.
    """
    project, workspace = context.project, context.workspace
    rows = prepared_candidates(context, day)
    longest = project.features.windows[-1]
    known = [d for d in workspace.days("events") if 0 < (day - d).days <= longest]
    counts = []
    for key in ("user_id", "item_id"):
        own = rows.select(key).unique()
        unknown = own.join(workspace.scan("events", known), on=key, how="anti") if known else own
        counts += [own.select(pl.len()), unknown.select(pl.len())]
    frames = pl.collect_all([rows.select(pl.len()), *counts], engine="streaming")
    total, users, new_users, items, new_items = (frame.item() for frame in frames)
    text = (
        f"{total:,} candidates of {users:,} users and {items:,} items for {day}; without an "
        f"event in the last {longest} days: {new_users:,} users, {new_items:,} items"
    )
    if known:
        latest = workspace.scan("events", known[-1:])
        text += f"; of {known[-1]}'s events {_covered(latest, rows, 'user_id')} have a user and "
        text += f"{_covered(latest, rows, 'item_id')} an item among them"
    if project.scoring.eligible is not None:
        whole = load_candidates(context, day, checked=True).select(pl.len()).collect().item()
        text += f"; {whole - total:,} more are of items that are not {project.scoring.eligible}"
    text += "".join(_unknown_context(context, rows, known))
    log = project.log
    tables = log.joined_columns
    given = {n for file in candidate_files(context, day) for n in parquet_schema(file).names()}
    ignored = sorted((given & tables) - set(log.context))
    if ignored:
        text += f"; columns taken from the user and item tables instead: {', '.join(ignored)}"
    return text


def _covered(events: pl.LazyFrame, candidates: pl.LazyFrame, key: str) -> str:
    """The share of a day's events whose user or item the candidates have."""
    found = events.join(candidates.select(key).unique(), on=key, how="semi").select(pl.len())
    counts = pl.collect_all([found, events.select(pl.len())], engine="streaming")
    having, whole = (frame.item() for frame in counts)
    return f"{having / max(1, whole):.0%}"


def _unknown_context(context: Context, rows: pl.LazyFrame, known: list[date]) -> Iterator[str]:
    """For each context column with values that no event of these days has, how many rows do."""
    schema = rows.collect_schema()
    for column in context.project.log.context:
        if not known or schema[column].is_float():
            continue
        seen = context.workspace.scan("events", known).select(column)
        new = rows.filter(pl.col(column).is_not_null()).join(seen, on=column, how="anti")
        examples = pl.col(column).unique().sort().head(3).cast(pl.String).implode()
        count, values = new.select(pl.len(), examples).collect().row(0)
        if count:
            yield f"; {count:,} rows with a {column} that no event has ({', '.join(values)})"


def candidate_files(context: Context, day: date) -> list[Place]:
    """The files of day D's given candidate set; empty if none is configured or found."""
    project, source = context.project, context.source
    if project.scoring.candidates is None:
        return []
    path = listed(source.root / project.scoring.candidates)
    if path.is_dir():
        folder = day_folders(path, _layout(context)).get(day)
        return [] if folder is None else parquet_files(folder)
    return [file for file in parquet_files(path) if file.is_file()]


def _layout(context: Context) -> Log:
    """Settings whose `partition` is that of the candidates: the log's, or date=YYYY-MM-DD."""
    log = context.project.log
    path = context.source.root / (context.project.scoring.candidates or "")
    if log.layout is not None and (log.layout.startswith("date=") or not any(path.glob("date=*"))):
        return log
    return log.model_copy(update={"partition": "date"})


def candidate_days(context: Context) -> list[date]:
    """Days with a candidate set in the folder `scoring.candidates`, ascending.

    Raises ProjectError if it is not set, is no folder, or holds a folder that names no day.
    """
    project, source = context.project, context.source
    if project.scoring.candidates is None:
        raise ProjectError("scoring.candidates: not set, so no new candidate sets can be found")
    folder, layout = listed(source.root / project.scoring.candidates), _layout(context)
    if not folder.is_dir():
        raise ProjectError(f"{folder}: no folder of {shown_layout(layout)} (scoring.candidates)")
    return sorted(day for day, own in day_folders(folder, layout).items() if parquet_files(own))


def check_candidates(context: Context, day: date) -> None:
    """Raise ProjectError for a given set of day D that breaks the contract; a missing one may.

    Columns, their types and missing users or items are looked at, which takes little time. Values
    are checked by `prepared_candidates`, which needs published events.
    """
    if not candidate_files(context, day):
        return
    candidates = load_candidates(context, day)
    schema = candidates.collect_schema()
    for key in ("user_id", "item_id"):
        _check_kind(day, key, schema[key], "an integer or String")


def _check_kind(day: date, column: str, dtype: pl.DataType, known: str) -> None:
    """Raise ProjectError for a type of a candidate's column that cannot be the log's."""
    if not (dtype.is_numeric() or dtype in (pl.String, pl.Null)):
        raise ProjectError(
            f"candidates of {day}: column {column!r} is {dtype}, but it is {known} in "
            "the log; allowed: a number or String"
        )


def generate_candidates(context: Context, day: date) -> pl.LazyFrame:
    """Users of the last day before D × the eligible items most shown on the last three days.

    Context columns have each user's most frequent value of that day. Those that depend on the item,
    such as a price (`generated_context`), have the value of the item table, or else of the item's
    last impression of the three days. Raises ProjectError if no events before D are published.
    """
    project = context.project
    last, recent = _recent_events(context, day)
    sources = generated_context(context, day)
    of_table = [s.column for s in sources if s.of == "item table"]
    of_item = [s.column for s in sources if s.of == "item"]
    modes = [pl.col(s.column).drop_nulls().mode().sort().first() for s in sources if s.of == "user"]
    users = last.group_by("user_id").agg(pl.len().alias("impressions"), *modes)
    users = users.sort(["impressions", "user_id"], descending=[True, False]).drop("impressions")
    if project.scoring.generated_users is not None:
        users = users.head(project.scoring.generated_users)
    latest = [pl.col(c).sort_by("timestamp", "user_id").drop_nulls().last() for c in of_item]
    items = recent.group_by("item_id").agg(pl.len().alias("impressions"), *latest)
    items = items.sort(["impressions", "item_id"], descending=[True, False]).drop("impressions")
    items = _only_eligible(context, day, items).head(project.scoring.generated_items)
    if of_table:
        types = recent.collect_schema()
        table = tables_as_of(context.source, day)["item_id"].select("item_id", *of_table)
        table = table.cast({c: types[c] for c in ("item_id", *of_table)}, strict=False)
        items = items.join(table, on="item_id", how="left", maintain_order="left")
    # Without `maintain_order` polars drops the sorts; other blocks then change scores by rounding.
    return users.join(items, how="cross", maintain_order="left_right")


def _recent_events(context: Context, day: date) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """Events of the last published day before D, and of the last three days."""
    before = [d for d in context.workspace.days("events") if d < day]
    if not before:
        raise ProjectError(f"no events before {day} are published, so no candidates can be made")
    days = [d for d in before if day - d <= timedelta(days=3)] or before
    return scan_events(context, before[-1:]), scan_events(context, days)


@dataclass(frozen=True)
class ContextSource:
    """Where generated candidates have a context column from.

    Attributes:
        of: "user", "item" or "item table".
        doubtful: whether it depends on the item, and on more than the item.
    """

    column: str
    of: str
    doubtful: bool = False


def generated_context(context: Context, day: date) -> list[ContextSource]:
    """Where the candidates that are generated for day D have each context column from.

    A column of the item table too is the table's. Otherwise it depends on the item if it varies
    within a request (a value of `log.request`, or one user and moment). Where most impressions are
    alone in their request, it does if it varies less within an item than within a user. Variation
    is the variance of floating-point numbers, and of other values the probability that two
    impressions have different ones.
    """
    log, (last, _) = context.project.log, _recent_events(context, day)
    table = set(log.items.joined) if log.items is not None else set()
    schema = last.collect_schema()
    judged = [c for c in log.context if c not in table and not schema[c].is_nested()]
    request = [log.request] if log.request is not None else ["user_id", "timestamp"]
    keys: dict[str, list[str]] = {"user": ["user_id"], "item": ["item_id"], "request": request}
    measures = [pl.len().over(request).gt(1).mean().alias("together")]
    for column in judged:
        number = schema[column].is_float()
        for name, key in (("all", []), *keys.items()):
            measures.append(_variation(column, key, number).alias(f"{name} {column}"))
    found = last.head(EVIDENCE).select(measures).collect().row(0, named=True)
    sources = []
    for column in log.context:
        if column not in judged:
            sources.append(ContextSource(column, "item table" if column in table else "user"))
            continue
        whole, user, item = (found[f"{name} {column}"] or 0.0 for name in ("all", "user", "item"))
        if (found["together"] or 0.0) > TOGETHER:
            of_item = (found[f"request {column}"] or 0.0) > CONSTANT * whole
        else:
            of_item = item < LESS * user
        doubtful = of_item and item > whole / 2
        sources.append(ContextSource(column, "item" if of_item else "user", doubtful))
    return sources


def _variation(column: str, key: Sequence[str], number: bool) -> pl.Expr:
    """Mean variation of a column over the rows of groups of several rows."""

    def over(value: pl.Expr, further: Sequence[str] = ()) -> pl.Expr:
        groups = [*key, *further]
        return value.over(groups) if groups else value

    if number:
        return over(pl.col(column).var()).mean()
    others = over(pl.len()).cast(pl.Float64) - 1
    same = over(pl.len(), [column]).cast(pl.Float64) - 1
    return pl.when(others > 0).then(1 - same / others).mean()


def describe_generated(context: Context, day: date) -> Iterator[str]:
    """What context the candidates that are generated for day D have, and what would be better."""
    sources = generated_context(context, day)
    by = {of: [s.column for s in sources if s.of == of] for of in ("user", "item", "item table")}
    parts = [
        f"{', '.join(by[of])} {of_what}"
        for of, of_what in (
            ("user", "as most frequent of the user"),
            ("item", "of the item's last impression"),
            ("item table", "of the item table"),
        )
        if by[of]
    ]
    yield f"generated from the log{': ' if parts else ''}{'; '.join(parts)}"
    for source in sources:
        if source.doubtful:
            yield (
                f"warning: log.context: {source.column!r} depends on the item and on other things, "
                "so the value of the item's last impression may be wrong for a candidate; provide "
                "candidates with this column (scoring.candidates), or add it to log.items.columns"
            )


def columns_read(project: Project) -> set[str]:
    """The columns of a candidate set that are used if they exist.

    All other features are of the user and item tables, and of the days before.
    """
    return {"user_id", "item_id", *project.log.context}


def cast_keys(
    candidates: pl.LazyFrame,
    events: pl.Schema,
    day: date,
    context: Sequence[str] = (),
    checked: bool = False,
) -> pl.LazyFrame:
    """Candidates with user, item and context in the log's types.

    Args:
        events: the columns of published events.

    Raises ProjectError for a value that cannot be cast, unless `checked`.
    """
    given = candidates.collect_schema()
    for key in ("user_id", "item_id", *(c for c in context if c in given)):
        if events[key] == given[key]:
            continue
        cast = read_as(key, given[key], events[key])
        if checked:
            candidates = candidates.with_columns(cast)
            continue
        _check_kind(day, key, given[key], str(events[key]))
        same = survives(key, given[key], events[key])
        invalid = candidates.filter(pl.col(key).is_not_null() & ~same).select(key)
        examples = invalid.head(3).collect()[key].to_list()
        if examples:
            raise ProjectError(
                f"candidates of {day}: column {key!r} is {given[key]} and holds {examples}, "
                f"but it is {events[key]} in the log"
            )
        candidates = candidates.with_columns(cast)
    return candidates


def published_types(context: Context) -> pl.Schema:
    """Columns of published events; a context column that no day has is text.

    Raises ProjectError without published events.
    """
    days = context.workspace.days("events")
    if not days:
        raise ProjectError(
            "no events are published, which define the types of candidates; run "
            "`mtl-ranker ingest` first"
        )
    schema = scan_events(context, days[-1:]).collect_schema()
    missing = [name for name in context.project.log.context if name not in schema]
    return pl.Schema({**schema, **dict.fromkeys(missing, pl.String())})
