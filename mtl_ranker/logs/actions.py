"""Actions joined to impressions, one day of an action's stream at a time.

`actions/NAME/date=Y` holds each action of partition Y with the impression it belongs to, or with
the reason why it belongs to none. An action belongs to the impression of its impression id. If it
has no id, or no impression has it, it belongs to the nearest impression of the same user and item
that is not after it; of impressions with other ids, never to one. What is joined does not change
when later impressions arrive, so a night joins one day.

An action is known from the latest of the day of its partition, the date of its timestamp, the date
on which it arrived, and the day from which on its impression is known.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl

from mtl_ranker.config import GIVEN, TOO_LARGE, Action, Log, Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.contract import MUST_BE_TEXT, inside_day
from mtl_ranker.logs.places import listed
from mtl_ranker.logs.sources import parquet_files, utc_timestamp
from mtl_ranker.workspace import Workspace, fingerprint

LOG = logging.getLogger(__name__)
EVENT = "row of the day"  # the row of an impression in its day's events
EPOCH = date(1970, 1, 1)
PAIR = ["user_id", "item_id"]
OUTSIDE = "timestamp outside the day"
REPEATED = "duplicate of an earlier action"  # delivered twice: counted, and no mistake
NO_IMPRESSION = "no earlier impression of the user and item"
UNKNOWN_ID = "no impression has its id"
BEFORE = "before its impression"
LATE = "after the window"
OTHER_PAIR = "its impression is of another user or item"


@dataclass(frozen=True)
class ActionReport:
    """What joining one day of an action's stream did.

    Attributes:
        rows: all rows of the day.
        joined: those that belong to an impression.
        alone: reason → rows that belong to none.
        bad: reason → rows that break the contract.
        why: why the day was joined; None if it was up to date.
    """

    name: str
    day: date
    rows: int
    joined: int
    alone: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    why: str | None = None


def actions_dataset(action: Action) -> str:
    return f"actions/{action.name}"


def reach(log: Log, action: Action) -> int:
    """Days after an impression's partition in which its actions may be filed or become known."""
    hours = action.span / timedelta(hours=1) + 2 * log.day_tolerance_hours
    return math.ceil(hours / 24) + 1


def final_day(project: Project, actions: Sequence[Action], day: date) -> date:
    """The last day on which actions of the impressions of partition D may become known."""
    log = project.log
    if not actions:
        return day
    latest = max(action.span for action in actions)
    latest += timedelta(hours=2 * log.day_tolerance_hours) - timedelta(microseconds=1)
    return (end_of(log, day) + latest).astimezone(ZoneInfo(log.timezone)).date()


def end_of(log: Log, day: date) -> datetime:
    """The moment at which a day ends in the log's time zone, in UTC."""
    following = day + timedelta(days=1)
    zone = ZoneInfo(log.timezone)
    ends = datetime(following.year, following.month, following.day, tzinfo=zone)
    return ends.astimezone(ZoneInfo("UTC"))


def join_actions(context: Context, day: date) -> list[ActionReport]:
    """Publish the actions of partition D, joined to published impressions; one report an action.

    Days that are up to date are skipped. Raises ProjectError for a day that has not arrived, for a
    column that is missing or of a wrong type, and when more than `log.max_bad_share` of the rows
    break the contract, other than by being delivered twice.
    """
    context = context.pinned()
    return [_reported(context, action, day) for action in context.project.log.actions]


def publish_actions(context: Context, day: date) -> None:
    """`join_actions` without its reports."""
    for action in context.project.log.actions:
        _join(context, action, day)


def stale_actions(context: Context, day: date) -> str | None:
    """Why `join_actions` would join something, or None."""
    for action in context.project.log.actions:
        made = _provenance(context, action, day)
        why = None if made is None else context.workspace.stale(actions_dataset(action), day, made)
        if why is not None:
            return f"{action.name} {why}"
    return None


def stream_days(context: Context, action: Action) -> list[date]:
    """Days of an action's stream, ascending; of a past action none if its files are gone."""
    return [] if _gone(context, action) else context.source.actions(action.name).days()


def stream_days_between(context: Context, action: Action, first: date, last: date) -> list[date]:
    """`stream_days` from the first to the last one, without a look at the folders of others."""
    source = context.source.actions(action.name)
    if _gone(context, action):
        return []
    if source.undivided:
        return [day for day in source.days() if first <= day <= last]
    span = (first + timedelta(days=n) for n in range((last - first).days + 1))
    return [day for day in span if source.has_day(day)]


def _gone(context: Context, action: Action) -> bool:
    """Whether the files of a past action are gone."""
    if action.name not in context.past_actions:
        return False
    place = listed(context.source.root / action.path)
    return not place.exists() or not parquet_files(place)


def ended_actions(context: Context, day: date) -> dict[str, date | None]:
    """Past action → the last day of its stream, None without any, where that is before D."""
    ends: dict[str, date | None] = {}
    for action in context.project.log.actions:
        if action.name in context.past_actions:
            days = stream_days(context, action)
            if not days or days[-1] < day:
                ends[action.name] = days[-1] if days else None
    return ends


def _provenance(context: Context, action: Action, day: date) -> dict[str, str] | None:
    """Of a day's actions; None for a day that is not joined.

    That is one whose files are gone, but which is published, and a day of a past action that its
    stream does not have. Raises ProjectError for a day that has not arrived.
    """
    workspace, source = context.workspace, context.source.actions(action.name)
    there = not _gone(context, action) and source.has_day(day)
    if not there and (
        action.name in context.past_actions
        or workspace.provenance(actions_dataset(action), day) is not None
    ):
        return None
    if not there and not source.undivided:
        have = source.days()
        if not have or day > have[-1]:
            span = f"{have[0]} to {have[-1]}" if have else "none"
            raise ProjectError(
                f"{source.root / action.path}: no actions of {day} (log.actions, {action.name}); "
                f"days found: {span}; a day without any needs a folder with an empty Parquet file"
            )
    log = context.project.log
    versions = source.versions() if there else {}
    settings = [getattr(log, name) for name in ("user", "item", "timestamp", "timestamp_unit")]
    made = {
        "source files": fingerprint(*(source.state(day) if there else [])),
        "setting log.actions": fingerprint(
            action.model_dump_json(exclude={"reduce", "organic", "version"}),
            *settings,
            log.timezone,
        ),
        "setting log": fingerprint(log.impression, log.day_tolerance_hours, log.max_bad_share),
        "events": fingerprint(
            *(
                (d, workspace.published_fingerprint("events", d))
                for d in _impression_days(context, action, day)
            )
        ),
    }
    return workspace.with_versions(actions_dataset(action), day, made, versions)


def _impression_days(context: Context, action: Action, day: date) -> list[date]:
    """Published days of impressions to which actions of partition D may belong."""
    log = context.project.log
    first = day - timedelta(days=reach(log, action))
    last = day + timedelta(days=1 if log.day_tolerance_hours else 0)
    return [d for d in context.workspace.days("events") if first <= d <= last]


def _reported(context: Context, action: Action, day: date) -> ActionReport:
    """Join a day of an action's stream, and count."""
    workspace, dataset = context.workspace, actions_dataset(action)
    joined = _join(context, action, day)
    if joined is not None:
        return _report(action, day, *joined)
    if workspace.provenance(dataset, day) is None:
        return ActionReport(action.name, day, 0, 0)
    return _report(action, day, workspace.scan(dataset, [day]), None)


def _join(context: Context, action: Action, day: date) -> tuple[pl.LazyFrame, str] | None:
    """The rows that were published and why; None where nothing was to be published."""
    workspace, dataset = context.workspace, actions_dataset(action)
    provenance = _provenance(context, action, day)
    why = None if provenance is None else workspace.stale(dataset, day, provenance)
    if provenance is None or why is None:
        return None
    place = f"{context.source.actions(action.name).root / action.path} ({day})"
    rows = read_actions(context, action, day)
    bad = rows.filter(~pl.col("good"))
    reasons = dict(bad["reason"].value_counts(sort=True).rows())
    allowed = context.project.log.max_bad_share
    check_bad_share(context, action, place, rows.height, reasons, allowed)
    joined = _belonging(context, action, rows.filter("good"), day)
    keys: dict[Any, Any] = {key: joined.schema[key] for key in PAIR}
    bad = bad.select(*PAIR, "timestamp", "value", "good", "reason").cast(keys, strict=False)
    joined = pl.concat([joined, bad], how="diagonal")
    workspace.publish(dataset, day, joined, provenance)
    return joined.lazy(), why


def check_bad_share(
    context: Context,
    action: Action,
    place: str,
    rows: int,
    reasons: Mapping[str, int],
    allowed: float,
) -> None:
    """Raise ProjectError when too many of a day's actions break the contract.

    Args:
        rows: all of the day's actions.
        reasons: reason → actions that break it. Those delivered twice are no mistake.
        allowed: `log.max_bad_share`.
    """
    broken = {reason: count for reason, count in reasons.items() if reason != REPEATED}
    if sum(broken.values()) <= allowed * rows:
        return
    lines = [f"    {count:>9,}  {reason}" for reason, count in broken.items()]
    if OUTSIDE in broken:
        names = [each.name for each in context.project.log.actions]
        setting = f"log.actions[{names.index(action.name)}].arrived"
        if action.arrived is None:
            lines.append(
                f"    where the folders are by the day of arrival, name the column of that time: "
                f"{setting}"
            )
        else:
            lines.append(
                f"    nor does {action.arrived!r} ({setting}) lie in the day; folders are by the "
                "day of the action or by that of its arrival"
            )
    raise ProjectError(
        f"{place}: {sum(broken.values()):,} of {rows:,} actions ({action.name}) break the "
        f"contract; allowed: log.max_bad_share = {allowed:.1%}\n" + "\n".join(lines)
    )


def _report(action: Action, day: date, rows: pl.LazyFrame, why: str | None) -> ActionReport:
    counts = rows.group_by("good", "reason").len().sort("len", descending=True).collect()
    alone: dict[str, int] = {}
    bad: dict[str, int] = {}
    joined = 0
    for good, reason, count in counts.rows():
        if reason is None:
            joined = count
        else:
            (alone if good else bad)[reason] = count
    rows_of_day = sum(alone.values()) + sum(bad.values()) + joined
    return ActionReport(action.name, day, rows_of_day, joined, alone, bad, why)


def read_actions(context: Context, action: Action, day: date) -> pl.DataFrame:
    """The day's actions: canonical columns, `value`, `at`, `impression`, `good` and `reason`.

    `at` is the moment from which on an action is known.
    """
    log, source = context.project.log, context.source.actions(action.name)
    index = [each.name for each in log.actions].index(action.name)
    named = {r: getattr(action, r) for r in ("value", "impression", "arrived")}
    used = [column for column in named.values() if column is not None]
    if not source.has_day(day):
        return _no_actions(context)
    lazy, place = source.scan_day(day, used), f"{source.root / action.path} ({day})"
    schema = lazy.collect_schema()
    for role, column in named.items():
        if column is not None and column not in schema:
            raise ProjectError(
                f"{place}: column {column!r} (named by log.actions[{index}].{role}) is missing; "
                f"it has: {', '.join(source.columns(day))}"
            )
    value = pl.lit(1.0) if action.value is None else pl.col(action.value).cast(pl.Float64)
    if action.value is not None:
        dtype = schema[action.value]
        if not (dtype.is_numeric() or dtype in (pl.Boolean, pl.Null)):
            raise ProjectError(
                f"{place}: column {action.value!r} (log.actions[{index}].value) is {dtype}; "
                "allowed: a number or a Boolean"
            )
    arrived = pl.col("timestamp")
    if action.arrived is not None:
        unit = action.timestamp_unit or log.timestamp_unit
        of = log.model_copy(update={"timestamp": action.arrived, "timestamp_unit": unit})
        setting = f"log.actions[{index}].arrived"
        arrived = utc_timestamp(of, schema[action.arrived], place, setting)
    identity = pl.lit(None) if action.impression is None else pl.col(action.impression)
    too_large = {key: f"{key}{TOO_LARGE}" for key in PAIR if f"{key}{TOO_LARGE}" in schema}
    rows = lazy.select(
        *PAIR,
        "timestamp",
        value.alias("value"),
        arrived.alias("arrived"),
        identity.alias("impression"),
        pl.col(GIVEN),
        *(pl.col(flag) for flag in too_large.values()),
    ).collect(engine="streaming")
    keys = ["user_id", "item_id", "timestamp", "value", "impression"]
    repeated = ~pl.struct(keys).is_first_distinct()
    if action.arrived is not None:  # the first to arrive counts
        rows = rows.with_row_index("number")
        first = pl.col("number").sort_by("arrived", "number", nulls_last=True).first().over(keys)
        repeated = pl.col("number") != first
    inside = inside_day(log, day)
    if action.arrived is not None:  # folders may be by the day of arrival
        end = end_of(log, day) + timedelta(hours=log.day_tolerance_hours)
        inside |= inside_day(log, day, "arrived") & (pl.col("timestamp") < end)
    rules = {
        **{f"{k} {MUST_BE_TEXT}": pl.col(f) for k, f in too_large.items()},
        "user_id missing": pl.col("user_id").is_null(),
        "item_id missing": pl.col("item_id").is_null(),
        "timestamp missing": ~pl.col(GIVEN),
        "timestamp is no valid time": pl.col("timestamp").is_null(),
        OUTSIDE: ~inside,
        f"{action.value} missing or not finite": ~pl.col("value").is_finite().fill_null(False),
        f"{action.arrived} missing or no valid time": pl.col("arrived").is_null(),
        REPEATED: repeated,
    }
    reason = pl.coalesce(pl.when(broken).then(pl.lit(name)) for name, broken in rules.items())
    rows = rows.with_columns(
        reason.alias("reason"), pl.max_horizontal("timestamp", "arrived").alias("at")
    )
    good = pl.col("reason").is_null().alias("good")
    return rows.select(*PAIR, "timestamp", "value", good, "reason", "at", "impression")


def _no_actions(context: Context) -> pl.DataFrame:
    """The columns of `read_actions` without a row."""
    last = context.workspace.days("events")[-1:]
    events = context.workspace.scan("events", last).collect_schema() if last else pl.Schema()
    time = pl.Datetime("us", "UTC")
    return pl.DataFrame(
        schema={
            "user_id": events.get("user_id", pl.Int64()),
            "item_id": events.get("item_id", pl.Int64()),
            "timestamp": time,
            "value": pl.Float64,
            "good": pl.Boolean,
            "reason": pl.String,
            "at": time,
            "impression": pl.Null,
        }
    )


def day_of(moment: pl.Expr, log: Log) -> pl.Expr:
    """The date of a moment in the log's time zone, as days since 1970."""
    return moment.dt.convert_time_zone(log.timezone).dt.date().cast(pl.Int32)


def _belonging(context: Context, action: Action, rows: pl.DataFrame, day: date) -> pl.DataFrame:
    """Good actions of partition D with the impression each belongs to.

    Returns the columns user_id, item_id, timestamp, value, good, reason, `known` (the day from
    which on an action is known), `impression_day` and `row` of its impression, null without one,
    and `counted`: the day in whose aggregates the action counts, which is that of the impression
    for an action that is known as early as the impression.
    """
    log, number = context.project.log, (day - EPOCH).days
    own = rows.with_row_index("action")
    parts: list[pl.DataFrame] = []
    impressions = _impressions(context, action, day)
    if impressions is not None:
        schema = impressions.collect_schema()
        own = own.cast({key: schema[key] for key in PAIR}, strict=False)
        named = own.filter(pl.col("impression").is_not_null())
        if log.impression is not None and action.impression is not None:
            named = named.cast({"impression": schema["impression"]}, strict=False)
            exact = _exact(named, impressions)
            parts.append(exact)
            named = named.join(exact, on="action", how="anti")
            unnamed = impressions.filter(pl.col("impression").is_null())
            parts.append(_nearest(named, unnamed))
        parts.append(_nearest(own.filter(pl.col("impression").is_null()), impressions))
    found = pl.concat(parts) if parts else pl.DataFrame(schema=FOUND | {"shown": own["at"].dtype})
    joined = own.join(found, on="action", how="left", maintain_order="left").with_columns(
        pl.max_horizontal(day_of(pl.col("shown"), log), "impression_day").alias("born")
    )
    named_id = pl.col("impression").is_not_null()
    reason = (
        pl.when(pl.col("row").is_null())
        .then(pl.when(named_id).then(pl.lit(UNKNOWN_ID)).otherwise(pl.lit(NO_IMPRESSION)))
        .when(pl.col("other"))
        .then(pl.lit(OTHER_PAIR))
        .when(pl.col("timestamp") < pl.col("shown"))
        .then(pl.lit(BEFORE))
        .when(pl.col("at") - pl.col("shown") > action.span)
        .then(pl.lit(LATE))
        .alias("reason")
    )
    joined = joined.with_columns(reason)
    own_day = pl.max_horizontal(day_of(pl.col("at"), log), pl.lit(number, pl.Int32))
    belongs = pl.col("reason").is_null()
    joined = joined.with_columns(
        pl.max_horizontal(own_day, pl.when(belongs).then("born")).alias("known"),
        *(pl.when(belongs).then(name).alias(name) for name in ("impression_day", "row")),
    )
    with_impression = (number <= pl.col("impression_day")) & (pl.col("known") <= pl.col("born"))
    counted = pl.when(with_impression).then("impression_day").otherwise("known").alias("counted")
    columns = [*PAIR, "timestamp", "value", "good", "reason", "known", "impression_day", "row"]
    return joined.select(*columns, counted)


FOUND: dict[str, pl.DataType] = {
    "action": pl.UInt32(),
    "impression_day": pl.Int32(),
    "row": pl.UInt32(),
    "other": pl.Boolean(),
}


def _impressions(context: Context, action: Action, day: date) -> pl.LazyFrame | None:
    """Keys, time (`shown`), id and place of the impressions that D's actions may belong to."""
    log, parts = context.project.log, []
    for own in _impression_days(context, action, day):
        number = pl.lit((own - EPOCH).days, pl.Int32)
        rows = context.workspace.scan("events", [own]).with_row_index("row")
        identity = pl.lit(None, pl.String) if log.impression is None else pl.col(log.impression)
        parts.append(
            rows.select(
                *PAIR,
                pl.col("timestamp").alias("shown"),
                identity.alias("impression"),
                "row",
                number.alias("impression_day"),
            )
        )
    return pl.concat(parts, how="vertical_relaxed") if parts else None


def _exact(actions: pl.DataFrame, impressions: pl.LazyFrame) -> pl.DataFrame:
    """The impression of each action's id, where there is one.

    Of several it is the first of the action's user and item, and if there is none the first. The
    id of a request has one for each item.
    """
    ids = actions.lazy().select(pl.col("impression").unique())
    found = impressions.join(ids, on="impression", how="semi").collect(engine="streaming")
    found = found.sort("impression_day", "row")
    first = found.unique("impression", keep="first", maintain_order=True)
    same = actions.clear().select("action", "timestamp")
    parts = []
    if first.height < found.height:
        own = found.unique(["impression", *PAIR], keep="first", maintain_order=True)
        same = actions.join(own, on=["impression", *PAIR])
        parts.append(same.select(*FOUND_BEFORE, pl.lit(False).alias("other"), "shown"))
    joined = actions.join(same, on="action", how="anti").join(
        first, on="impression", suffix=" shown"
    )
    other = pl.any_horizontal(pl.col(key).ne_missing(pl.col(f"{key} shown")) for key in PAIR)
    return pl.concat([*parts, joined.select(*FOUND_BEFORE, other.alias("other"), "shown")])


FOUND_BEFORE = ("action", "impression_day", "row")


def _nearest(actions: pl.DataFrame, impressions: pl.LazyFrame) -> pl.DataFrame:
    """The nearest impression of each action's user and item that is not after it, if any."""
    pairs = actions.lazy().select(PAIR).unique()
    found = impressions.join(pairs, on=PAIR, how="semi").drop("impression")
    shown = found.collect(engine="streaming").sort("shown", "impression_day", "row")
    joined = (
        actions.select("action", *PAIR, "timestamp")
        .sort("timestamp")
        .join_asof(
            shown,
            left_on="timestamp",
            right_on="shown",
            by=PAIR,
            strategy="backward",
            check_sortedness=False,
            coalesce=False,
        )
        .filter(pl.col("row").is_not_null())
    )
    return joined.select(*FOUND_BEFORE, pl.lit(False).alias("other"), "shown")


def with_actions(context: Context, rows: pl.LazyFrame, day: date, known: pl.Expr) -> pl.LazyFrame:
    """Impressions of partition D with a column for each action, Float64.

    Args:
        rows: with `EVENT`, the row in the day's events.
        known: which actions count, as an expression over `actions/NAME`.
    """
    log, number = context.project.log, (day - EPOCH).days
    for action in log.actions:
        days = action_days(context, action, day)
        if days:
            own = context.workspace.scan(actions_dataset(action), days)
            own = own.filter((pl.col("impression_day") == number) & known)
            values = own.group_by("row").agg(reduced(action).alias(action.name))
            rows = rows.join(
                values.rename({"row": EVENT}), on=EVENT, how="left", maintain_order="left"
            )
        else:
            rows = rows.with_columns(pl.lit(None, pl.Float64).alias(action.name))
    return rows.with_columns(
        pl.col(a.name).fill_null(a.missing) for a in log.actions if a.missing is not None
    )


def action_days(context: Context, action: Action, day: date) -> list[date]:
    """Published days of an action that may hold actions of the impressions of partition D."""
    last = day + timedelta(days=reach(context.project.log, action))
    days = context.workspace.days(actions_dataset(action))
    return [d for d in days if day - timedelta(days=1) <= d <= last]


def reduced(action: Action) -> pl.Expr:
    """One value of an impression's actions."""
    value = pl.col("value")
    if action.reduce == "any":
        return (value != 0).any().cast(pl.Float64)
    if action.reduce in ("first", "last"):
        ordered = value.sort_by("timestamp", maintain_order=True)
        return ordered.first() if action.reduce == "first" else ordered.last()
    return value.sum() if action.reduce == "sum" else value.max()


def day_before(context: Context, day: date) -> date:
    """The last published day before D, or D without one; what follows it is known on D."""
    return max((d for d in context.workspace.days("events") if d < day), default=day)


def published_actions(context: Context, action: Action, last: date) -> list[date]:
    """Published days of an action that may hold what becomes known on day D."""
    first = day_before(context, last) - timedelta(days=reach(context.project.log, action) + 1)
    days = context.workspace.days(actions_dataset(action))
    return [d for d in days if first <= d <= last]


def actions_digest(
    context: Context, subject: str, days: dict[str, list[date]], which: pl.Expr
) -> str:
    """A hash of those published actions that an expression chooses.

    It changes with the rows that are chosen only: not when a day is joined again.

    Args:
        subject: of the cache.
        days: name of an action → its days.
    """
    workspace = context.workspace
    chosen = [action for action in context.project.log.actions if days.get(action.name)]
    stamp = [
        (action.name, action.reduce, day, workspace.published_fingerprint(dataset, day))
        for action in chosen
        for dataset in [actions_dataset(action)]
        for day in days[action.name]
    ]

    def digest() -> str:
        made = hashlib.sha256()
        for action in chosen:
            rows = workspace.scan(actions_dataset(action), days[action.name]).filter(which)
            content = io.BytesIO()
            columns = [*PAIR, "timestamp", "value", "known", "impression_day", "row", "counted"]
            found = rows.select(columns).collect().rechunk()
            found.write_ipc(content, compression="uncompressed")
            made.update(f"{action.name} {action.reduce} {action.organic} {found.height}".encode())
            made.update(content.getbuffer() if found.height else b"")
        return made.hexdigest()

    return workspace.cached(f"actions of {subject}", fingerprint(which, *stamp), digest)


def touched_days(
    workspace: Workspace, dataset: str, days: list[date], which: pl.Expr
) -> dict[date, pl.DataFrame]:
    """Partition → rows of its impressions that chosen actions belong to."""
    rows = workspace.scan(dataset, days).filter(which & pl.col("row").is_not_null())
    found = rows.select("impression_day", "row").unique().sort("impression_day", "row").collect()
    return {
        EPOCH + timedelta(days=key[0]): part.select("row")
        for key, part in found.partition_by("impression_day", as_dict=True).items()
    }
