"""Daily aggregates: a day's events as counts and sums of every entity, and users' histories.

An event counts for the day of its partition, or for the day of its timestamp where that is later,
so that no window before day D reads what happened on D. An action counts on the day from which on
it is known, not on that of its impression: what an impression's signals change by on a later day
is added to that day's aggregates.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property

import polars as pl

from mtl_ranker.config import History, Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError, first_line
from mtl_ranker.features.columns import check_names
from mtl_ranker.features.sql import day_number, run_sql
from mtl_ranker.features.tables import (
    join_tables,
    local_date,
    scan_events,
    tables_as_of,
    tables_fingerprint,
)
from mtl_ranker.features.view import AGGREGATE_SQL, aggregate_dataset, history_dataset, view_sql
from mtl_ranker.logs.actions import (
    EVENT,
    PAIR,
    actions_dataset,
    actions_digest,
    day_before,
    ended_actions,
    publish_actions,
    published_actions,
    reach,
    stale_actions,
    stream_days_between,
    touched_days,
    with_actions,
)
from mtl_ranker.logs.blocks import publish_by_user
from mtl_ranker.logs.contract import derived_columns
from mtl_ranker.logs.ingest import ingest_missing
from mtl_ranker.workspace import fingerprint

LOG = logging.getLogger(__name__)
ENTITY_SQL, HISTORY_SQL = AGGREGATE_SQL
HISTORY_SIGNAL = "positive signal"  # no column of a log or table has this name
# Inputs of all aggregates of a day, in their provenance.
EVENTS, ACTIONS, SIGNALS = "events", "actions", "setting objectives, features.signals"


def aggregate_day(context: Context, day: date) -> str | None:
    """Publish one day's aggregates: a dataset per entity and per history.

    Returns why they were built, or None when all were up to date. Raises ProjectError when the
    day's events are not published, or a setting names a column that is missing.
    """
    context = context.pinned()
    _join_neighbours(context, day)
    return _aggregated(context, day)


def _join_neighbours(context: Context, day: date) -> None:
    """Publish the actions that the aggregates of day D read."""
    if context.project.log.actions and context.workspace.days("events"):
        for each in neighbours(context, day):
            publish_actions(context, each)


def _aggregated(context: Context, day: date) -> str | None:
    """`aggregate_day` with the published actions."""
    first_reason = None
    rows = _DayRows.of(context, day)
    for dataset, daily in _daily(rows).items():
        why = context.workspace.stale(dataset, day, daily.provenance)
        if why is not None:
            made = _history_rows(rows, daily.of) if isinstance(daily.of, History) else None
            made = _entity_rows(rows, daily.of) if isinstance(daily.of, list) else made
            assert made is not None
            _publish(context, dataset, day, made, daily.provenance)
            first_reason = first_reason or why
    return first_reason


def _publish(
    context: Context, dataset: str, day: date, made: pl.LazyFrame, provenance: dict[str, str]
) -> None:
    """Publish aggregates; of large days by ascending user, as the events are."""
    workspace, count = context.workspace, context.workspace.rows("events", day)
    if "user_id" in made.collect_schema() and count > context.project.features.block_rows:
        publish_by_user(workspace, dataset, day, made, provenance, count)
    else:
        workspace.publish(dataset, day, made, provenance)


def stale_aggregates(context: Context, day: date) -> str | None:
    """Why `aggregate_day` would build something, or None. Raises ProjectError as it does."""
    context = context.pinned()
    joined = context.project.log.actions and context.workspace.days("events")
    for each in neighbours(context, day) if joined else []:
        why = stale_actions(context, each)
        if why is not None:
            return why
    daily = _daily(_DayRows.of(context, day))
    reasons = (context.workspace.stale(n, day, made.provenance) for n, made in daily.items())
    return next((reason for reason in reasons if reason is not None), None)


@dataclass(frozen=True)
class _Daily:
    """A dataset of daily aggregates: its provenance, and the entity's keys or the history."""

    provenance: dict[str, str]
    of: list[str] | History


@dataclass(frozen=True)
class _DayRows:
    """What one day's aggregates are computed from.

    Attributes:
        events: of the day, with tables and actions.
        schema: of the events.
        signals: name → expression over the event.
    """

    context: Context
    day: date
    events: pl.LazyFrame
    schema: pl.Schema
    signals: dict[str, pl.Expr]

    @classmethod
    def of(cls, context: Context, day: date) -> _DayRows:
        """Raises ProjectError when the day's events are not published."""
        project = context.project
        if context.workspace.published_fingerprint("events", day) is None:
            raise ProjectError(f"events of {day} are not published; run `mtl-ranker ingest` first")
        events = join_tables(tables_as_of(context.source, day), shown_events(context, day))
        schema = events.collect_schema()
        check_names(project, [name for name in schema if name not in _action_names(project)])
        return cls(context, day, events, schema, signal_expressions(project))

    @cached_property
    def changes(self) -> Changes | None:
        """What becomes known about earlier impressions; None in a project without actions."""
        features = self.context.project.features
        if not self.context.project.log.actions:
            return None
        keys = {key for keys in features.entities for key in keys}
        keys |= {column for history in features.histories for column in history.columns}
        return changes_of_day(self.context, self.day, self.signals, sorted(keys))


def signal_expressions(project: Project) -> dict[str, pl.Expr]:
    """What is aggregated: each objective's label, transformed, and each signal."""
    return {
        name: expression.log1p() if _is_log1p(project, name) else expression
        for name, expression in derived_columns(project).items()
    }


def _signals_fingerprint(project: Project) -> str:
    expressions = {o.name: (o.label, o.where, o.transform) for o in project.objectives}
    return fingerprint(expressions, project.features.signals)


def _action_names(project: Project) -> set[str]:
    return {action.name for action in project.log.actions}


def _daily(rows: _DayRows) -> dict[str, _Daily]:
    """Dataset → how it is made, of one day's aggregates."""
    context, day = rows.context, rows.day
    project, sql = context.project, view_sql(context)
    known = {name: kind for name, kind in rows.schema.items() if name not in _action_names(project)}
    schema = pl.Schema(known)  # an outcome is no key
    common = {
        EVENTS: context.workspace.published_fingerprint("events", day) or "",
        "rows of the user and item tables": tables_fingerprint(context, day),
        SIGNALS: _signals_fingerprint(project),
    }
    if project.log.actions:
        common[ACTIONS] = _known_actions(context, day)
        published = context.workspace.days("events")
        changed = [d for d in neighbours(context, day) if d < day and d in published]
        common["rows of the tables on days that actions change"] = fingerprint(
            *(tables_fingerprint(context, own) for own in changed)
        )
    template, daily = ENTITY_SQL, {}
    provenance = {**common, f"sql/{template}": fingerprint(sql[template])}
    for keys in [[], *project.features.entities]:
        _check_columns(schema, keys, "features.entities")
        daily[aggregate_dataset(context, keys)] = _Daily(provenance, keys)
    template = HISTORY_SQL
    for history in project.features.histories:
        _check_columns(schema, history.columns, f"features.histories ({history.signal})")
        provenance = {
            **common,
            f"sql/{template}": fingerprint(sql[template]),
            "setting features.histories": fingerprint(history),
        }
        daily[history_dataset(context, history)] = _Daily(provenance, history)
    return daily


def _entity_rows(rows: _DayRows, keys: list[str]) -> pl.LazyFrame:
    """Counts and sums of one entity; with actions, of its changes in further rows."""
    text, signals = view_sql(rows.context)[ENTITY_SQL], rows.signals
    columns = [pl.col(key) for key in keys]
    known_from = known_day(rows.context.project, rows.day)
    labelled = rows.events.select(known_from, *columns, *(e.alias(n) for n, e in signals.items()))
    counts = run_sql(text, {"events": labelled}, keys=keys, signals=list(signals))
    changes = rows.changes
    if changes is None:
        return counts
    parts = [counts.with_columns(_whole(list(signals)))]
    for changed, sign in changes.signed:
        own = changed.lazy().select("day", *keys, *signals)
        made = run_sql(text, {"events": own}, keys=keys, signals=list(signals))
        parts.append(made.with_columns(_whole(list(signals), sign, changed is changes.alone)))
    return pl.concat(parts, how="vertical_relaxed")


def _history_rows(rows: _DayRows, history: History) -> pl.LazyFrame:
    """Each user's latest impressions on which the signal is, or becomes, positive."""
    schema = rows.schema
    # A list column is represented by its first value.
    columns = [
        pl.col(c).list.first() if isinstance(schema[c], pl.List) else pl.col(c)
        for c in {*history.columns, "item_id"}
    ]
    signal = rows.signals[history.signal].alias(HISTORY_SIGNAL)
    known_from = known_day(rows.context.project, rows.day)
    shown = rows.events.select(known_from, "user_id", "timestamp", *columns, signal)
    if rows.changes is not None:
        signal = pl.col(history.signal).alias(HISTORY_SIGNAL)
        later = rows.changes.turned(history.signal).lazy()
        later = later.select("day", "user_id", "timestamp", *columns, signal)
        shown = pl.concat([shown, later], how="vertical_relaxed")
    return run_sql(
        view_sql(rows.context)[HISTORY_SQL],
        {"events": shown},
        signal=HISTORY_SIGNAL,
        columns=history.columns,
        length=history.length,
    )


def shown_events(context: Context, day: date) -> pl.LazyFrame:
    """A day's events with what their actions were worth when the events became known."""
    events = scan_events(context, [day])
    if not context.project.log.actions:
        return events
    with_row, number = events.with_row_index(EVENT), day_number(day)
    return with_actions(context, with_row, day, pl.col("counted") == number).drop(EVENT)


@dataclass(frozen=True)
class Changes:
    """Earlier impressions whose signals change on a day, and actions without an impression.

    Attributes:
        before, after: the same impressions, with user, item, timestamp, the keys of entities and
            histories, their place (`impression_day`, `EVENT`), `day`, and the signals before and
            after the change.
        alone: a row for each action without an impression that counts; other columns are null.
    """

    before: pl.DataFrame
    after: pl.DataFrame
    alone: pl.DataFrame

    @property
    def signed(self) -> list[tuple[pl.DataFrame, int]]:
        """Rows that are added to (1) and taken from (-1) the day's aggregates."""
        return [(self.after, 1), (self.before, -1), (self.alone, 1)]

    def turned(self, signal: str) -> pl.DataFrame:
        """Rows on which a signal becomes positive."""
        keys = ["impression_day", EVENT]
        positive = self.before.filter(pl.col(signal) > 0).select(keys)
        turned = self.after.join(positive, on=keys, how="anti")
        return pl.concat([turned, self.alone], how="diagonal_relaxed")


def changes_of_day(
    context: Context, day: date, signals: Mapping[str, pl.Expr], keys: Sequence[str]
) -> Changes:
    """What becomes known on day D about impressions of earlier partitions.

    Days before D without events count as D.

    Args:
        signals: name → expression over the event.
        keys: columns of events and tables that are kept.
    """
    log, number = context.project.log, day_number(day)
    earlier = [d for d in context.workspace.days("events") if d < day]
    since = day_number(earlier[-1]) if earlier else number
    counted = pl.col("counted")
    new = (counted > since) & (counted <= number) & (pl.col("impression_day") < number)
    touched: dict[date, list[pl.DataFrame]] = {}
    for action in log.actions:
        days = published_actions(context, action, day)
        if days:
            found = touched_days(context.workspace, actions_dataset(action), days, new)
            for own, places in found.items():
                touched.setdefault(own, []).append(places)
    nothing = scan_events(context, [day]).with_row_index(EVENT).head(0)
    kept = list(dict.fromkeys(["user_id", "item_id", "timestamp", *keys]))

    def signalled(rows: pl.LazyFrame, own: date) -> pl.LazyFrame:
        return join_tables(tables_as_of(context.source, own), rows).select(
            pl.lit(number, pl.Int32).alias("day"),
            pl.lit(day_number(own), pl.Int32).alias("impression_day"),
            EVENT,
            *kept,
            *(expression.alias(name) for name, expression in signals.items()),
        )

    frames = [signalled(_organic(context, day, nothing, since), day)]
    for limit in (since, number):
        parts = [signalled(with_actions(context, nothing, day, counted <= limit), day)]
        for own, chosen in sorted(touched.items()):
            distinct = pl.concat(chosen).unique().rename({"row": EVENT}).lazy()
            events = scan_events(context, [own]).with_row_index(EVENT)
            rows = events.join(distinct, on=EVENT, how="semi", maintain_order="left")
            parts.append(signalled(with_actions(context, rows, own, counted <= limit), own))
        frames.append(pl.concat(parts, how="vertical_relaxed"))
    alone, before, after = (frame.collect(engine="streaming") for frame in frames)
    return Changes(before, after, alone)


def _organic(context: Context, day: date, nothing: pl.LazyFrame, since: int) -> pl.LazyFrame:
    """Actions without an impression that become known on day D, as rows of events."""
    log, number = context.project.log, day_number(day)
    parts = [nothing.with_columns(pl.lit(None, pl.Float64).alias(a.name) for a in log.actions)]
    for action in log.actions:
        days = published_actions(context, action, day) if action.organic else []
        if days:
            rows = context.workspace.scan(actions_dataset(action), days).filter(
                pl.col("good")
                & pl.col("row").is_null()
                & (pl.col("counted") > since)
                & (pl.col("counted") <= number)
            )
            value = (pl.col("value") != 0) if action.reduce == "any" else pl.col("value")
            parts.append(rows.select(*PAIR, "timestamp", value.cast(pl.Float64).alias(action.name)))
    return pl.concat(parts, how="diagonal_relaxed")


def _whole(signals: Sequence[str], sign: int = 0, only_sums: bool = False) -> list[pl.Expr]:
    """Counts as signed numbers; of changes times their sign and without new impressions.

    Args:
        sign: 0 for the day's own impressions.
        only_sums: actions without an impression are in no count.
    """
    times, impressions = sign or 1, 1 if sign == 0 else 0
    counted = 0 if only_sums else times
    return [
        (pl.col("impressions").cast(pl.Int64) * impressions).alias("impressions"),
        *((pl.col(f"{s}_count").cast(pl.Int64) * counted).alias(f"{s}_count") for s in signals),
        *((pl.col(f"{s}_sum") * float(times)).alias(f"{s}_sum") for s in signals),
    ]


def _known_actions(context: Context, day: date) -> str:
    """A hash of the actions that the aggregates of day D read, and of what they count for."""
    log, number = context.project.log, day_number(day)
    days = {a.name: published_actions(context, a, day) for a in log.actions}
    earlier = [d for d in context.workspace.days("events") if d < day]
    since = (day - earlier[-1]).days if earlier else None
    settings = [(a.name, a.reduce, a.organic, a.value) for a in log.actions]
    known = actions_digest(context, f"aggregates {day}", days, pl.col("counted") <= number)
    return fingerprint(known, since, settings)


def neighbours(context: Context, day: date) -> list[date]:
    """Days whose actions the aggregates of day D read: published ones, and others with actions."""
    log, published = context.project.log, context.workspace.days("events")
    longest = max(reach(log, action) for action in log.actions) + 1
    first = day_before(context, day) - timedelta(days=longest)
    # Actions just before midnight may belong to impressions that are filed under the next day.
    first = max(first, published[0] - timedelta(days=1 if log.day_tolerance_hours else 0))
    streams = [stream_days_between(context, action, first, day) for action in log.actions]
    every = {d for days in [published, *streams] for d in days}
    return sorted(d for d in every if first <= d <= day)


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
    """Aggregated days in the longest window of day D, which ends on the day before D.

    With actions, a day whose aggregates were not all built from the same events and actions is none
    of them.
    """
    project, workspace = context.project, context.workspace
    longest = project.features.windows[-1]
    days = workspace.days(aggregate_dataset(context, []))
    days = [d for d in days if 0 < (day - d).days <= longest]
    return [d for d in days if _is_whole(context, d)] if project.log.actions else days


def _aggregate_datasets(context: Context) -> list[str]:
    """The datasets of all entities and histories."""
    features = context.project.features
    datasets = [aggregate_dataset(context, keys) for keys in [[], *features.entities]]
    return datasets + [history_dataset(context, history) for history in features.histories]


def _is_whole(context: Context, day: date) -> bool:
    """Whether all aggregates of a day are published, and of one state of events and actions."""
    signals, states = _signals_fingerprint(context.project), set()
    for dataset in _aggregate_datasets(context):
        made = context.workspace.provenance(dataset, day)
        if made is None or made.get(SIGNALS) != signals:
            return False
        states.add((made.get(EVENTS), made.get(ACTIONS)))
    return len(states) == 1


def history_fingerprint(context: Context, day: date) -> str:
    """One hash of all aggregates that the windows of day D read."""
    datasets = _aggregate_datasets(context)
    return fingerprint(
        *(
            context.workspace.published_fingerprint(dataset, d)
            for d in history_days(context, day)
            for dataset in datasets
        )
    )


def _is_log1p(project: Project, name: str) -> bool:
    return any(o.name == name and o.transform == "log1p" for o in project.objectives)


def aggregate_history(context: Context, day: date) -> None:
    """Publish the daily aggregates that features as of D read, where they are not up to date.

    A model may look further back than the project file: days of the log that are not published,
    although a later one is, are ingested first. Where a stream of actions cannot be read, the days
    that its actions count on keep the aggregates they have. Those without are missing in the
    features, as a day that has not arrived; a warning names both.
    """
    context = context.pinned()
    longest = context.project.features.windows[-1]
    ingest_missing(context, [d for d in context.source.days() if 0 < (day - d).days <= longest])
    unread: dict[str, list[date]] = {}
    for published in context.workspace.days("events"):
        if 0 < (day - published).days <= longest:
            try:
                _join_neighbours(context, published)
            except (ProjectError, OSError, pl.exceptions.PolarsError) as error:
                unread.setdefault(first_line(error), []).append(published)
            else:
                _aggregated(context, published)
    last = max(context.workspace.days("events"), default=day)
    for name, end in ended_actions(context, last).items():
        after = "" if end is None else f" after {end}"
        LOG.warning("%s (log.actions): not in the project file; no rows%s", name, after)
    known = set(history_days(context, day)) if unread else set()
    for reason, days in unread.items():
        old, missing = [d for d in days if d in known], [d for d in days if d not in known]
        for found, how in ((old, "as published before"), (missing, "missing")):
            if found:
                text = ", ".join(map(str, found))
                LOG.warning(
                    "%s: %s in the features, as actions are not joined: %s", text, how, reason
                )
