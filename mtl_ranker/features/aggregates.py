"""Daily aggregates: a day's events as counts and sums of every entity, and users' histories.

An event counts for the day of its partition, or for the day of its timestamp where that is later,
so that no window before day D reads what happened on D.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.columns import check_names
from mtl_ranker.features.sql import day_number, run_sql
from mtl_ranker.features.tables import (
    join_tables,
    local_date,
    scan_events,
    static_tables,
    tables_fingerprint,
)
from mtl_ranker.features.view import aggregate_dataset, history_dataset, view_sql
from mtl_ranker.logs.contract import derived_columns
from mtl_ranker.logs.ingest import ingest_missing
from mtl_ranker.workspace import fingerprint

HISTORY_SIGNAL = "positive signal"  # no column of a log or table has this name


def aggregate_day(context: Context, day: date) -> str | None:
    """Publish one day's aggregates: a dataset per entity and per history.

    Returns why they were built, or None when all were up to date. Raises ProjectError when the
    day's events are not published, or a setting names a column that is missing.
    """
    first_reason = None
    for dataset, (provenance, rows) in _daily(context, day).items():
        why = context.workspace.stale(dataset, day, provenance)
        if why is not None:
            context.workspace.publish(dataset, day, rows, provenance)
            first_reason = first_reason or why
    return first_reason


def stale_aggregates(context: Context, day: date) -> str | None:
    """Why `aggregate_day` would build something, or None. Raises ProjectError as it does."""
    daily = _daily(context, day)
    reasons = (context.workspace.stale(name, day, made) for name, (made, _) in daily.items())
    return next((reason for reason in reasons if reason is not None), None)


def _daily(context: Context, day: date) -> dict[str, tuple[dict[str, str], pl.LazyFrame]]:
    """Dataset → provenance and rows of one day's aggregates."""
    project, source, workspace = context.project, context.source, context.workspace
    events_fingerprint = workspace.published_fingerprint("events", day)
    if events_fingerprint is None:
        raise ProjectError(f"events of {day} are not published; run `mtl-ranker ingest` first")
    tables_made = tables_fingerprint(context, day)
    events = join_tables(static_tables(source), scan_events(context, [day]))
    schema, known_from = events.collect_schema(), known_day(project, day)
    check_names(project, schema)
    signals = {
        name: expression.log1p() if _is_log1p(project, name) else expression
        for name, expression in derived_columns(project).items()
    }
    expressions = {o.name: (o.label, o.where, o.transform) for o in project.objectives}
    common = {
        "events": events_fingerprint,
        "rows of the user and item tables": tables_made,
        "setting objectives, features.signals": fingerprint(expressions, project.features.signals),
    }
    daily: dict[str, tuple[dict[str, str], pl.LazyFrame]] = {}
    template, sql = "aggregates/entity.sql", view_sql(context)
    provenance = {**common, f"sql/{template}": fingerprint(sql[template])}
    for keys in [[], *project.features.entities]:
        _check_columns(schema, keys, "features.entities")
        columns = [pl.col(key) for key in keys]
        labelled = events.select(known_from, *columns, *(e.alias(n) for n, e in signals.items()))
        counts = run_sql(sql[template], {"events": labelled}, keys=keys, signals=list(signals))
        daily[aggregate_dataset(context, keys)] = provenance, counts
    template = "aggregates/history.sql"
    for history in project.features.histories:
        _check_columns(schema, history.columns, f"features.histories ({history.signal})")
        provenance = {
            **common,
            f"sql/{template}": fingerprint(sql[template]),
            "setting features.histories": fingerprint(history),
        }
        # A list column is represented by its first value.
        columns = [
            pl.col(c).list.first() if isinstance(schema[c], pl.List) else pl.col(c)
            for c in {*history.columns, "item_id"}
        ]
        signal = signals[history.signal].alias(HISTORY_SIGNAL)
        latest = run_sql(
            sql[template],
            {"events": events.select(known_from, "user_id", "timestamp", *columns, signal)},
            signal=HISTORY_SIGNAL,
            columns=history.columns,
            length=history.length,
        )
        daily[history_dataset(context, history)] = provenance, latest
    return daily


def known_day(project: Project, day: date) -> pl.Expr:
    """`day`, from which on an event of partition D may be known (days since 1970)."""
    own = local_date(project).cast(pl.Int32)
    return pl.max_horizontal(own, pl.lit(day_number(day), pl.Int32)).alias("day")


def _check_columns(schema: pl.Schema, columns: Sequence[str], place: str) -> None:
    for column in columns:
        if column not in schema:
            raise ProjectError(
                f"{place}: no column {column!r} in the events or joined tables; "
                f"allowed: {', '.join(schema.names())}"
            )
        if schema[column].is_nested() and place == "features.entities":
            raise ProjectError(
                f"{place} ({column}): is {schema[column]}; allowed: one value per row "
                "(text, a number or a Boolean)"
            )


def history_days(context: Context, day: date) -> list[date]:
    """Aggregated days in the longest window of day D, which ends on the day before D."""
    project, workspace = context.project, context.workspace
    longest = project.features.windows[-1]
    days = workspace.days(aggregate_dataset(context, []))
    return [d for d in days if 0 < (day - d).days <= longest]


def history_fingerprint(context: Context, day: date) -> str:
    """One hash of all aggregates that the windows of day D read."""
    project, workspace = context.project, context.workspace
    datasets = [aggregate_dataset(context, keys) for keys in [[], *project.features.entities]]
    datasets += [history_dataset(context, history) for history in project.features.histories]
    return fingerprint(
        *(
            workspace.published_fingerprint(dataset, d)
            for d in history_days(context, day)
            for dataset in datasets
        )
    )


def _is_log1p(project: Project, name: str) -> bool:
    return any(o.name == name and o.transform == "log1p" for o in project.objectives)


def aggregate_history(context: Context, day: date) -> None:
    """Publish the daily aggregates that features as of D read, where they are not up to date.

    A model may look further back than the project file: days of the log that are not published,
    although a later one is, are ingested first.
    """
    longest = context.project.features.windows[-1]
    ingest_missing(context, [d for d in context.source.days() if 0 < (day - d).days <= longest])
    for published in context.workspace.days("events"):
        if 0 < (day - published).days <= longest:
            aggregate_day(context, published)
