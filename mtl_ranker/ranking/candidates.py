"""Candidate sets: given as Parquet, or made from the log."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.columns import feature_columns
from mtl_ranker.workspace import Workspace


def prepared_candidates(context: Context, day: date, checked: bool = False) -> pl.LazyFrame:
    """The candidate set of day D with the log's types, and with every context column.

    Raises ProjectError as `load_candidates` does, and for a value that has no such form; not for
    rows that were `checked` before.
    """
    project, workspace = context.project, context.workspace
    candidates = load_candidates(context, day, checked)
    candidates = cast_keys(candidates, workspace, day, project.log.context, checked)
    for column in project.log.context:
        if column not in candidates.collect_schema():
            candidates = candidates.with_columns(
                pl.lit(None, _context_type(workspace, column)).alias(column)
            )
    return candidates


def load_candidates(context: Context, day: date, checked: bool = False) -> pl.LazyFrame:
    """The candidate set of day D: given (folder of date=D or one file), or made from the log.

    Raises ProjectError when a given set is missing, unreadable or lacks a column, a user or an
    item; with `checked` the rows are not looked at.
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
    try:
        lazy = pl.scan_parquet(files, glob=False)
        columns = lazy.collect_schema().names()
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ProjectError(f"{path}: not a whole Parquet file ({reason})") from error
    renames = {project.log.user: "user_id", project.log.item: "item_id"}
    lazy = lazy.rename({c: r for c, r in renames.items() if c in columns and c != r})
    columns = lazy.collect_schema().names()
    for key, own in (("user_id", project.log.user), ("item_id", project.log.item)):
        if key not in columns:
            raise ProjectError(
                f"{path}: column {own!r} (the {key.removesuffix('_id')}) is missing; "
                f"it has: {', '.join(columns)}"
            )
    if checked:
        return lazy
    empty = (
        lazy.select(pl.col("user_id").null_count() + pl.col("item_id").null_count())
        .collect()
        .item()
    )
    if empty:
        raise ProjectError(f"{path}: {empty} rows lack a user or an item; allowed: none")
    return lazy


def candidate_files(context: Context, day: date) -> list[Path]:
    """The files of day D's given candidate set; empty when none is given or there."""
    project, source = context.project, context.source
    if project.scoring.candidates is None:
        return []
    path = source.root / project.scoring.candidates
    if path.is_dir():
        path = path / f"date={day}"
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    return [file for file in files if file.is_file()]


def candidate_days(context: Context) -> list[date]:
    """Days for which a candidate set was put into the folder of candidates, ascending."""
    project, source = context.project, context.source
    if project.scoring.candidates is None:
        raise ProjectError("scoring.candidates: not set, so no new candidate sets can be found")
    folder = source.root / project.scoring.candidates
    if not folder.is_dir():
        raise ProjectError(f"{folder}: no folder of date=YYYY-MM-DD (scoring.candidates)")
    found = []
    for place in folder.glob("date=*"):
        try:
            found.append(date.fromisoformat(place.name.removeprefix("date=")))
        except ValueError as error:
            raise ProjectError(f"{place}: expected date=YYYY-MM-DD") from error
    return sorted(day for day in found if candidate_files(context, day))


def generate_candidates(context: Context, day: date) -> pl.LazyFrame:
    """Active users of the last day before D × the items shown most on the last three days.

    Context columns take each user's most frequent value of that day.
    """
    project, workspace = context.project, context.workspace
    before = [d for d in workspace.days("events") if d < day]
    if not before:
        raise ProjectError(f"no events before {day} are published, so no candidates can be made")
    last = workspace.scan("events", before[-1:])
    recent = workspace.scan("events", [d for d in before if day - d <= timedelta(days=3)] or before)
    usual = [pl.col(c).mode().sort().first() for c in project.log.context]
    users = last.group_by("user_id").agg(pl.len().alias("seen"), *usual)
    users = users.sort(["seen", "user_id"], descending=[True, False]).drop("seen")
    if project.scoring.generated_users is not None:
        users = users.head(project.scoring.generated_users)
    items = recent.group_by("item_id").agg(pl.len().alias("shown"))
    items = items.sort(["shown", "item_id"], descending=[True, False]).drop("shown")
    items = items.head(project.scoring.generated_items)
    # Without an order kept, polars drops the sorts, and the same scores differ in their last bits.
    return users.join(items, how="cross", maintain_order="left_right")


def columns_read(project: Project) -> set[str]:
    """What of a candidate set counts, if it is there."""
    entity_keys = {key for entity in project.features.entities for key in entity}
    return {"user_id", "item_id", *project.log.context, *feature_columns(project), *entity_keys}


def cast_keys(
    candidates: pl.LazyFrame,
    workspace: Workspace,
    day: date,
    context: Sequence[str] = (),
    checked: bool = False,
) -> pl.LazyFrame:
    """User, item and context in the log's own types.

    Raises ProjectError for a value that has no such form, unless `checked`.
    """
    schema, found = _event_schema(workspace), candidates.collect_schema()
    for key in ("user_id", "item_id", *(c for c in context if c in found)):
        if schema[key] == found[key]:
            continue
        cast = pl.col(key).cast(schema[key], strict=False)
        if checked:
            candidates = candidates.with_columns(cast)
            continue
        lost = candidates.filter(pl.col(key).is_not_null() & cast.is_null()).select(key)
        odd = lost.head(3).collect()[key].to_list()
        if odd:
            raise ProjectError(
                f"candidates of {day}: column {key!r} is {found[key]} and holds {odd}, "
                f"but it is {schema[key]} in the log"
            )
        candidates = candidates.with_columns(cast)
    return candidates


def _context_type(workspace: Workspace, column: str) -> pl.DataType:
    return _event_schema(workspace)[column]


def _event_schema(workspace: Workspace) -> pl.Schema:
    return workspace.scan("events", workspace.days("events")[-1:]).collect_schema()
