"""The contract that events must fulfil, as a dataframely schema built from the project file.

A bad row is quarantined with every reason that applies to it; it is never repaired or dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import polars as pl

from mtl_ranker.config import (
    GIVEN,
    STRAY,
    TOO_LARGE,
    UNEVEN,
    Action,
    Log,
    Objective,
    Project,
    Range,
)
from mtl_ranker.errors import ProjectError, first_line

if TYPE_CHECKING:
    import dataframely as dy

MUST_BE_TEXT = "is 2**63 or more (allowed as text)"
REPEATED = "in the partition of the day before"  # a column while a day is checked

# Names of dataframely's column types. dataframely is imported only where a contract is built: the
# import takes a third of a second, and most commands check no log.
COLUMN_TYPES: dict[Any, str] = {
    pl.Int8: "Int8",
    pl.Int16: "Int16",
    pl.Int32: "Int32",
    pl.Int64: "Int64",
    pl.UInt8: "UInt8",
    pl.UInt16: "UInt16",
    pl.UInt32: "UInt32",
    pl.UInt64: "UInt64",
    pl.String: "String",
    pl.Boolean: "Bool",
}


@dataclass(frozen=True)
class Rule:
    """A rule of the contract.

    Attributes:
        holds: whether a row fulfils it; null counts as yes.
        shown: the value that a message shows of a row that breaks it; None to show none.
    """

    holds: pl.Expr
    shown: pl.Expr | None = None


@dataclass(frozen=True)
class Checked:
    """A day's rows, divided into good and bad ones.

    Attributes:
        bad: with a column `reason`.
        rows: number of all rows.
        shown: reason → the value that breaks the rule, as an expression over `bad`.
    """

    good: pl.LazyFrame
    bad: pl.DataFrame
    rows: int
    shown: Mapping[str, pl.Expr] = field(default_factory=dict)

    @property
    def bad_share(self) -> float:
        return self.bad.height / self.rows if self.rows else 0.0

    def reasons(self) -> dict[str, int]:
        """Number of rows for each reason, the most frequent first."""
        counts = self.bad.select(pl.col("reason").str.split("; ").explode().value_counts(sort=True))
        return {row["reason"]: row["count"] for row in counts.unnest("reason").to_dicts()}

    def examples(self, reason: str, most: int = 3) -> list[Any]:
        """Up to `most` different values that break a rule."""
        if reason not in self.shown:
            return []
        rows = self.bad.filter(pl.col("reason").str.split("; ").list.contains(reason))
        values = rows.select(self.shown[reason].alias("value"))["value"]
        return values.unique(maintain_order=True).head(most).to_list()

    def table(self) -> list[str]:
        """A line for each reason: number of rows, reason, values."""
        lines = []
        for reason, count in self.reasons().items():
            values = ", ".join(map(str, self.examples(reason)))
            lines.append(f"    {count:>9,}  {reason}{f': {values}' if values else ''}")
        return lines


def label_expression(expression: str, place: str) -> pl.Expr:
    """A SQL expression over the event as a polars expression of Float64. Raises ProjectError."""
    try:
        return pl.sql_expr(expression).cast(pl.Float64)
    except pl.exceptions.PolarsError as error:
        reason = first_line(error)
        raise ProjectError(f"{place}: {expression!r} is no SQL expression ({reason})") from error


def derived_columns(project: Project) -> dict[str, pl.Expr]:
    """Each objective's label and each signal as an expression over the event; null = missing.

    A label that reads an action is also missing where its value is not allowed. Otherwise the row
    is quarantined, which it cannot be for an action that comes later.
    """
    derived: dict[str, pl.Expr] = {}
    for index, objective in enumerate(project.objectives):
        label = _label(objective, f"objectives[{index}] ({objective.name})")
        if label_actions(project, [objective]):
            label = pl.when(_allowed(objective, label)[0]).then(label)
        derived[objective.name] = label
    for name, expression in project.features.signals.items():
        derived[name] = label_expression(expression, f"features.signals.{name}")
    return derived


def _label(objective: Objective, place: str) -> pl.Expr:
    label = label_expression(objective.label, f"{place}.label")
    if objective.lowest:
        label = label - objective.lowest
    if objective.where is None:
        return label
    return pl.when(label_expression(objective.where, f"{place}.where") == 1.0).then(label)


def _allowed(objective: Objective, label: pl.Expr) -> tuple[pl.Expr, str]:
    """Whether a label that is present has an allowed value, and the reason where it has not."""
    if objective.kind == "binary":
        return label.is_in([0.0, 1.0]), "neither 0 nor 1"
    if objective.kind == "ordinal":
        fits = label.is_in([float(n) for n in range(objective.level_count)])
        return fits, f"not in {objective.lowest}..{objective.lowest + objective.level_count - 1}"
    low = label > -1 if objective.transform == "log1p" else pl.lit(True)
    low = label >= 0 if objective.kind == "watch_time" else low
    return label.is_finite() & low, "not finite or out of range"


def label_actions(project: Project, objectives: Sequence[Objective] | None = None) -> list[Action]:
    """The actions that labels read.

    Args:
        objectives: whose labels; None for all.
    """
    if not project.log.actions:
        return []
    chosen = project.objectives if objectives is None else objectives
    texts = [text for o in chosen for text in (o.label, o.where)]
    named = [text for text in texts if text is not None]
    read = {name for text in named for name in label_expression(text, text).meta.root_names()}
    return [action for action in project.log.actions if action.name in read]


def action_values(action: Action) -> dict[str, object]:
    """What decides the values that an action gives to impressions: how its files are read.

    Where the files are is no part of it (`path`, `format`, `version`): a stream that moved has the
    same actions, and a model that was trained on it the same labels. Nor is `organic`, which
    concerns actions without an impression.
    """
    settings = action.model_dump(exclude={"path", "format", "version", "organic"})
    return settings | {"window": action.span}  # "1d" is "24h"


def label_definition(project: Project, objective: Objective) -> tuple[object, ...]:
    """What decides an objective's label; models with another one cannot be compared on it.

    Of the actions that the label reads it has what decides their values (`action_values`).
    """
    o = objective
    actions = {a.name: action_values(a) for a in label_actions(project, [objective])}
    return o.kind, o.label, o.where, o.transform, o.levels, actions


MOST_CASES = 100_000
RATIOS = (1.25, 2.0, 10.0)  # of the values of an action that are tried; the first that is cheap
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def may_fall(project: Project, objective: Objective) -> bool:
    """Whether a further action can make another value of a label that is 1; True for numbers.

    A label that is 1 stays 1 if it does so wherever one action's value rises. This is tried with
    the values at, below and above each number and each constant part of the label's expressions
    (`60 * 10`), and with a geometric series of values. A value itself can fall with `reduce` first
    or last, and as a sum, as values may be negative. The answer is True for a label that cannot be
    tried.
    """
    actions = label_actions(project, [objective])
    falling = [a for a in actions if a.value and a.reduce in ("first", "last", "sum")]
    if objective.kind != "binary" or falling:
        return True
    label = _label(objective, objective.name)
    texts = f"{objective.label} {objective.where or ''}"
    numbers = _constants(texts) | {0.0, 1.0}
    words = [*re.findall(r"'([^']*)'", texts), "another"]
    others = sorted({n + step for n in numbers for step in (-1, 0, 1)})
    for given in (others, words):
        grid = _cases_of(actions, label, numbers, given)
        if grid is None:
            return True
        cases = pl.DataFrame()
        for name, column in grid.items():
            own = pl.DataFrame({name: column})
            cases = own if cases.is_empty() else cases.join(own, how="cross")
        try:
            cases = cases.with_columns((label == 1).fill_null(False).alias("is 1"))
        except pl.exceptions.PolarsError:  # the other columns are of another type
            continue
        return any(_falls(cases, action.name) for action in actions)
    return True


def _cases_of(
    actions: Sequence[Action], label: pl.Expr, numbers: set[float], given: Sequence[Any]
) -> dict[str, Sequence[Any]] | None:
    """The values to try of each column that a label reads; None where these are too many.

    Args:
        numbers: of the label's expressions.
        given: values of the columns that are no actions.
    """
    for ratio in RATIOS:
        count = math.ceil(math.log(1e12, ratio))
        near = {max(0.0, n + step) for n in numbers for step in (-1, -0.5, 0, 0.5, 1)}
        near |= {1e-3 * ratio**power for power in range(count + 1)}
        grid: dict[str, Sequence[Any]] = {}
        for action in actions:
            values = near
            if action.value is None and action.reduce == "sum":  # a number of actions
                values = {float(math.ceil(n)) for n in near}
            elif action.value is None or action.reduce == "any":
                values = {0.0, 1.0}
            grid[action.name] = [*([] if action.missing == 0 else [None]), *sorted(values)]
        grid |= {name: given for name in label.meta.root_names() if name not in grid}
        if math.prod(len(each) for each in grid.values()) <= MOST_CASES:
            return grid
    return None


def _constants(text: str) -> set[float]:
    """The numbers of a SQL text, and the values of its parts that are made of numbers alone."""
    found = set()
    for part in re.findall(rf"(?:(?<![\w.]){NUMBER}|[-+*/()\s])+", text):
        tokens = re.findall(rf"{NUMBER}|[-+*/()]", part)
        for start in range(len(tokens)):
            for end in range(start + 1, len(tokens) + 1):
                value = _value_of(" ".join(tokens[start:end]))
                if value is not None and math.isfinite(value):
                    found.add(value)
    return found


def _value_of(text: str) -> float | None:
    """The value of a SQL expression without columns; None for what is none."""
    try:
        return pl.select(pl.sql_expr(text).cast(pl.Float64)).item()
    except pl.exceptions.PolarsError:
        return None


def _falls(cases: pl.DataFrame, action: str) -> bool:
    """Whether a label is 1 for a value of an action, and not for a higher one of the same case."""
    fixed = [name for name in cases.columns if name not in (action, "is 1")]
    before = pl.col("is 1").cast(pl.Int8).cum_max()
    was = before.over(fixed) if fixed else before
    ordered = cases.sort(action, nulls_last=False, maintain_order=True)
    return bool(ordered.select((was.cast(pl.Boolean) & ~pl.col("is 1")).any()).item())


def unusable_labels(project: Project) -> dict[str, pl.Expr]:
    """Reason → number of rows whose label reads an action and is not allowed."""
    counts: dict[str, pl.Expr] = {}
    for index, objective in enumerate(project.objectives):
        if label_actions(project, [objective]):
            label = _label(objective, f"objectives[{index}] ({objective.name})")
            fits, problem = _allowed(objective, label)
            counts[f"label of {objective.name} {problem}"] = (label.is_not_null() & ~fits).sum()
    return counts


def used_columns(project: Project) -> set[str]:
    """Columns of the log that any setting reads, beside those that `[log]` maps to other names.

    Features may also be columns of the user and item tables, which the log does not have. Names of
    actions are no columns of the log.
    """
    log, features = project.log, project.features
    used = {*log.context, *log.required, *log.ranges, *log.unique, *log.list_columns}
    used |= {log.random_exposure} if log.random_exposure is not None else set()
    texts = [text for o in project.objectives for text in (o.label, o.where)]
    texts += [*features.signals.values(), project.training.sample_weight]
    for text in texts:
        if text is not None:
            used |= set(label_expression(text, text).meta.root_names())
    used |= {key for keys in features.entities for key in keys}
    used |= {c.column for c in features.categoricals} | {c.column for c in features.lists}
    used |= {*features.numerics, *(c for h in features.histories for c in h.columns)}
    used |= {log.impression} if log.impression is not None else set()
    return used - {action.name for action in log.actions}


def check_expressions(
    project: Project, schema: pl.Schema, place: str, columns: Sequence[str]
) -> None:
    """Raise ProjectError unless every label and signal can be computed on a log of this schema.

    Args:
        columns: all columns of the log, for the message.
    """
    known = schema.names()
    schema = pl.Schema(schema | {action.name: pl.Float64() for action in project.log.actions})
    empty = pl.DataFrame(schema=schema).lazy()
    texts = {o.name: o.label for o in project.objectives} | project.features.signals
    derived = derived_columns(project)
    if project.training.sample_weight is not None:
        texts["training.sample_weight"] = project.training.sample_weight
        derived["training.sample_weight"] = label_expression(
            project.training.sample_weight, "training.sample_weight"
        )
        late = set(derived["training.sample_weight"].meta.root_names()) - set(known)
        if late & {action.name for action in project.log.actions}:
            raise ProjectError(
                f"training.sample_weight: {project.training.sample_weight!r} reads an action "
                f"({', '.join(sorted(late))}); allowed: columns of the log, {', '.join(columns)}"
            )
    for name, expression in derived.items():
        try:
            empty.select(expression).collect()
        except pl.exceptions.ColumnNotFoundError as error:
            missing = ", ".join(repr(c) for c in expression.meta.root_names() if c not in schema)
            raise ProjectError(
                f"{place}: {name!r} = {texts[name]!r} needs column {missing}, which is missing; "
                f"it has: {', '.join([*columns, *(a.name for a in project.log.actions)])}"
            ) from error
        except pl.exceptions.PolarsError as error:
            reason = first_line(error)
            raise ProjectError(f"{place}: {name!r} = {texts[name]!r}: {reason}") from error


def event_schema(project: Project, schema: pl.Schema, day: date) -> type[dy.Schema]:
    """The contract of one day's events with these columns, as a dataframely schema.

    The names of its rules become the reasons in the quarantine.
    """
    import dataframely as dy

    log = project.log
    never_null = _never_null(log)
    if GIVEN in schema:
        never_null -= {"timestamp"}
    never_null -= {name.removesuffix(TOO_LARGE) for name in schema if name.endswith(TOO_LARGE)}
    members: dict[str, Any] = {}
    for name, dtype in schema.items():
        members[name] = _column(dtype, name not in never_null)
    for name, rule in contract_rules(project, schema, day).items():
        members[name] = _rule(rule.holds)
    return type("EventContract", (dy.Schema,), members)


def _never_null(log: Log) -> set[str]:
    """Columns without which a row breaks the contract."""
    columns = {"user_id", "item_id", "timestamp", "date", *log.required}
    return columns | ({"propensity"} if log.propensity else set())


def contract_rules(project: Project, schema: pl.Schema, day: date) -> dict[str, Rule]:
    """Reason → rule, of all that is more than the type of a column."""
    log, labels = project.log, derived_columns(project)
    timestamp, rules = pl.col("timestamp"), {}
    for name, allowed in log.ranges.items():
        column = pl.col(name)
        rules[f"{name} {outside(allowed)}"] = Rule(within(column, allowed), column)
    if GIVEN in schema:
        rules["timestamp missing"] = Rule(pl.col(GIVEN))
        rules["timestamp is no valid time"] = Rule(timestamp.is_not_null() | ~pl.col(GIVEN))
    rules["timestamp outside the day"] = Rule(inside_day(log, day), timestamp)
    if STRAY in schema:
        rules["clicked, but no item of its request"] = Rule(~pl.col(STRAY), pl.col("item_id"))
    for flag in (name for name in schema if name.endswith(TOO_LARGE)):
        name = flag.removesuffix(TOO_LARGE)
        if name in _never_null(log):
            rules[f"{name} missing"] = Rule(pl.col(name).is_not_null() | pl.col(flag))
        rules[f"{name} {MUST_BE_TEXT}"] = Rule(~pl.col(flag))
    for flag in (name for name in schema if name.endswith(UNEVEN)):
        reason = f"{flag.removesuffix(UNEVEN)} has another length than the items"
        rules[reason] = Rule(~pl.col(flag))
    columns = ", ".join(log.unique)
    key = pl.concat_str(pl.col(log.unique).cast(pl.String), separator=" ")
    first = pl.struct(log.unique).is_first_distinct()
    rules[f"duplicate of an earlier row in {columns}"] = Rule(first, key)
    if REPEATED in schema:
        name = f"duplicate of a row of the day before in {columns}"
        rules[name] = Rule(pl.col(REPEATED).is_null(), key)
    for objective in project.objectives:
        label = labels[objective.name]
        if label_actions(project, [objective]):
            continue
        fits, problem = _allowed(objective, label)
        name = f"label of {objective.name} {problem}"
        rules[name] = Rule(label.is_null() | fits, label + objective.lowest)
    if project.training.sample_weight is not None:
        weight = label_expression(project.training.sample_weight, "training.sample_weight")
        fits = (weight.is_finite() & (weight >= 0)).fill_null(False)
        rules["sample weight missing, negative or not finite"] = Rule(fits, weight)
    if log.propensity:
        share = pl.col("propensity")
        fits = share.is_null() | ((share > 0) & (share <= 1))
        rules["propensity not in (0, 1]"] = Rule(fits, share)
    return rules


def check_events(
    project: Project,
    lazy: pl.LazyFrame,
    day: date,
    place: str,
    columns: Sequence[str] | None = None,
) -> Checked:
    """Divide one day's canonical rows into good ones, and bad ones with their reasons.

    `columns` are all columns of the log, where `lazy` has only those that are used.
    Raises ProjectError where a setting names a column that is missing.
    """
    schema = lazy.collect_schema()
    for name in project.log.unique:
        if name not in schema:
            raise ProjectError(
                f"log.unique: no column {name!r}; after mapping {place} has: "
                f"{', '.join(schema.names())}"
            )
    for index, action in enumerate(project.log.actions):
        if action.name in {*schema.names(), *(columns or [])}:
            raise ProjectError(
                f"log.actions[{index}].name: {action.name!r} is also a column of {place}; allowed: "
                "any other name"
            )
    if "reason" in schema:
        raise ProjectError(
            f"{place}: column 'reason' has the name of the quarantine's column; rename it in "
            "the log"
        )
    marks = (GIVEN, REPEATED, STRAY)
    own = [n for n in schema.names() if n not in marks and not n.endswith((UNEVEN, TOO_LARGE))]
    check_expressions(project, schema, place, columns or own)
    rows = lazy.select(pl.len()).collect(engine="streaming").item()
    contract = event_schema(project, schema, day)
    made = contract_rules(project, schema, day).items()
    shown = {reason: rule.shown for reason, rule in made if rule.shown is not None}
    divided: Any = contract.filter(lazy, eager=False)  # type: ignore[call-overload]
    details = divided.failure.details()
    rules = [c for c in details.columns if c not in schema]
    reason = pl.concat_str(
        [pl.when(pl.col(rule) == "invalid").then(pl.lit(_reason(rule))) for rule in rules],
        separator="; ",
        ignore_nulls=True,
    )
    bad = details.with_columns(reason.alias("reason")).select(*own, "reason")
    return Checked(divided.result.select(own), bad, rows, shown)


def in_both(log: Log, day: date) -> pl.Expr:
    """Whether a row's timestamp may lie in the partition of D and in that of the day before."""
    return inside_day(log, day) & inside_day(log, day - timedelta(days=1))


def with_repeated(log: Log, rows: pl.LazyFrame, earlier: pl.LazyFrame, day: date) -> pl.LazyFrame:
    """Day D's rows with `REPEATED`, which is null unless a row is also in `earlier`.

    Rows are equal if they are in `log.unique`.

    Args:
        earlier: good rows of the day before.
    """
    schema, either = rows.collect_schema(), in_both(log, day)
    types: dict[Any, Any] = {name: schema[name] for name in log.unique}
    known = earlier.filter(either).select(log.unique).cast(types, strict=False).unique()
    joined = rows.join(
        known.with_columns(pl.lit(True).alias(REPEATED)),
        on=log.unique,
        how="left",
        maintain_order="left",
    )
    return joined.with_columns(pl.when(either).then(REPEATED).alias(REPEATED))


def _column(dtype: pl.DataType, nullable: bool) -> Any:
    import dataframely as dy

    if dtype in (pl.Float32, pl.Float64):
        kind = dy.Float32 if dtype == pl.Float32 else dy.Float64
        return kind(nullable=nullable, allow_inf=False, allow_nan=False)
    if isinstance(dtype, pl.Datetime):
        unit: Any = dtype.time_unit
        zone: Any = dtype.time_zone
        return dy.Datetime(nullable=nullable, time_unit=unit, time_zone=zone)
    if dtype == pl.Date:
        return dy.Date(nullable=nullable)
    for known, column in COLUMN_TYPES.items():
        if dtype == known:
            return getattr(dy, column)(nullable=nullable)
    return dy.Any()


def _rule(expression: pl.Expr) -> Any:
    import dataframely as dy

    return dy.rule()(lambda cls: expression.fill_null(True))


def within(column: pl.Expr, allowed: Range) -> pl.Expr:
    """Whether a column's values are null or lie in an interval."""
    inside = pl.lit(True)
    if allowed.min is not None:
        inside = inside & (column >= allowed.min)
    if allowed.max is not None:
        inside = inside & (column <= allowed.max)
    return column.is_null() | inside


def inside_day(log: Log, day: date, column: str = "timestamp") -> pl.Expr:
    """Whether a row's time lies in the day of its partition, or near it as allowed."""
    zone = ZoneInfo(log.timezone)
    tolerance = timedelta(hours=log.day_tolerance_hours)
    start = datetime(day.year, day.month, day.day, tzinfo=zone)
    following = day + timedelta(days=1)
    end = datetime(following.year, following.month, following.day, tzinfo=zone)
    first, last = (start - tolerance), (end + tolerance)
    utc = ZoneInfo("UTC")
    time = pl.col(column)
    return (time >= first.astimezone(utc)) & (time < last.astimezone(utc))


def outside(allowed: Range) -> str:
    """What is wrong with a value outside an interval, such as `outside [0, inf]`."""
    low = "-inf" if allowed.min is None else f"{allowed.min:g}"
    high = "inf" if allowed.max is None else f"{allowed.max:g}"
    return f"outside [{low}, {high}]"


def _reason(rule: str) -> str:
    """The reason for a broken rule; dataframely's own rules are named `column|kind`."""
    column, _, kind = rule.partition("|")
    problem = {"nullability": "missing", "nan": "NaN", "inf": "infinite"}.get(kind, kind)
    return f"{column} {problem}" if kind else rule
