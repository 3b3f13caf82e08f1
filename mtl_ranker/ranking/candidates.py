"""Candidate sets: given as Parquet files, or generated from the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from pathlib import Path

import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.tables import read_as, scan_events, survives
from mtl_ranker.logs.contract import outside, within
from mtl_ranker.logs.sources import parquet_files, parquet_schema, scan_files


def prepared_candidates(context: Context, day: date, checked: bool = False) -> pl.LazyFrame:
    """The candidate set of day D in the log's types, with every context column.

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
    return candidates


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
    """The candidate set of day D: given (folder date=D or one file), or generated from the log.

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
        path = path / f"date={day}" if path.is_dir() else path
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
    text += "".join(_unknown_context(context, rows, known))
    log = project.log
    tables = {name for table in (log.users, log.items) if table for name in table.joined}
    given = {n for file in candidate_files(context, day) for n in parquet_schema(file).names()}
    ignored = sorted((given & tables) - set(log.context))
    if ignored:
        text += f"; columns taken from the user and item tables instead: {', '.join(ignored)}"
    return text


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


def candidate_files(context: Context, day: date) -> list[Path]:
    """The files of day D's given candidate set; empty if none is configured or found."""
    project, source = context.project, context.source
    if project.scoring.candidates is None:
        return []
    path = source.root / project.scoring.candidates
    if path.is_dir():
        path = path / f"date={day}"
    files = parquet_files(path)
    return [file for file in files if file.is_file()]


def candidate_days(context: Context) -> list[date]:
    """Days with a candidate set in the folder `scoring.candidates`, ascending.

    Raises ProjectError if it is not set, is no folder, or holds a folder that names no day.
    """
    project, source = context.project, context.source
    if project.scoring.candidates is None:
        raise ProjectError("scoring.candidates: not set, so no new candidate sets can be found")
    folder = source.root / project.scoring.candidates
    if not folder.is_dir():
        raise ProjectError(f"{folder}: no folder of date=YYYY-MM-DD (scoring.candidates)")
    days = []
    for partition in folder.glob("date=*"):
        try:
            days.append(date.fromisoformat(partition.name.removeprefix("date=")))
        except ValueError as error:
            raise ProjectError(f"{partition}: expected date=YYYY-MM-DD") from error
    return sorted(day for day in days if candidate_files(context, day))


def generate_candidates(context: Context, day: date) -> pl.LazyFrame:
    """Users of the last day before D × the items with most impressions on the last three days.

    Context columns have each user's most frequent value of that day, except numbers that depend
    on the item, such as a price (`_item_context`): they have the item's median of the three days.
    Raises ProjectError if no events before D are published.
    """
    project, workspace = context.project, context.workspace
    before = [d for d in workspace.days("events") if d < day]
    if not before:
        raise ProjectError(f"no events before {day} are published, so no candidates can be made")
    last = scan_events(context, before[-1:])
    recent = workspace.scan("events", [d for d in before if day - d <= timedelta(days=3)] or before)
    of_item = _item_context(last, project.log.context)
    modes = [pl.col(c).mode().sort().first() for c in project.log.context if c not in of_item]
    users = last.group_by("user_id").agg(pl.len().alias("impressions"), *modes)
    users = users.sort(["impressions", "user_id"], descending=[True, False]).drop("impressions")
    if project.scoring.generated_users is not None:
        users = users.head(project.scoring.generated_users)
    typical = [pl.col(c).median() for c in of_item]
    items = recent.group_by("item_id").agg(pl.len().alias("impressions"), *typical)
    items = items.sort(["impressions", "item_id"], descending=[True, False]).drop("impressions")
    items = items.head(project.scoring.generated_items)
    # Without `maintain_order` polars drops the sorts; other blocks then change scores by rounding.
    return users.join(items, how="cross", maintain_order="left_right")


def _item_context(rows: pl.LazyFrame, context: Sequence[str]) -> list[str]:
    """Floating-point context columns that vary less within an item than within a user.

    The measure is the mean over rows of the squared deviation from the mean of the row's item, or
    user.
    """
    schema = rows.collect_schema()
    numbers = [c for c in context if schema.get(c, pl.Null()).is_float()]
    if not numbers:
        return []
    within = [
        ((pl.col(c) - pl.col(c).mean().over(key)) ** 2).mean().alias(f"{key} {c}")
        for c in numbers
        for key in ("user_id", "item_id")
    ]
    found = rows.select(within).collect().row(0, named=True)
    return [c for c in numbers if (found[f"item_id {c}"] or 0.0) < (found[f"user_id {c}"] or 0.0)]


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
        if not (given[key].is_numeric() or given[key] in (pl.String, pl.Null)):
            raise ProjectError(
                f"candidates of {day}: column {key!r} is {given[key]}, but it is {events[key]} in "
                "the log; allowed: a number or String"
            )
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
    """Columns of published events; a context column that no day has is text."""
    schema = scan_events(context, context.workspace.days("events")[-1:]).collect_schema()
    missing = [name for name in context.project.log.context if name not in schema]
    return pl.Schema({**schema, **dict.fromkeys(missing, pl.String())})
