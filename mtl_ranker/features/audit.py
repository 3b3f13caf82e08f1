"""An audit for leakage: features of sampled rows, recomputed from what was known before them.

Daily aggregates, their SQL and the published joins of actions are not used. Events and raw actions
that happen or arrive at a row's as-of moment, the start of its day, or later are left out first.
What remains is joined and summed in one step. A feature that differs from the published one has
seen something later, or misses something earlier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from typing import Any

import polars as pl

from mtl_ranker.config import Action, History
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import signal_expressions
from mtl_ranker.features.columns import entity_name, history_features, numeric_features
from mtl_ranker.features.derived import with_computed
from mtl_ranker.features.sql import date_of, day_number
from mtl_ranker.features.tables import join_tables, local_date, scan_events, tables_as_of
from mtl_ranker.features.vectors import with_keys
from mtl_ranker.features.view import examples_dataset
from mtl_ranker.logs.actions import EVENT, PAIR, day_of, end_of, reach, read_actions, reduced

TOLERANCE = 1e-4  # relative, as features are float32 and sums have another order
LEAST = 1e-3  # for numbers near 0


@dataclass(frozen=True)
class Difference:
    """A feature of a row that is not what was known before the row."""

    user_id: Any
    item_id: Any
    feature: str
    published: Any
    recomputed: Any

    def __str__(self) -> str:
        return (
            f"user {self.user_id}, item {self.item_id}: {self.feature} is {self.published}, but "
            f"{self.recomputed} from what was known before"
        )


@dataclass(frozen=True)
class Audit:
    """The result: numbers of compared rows and features, and each difference."""

    day: date
    rows: int
    features: int
    differences: list[Difference]

    def __str__(self) -> str:
        found = len(self.differences)
        return (
            f"{self.rows:,} rows of {self.day}, {self.features} features of each recomputed from "
            f"what was known before: {f'{found:,} values differ' if found else 'all are equal'}"
        )


def audit_day(context: Context, day: date, rows: int, seed: int = 0) -> Audit:
    """Recompute features of `rows` sampled examples of a day.

    Raises ProjectError for a day whose examples are not built.
    """
    dataset = examples_dataset(context)
    if day not in context.workspace.days(dataset):
        raise ProjectError(
            f"examples of {day} are not built; run `mtl-ranker features --date {day}` first"
        )
    every = context.workspace.scan(dataset, [day]).with_row_index("place")
    total = every.select(pl.len()).collect().item()
    places = pl.int_range(total, eager=True).sample(min(rows, total), seed=seed)
    sampled = every.filter(pl.col("place").is_in(places.implode())).drop("place")
    frame = sampled.collect(engine="streaming")
    as_of = pl.lit(day)
    if context.project.log.day_tolerance_hours:
        as_of = pl.min_horizontal(local_date(context.project), as_of)
    features = 0
    differences: list[Difference] = []
    for own in frame.select(as_of.unique().sort()).to_series():
        part = frame.filter(as_of == own)
        recomputed = _Past(context, day, own).features(part)
        features = recomputed.width
        differences += _differences(part, recomputed)
    return Audit(day, frame.height, features, differences)


def _differences(published: pl.DataFrame, recomputed: pl.DataFrame) -> Iterator[Difference]:
    for name in recomputed.columns:
        pair = pl.DataFrame({"before": published[name], "after": recomputed[name]})
        before, after = pl.col("before"), pl.col("after")
        differs = before.ne_missing(after)
        if pair.schema["after"].is_float():
            before, after = before.fill_nan(None), after.fill_nan(None)
            size = pl.max_horizontal(before.abs(), after.abs(), pl.lit(LEAST))
            near = (before - after).abs() <= TOLERANCE * size
            differs = ~near.fill_null(before.is_null() & after.is_null())
        for place in pair.select(differs.alias("differs"))["differs"].arg_true():
            user, item = published["user_id"][place], published["item_id"][place]
            yield Difference(user, item, name, pair["before"][place], pair["after"][place])


@dataclass(frozen=True)
class _Past:
    """What was known at the start of day `as_of`, to rows of partition `day`."""

    context: Context
    day: date
    as_of: date

    def features(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The features of rows, in their order."""
        project = self.context.project
        own = [c for c in rows.columns if c in ("user_id", "item_id", *project.log.context)]
        numbered = rows.lazy().select(own).with_row_index("place")
        tables = tables_as_of(self.context.source, self.as_of)
        tables = with_keys(self.context, tables, numbered, store=False)
        joined_tables = join_tables(tables, numbered)
        keyed = joined_tables.sort("place").drop("place").collect()
        entities, histories = project.features.entities, project.features.histories
        sums: list[list[pl.DataFrame]] = [[] for _ in [[], *entities]]
        positive: list[list[pl.DataFrame]] = [[] for _ in histories]
        logged: set[int] = set()
        for ledger in self._ledgers():
            logged |= set(ledger["day"].unique())
            for found, keys in zip(sums, [[], *entities], strict=True):
                chosen = ledger
                if keys:
                    wanted = keyed.select(keys).unique()
                    types: dict[Any, Any] = dict(wanted.schema)
                    chosen = ledger.join(wanted, on=keys, how="semi").cast(types)
                found.append(chosen.group_by(keys or pl.lit(0).alias("all")).agg(self._sums()))
            for each, history in zip(positive, histories, strict=True):
                turned = ledger.filter(
                    (pl.col(history.signal) > 0)
                    & ~(pl.col(f"{history.signal} before") > 0).fill_null(False)
                )
                each.append(turned.join(rows.select("user_id"), on="user_id", how="semi"))
        computed = with_computed(project, keyed.lazy(), self.as_of).collect()
        parts = [self._of_tables(computed, rows, own)]
        overall = _added(sums[0], ["all"])
        for keys, found in zip(entities, sums[1:], strict=True):
            own_sums = _added(found, keys)
            joined = keyed.select(keys).join(own_sums, on=keys, how="left", maintain_order="left")
            parts.append(self._rates(joined, overall, entity_name(keys), logged))
        for each, history in zip(positive, histories, strict=True):
            parts.append(_latest(history, pl.concat(each, how="vertical_relaxed"), rows))
        return pl.concat(parts, how="horizontal")

    def _of_tables(self, keyed: pl.DataFrame, rows: pl.DataFrame, own: list[str]) -> pl.DataFrame:
        """Columns of the user and item tables, derived features, and the item's age."""
        columns = [pl.col(c).cast(rows.schema[c]) for c in keyed.columns if c in rows.columns]
        if "item_age_days" in numeric_features(self.context.project):
            age = pl.lit(day_number(self.as_of)) - pl.col("item_id_published_day")
            columns.append(age.cast(pl.Float32).alias("item_age_days"))
        return keyed.select(columns).drop(own)

    @property
    def _signals(self) -> list[str]:
        return list(signal_expressions(self.context.project))

    def _start(self, window: int) -> int:
        """The first day of a window; partitions from the longest window before `day` are read."""
        longest = self.context.project.features.windows[-1]
        return max(day_number(self.as_of) - window, day_number(self.day) - longest)

    def _sums(self) -> list[pl.Expr]:
        """Sums of a ledger over each window."""
        found = [pl.col("day").max().alias("last")]
        for window in self.context.project.features.windows:
            inside = pl.col("day") >= self._start(window)
            columns = [
                "impressions",
                *(f"{s}{part}" for s in self._signals for part in (" n", " s")),
            ]
            found += [pl.col(c).filter(inside).sum().alias(f"{c} {window}") for c in columns]
        return found

    def _rates(
        self, sums: pl.DataFrame, overall: pl.DataFrame, prefix: str, logged: set[int]
    ) -> pl.DataFrame:
        """The features of an entity from its sums."""
        features, columns = self.context.project.features, []
        for window in features.windows:
            days = max(1, len([day for day in logged if day >= self._start(window)]))
            shown = pl.col(f"impressions {window}") / days
            columns.append(shown.alias(f"{prefix}_daily_impressions_{window}d"))
            for signal in self._signals:
                total, count = (overall[f"{signal} {part} {window}"].item() for part in "sn")
                prior = total / count if count else float("nan")
                rate = (pl.col(f"{signal} s {window}") + features.smoothing * prior) / (
                    pl.col(f"{signal} n {window}") + features.smoothing
                )
                if features.rates == "relative":
                    rate = rate / prior if prior > 0 else pl.lit(None, pl.Float64)
                columns.append(rate.alias(f"{prefix}_{signal}_rate_{window}d"))
        columns.append((day_number(self.as_of) - pl.col("last")).alias(f"{prefix}_days_since"))
        return sums.select(column.cast(pl.Float32) for column in columns)

    def _ledgers(self) -> Iterator[pl.DataFrame]:
        """What each partition's impressions, and actions without one, add to the days in windows.

        A row for each impression and each day on which it, or an action of it, becomes known:
        `day`, keys, `impressions` (1 on the first day), each signal with its value and the one
        before, and what the signal adds to counts (`n`) and sums (`s`).
        """
        log, workspace = self.context.project.log, self.context.workspace
        late = max((reach(log, action) for action in log.actions), default=0)
        longest = self.context.project.features.windows[-1]
        first = self.day - timedelta(days=longest + (late + 1 if log.actions else 0))
        for own in [d for d in workspace.days("events") if first <= d < self.as_of]:
            rows = scan_events(self.context, [own]).with_row_index(EVENT)
            number = pl.lit(day_number(own), pl.Int32)
            rows = rows.with_columns(
                pl.max_horizontal(day_of(pl.col("timestamp"), log), number).alias("day")
            )
            rows = rows.filter(pl.col("timestamp") < end_of(log, self.as_of - timedelta(days=1)))
            yield self._ledger(rows.collect(engine="streaming"), day_number(own))
        for action in log.actions:
            alone = self._actions[action.name].filter(pl.col("row").is_null())
            if action.organic and alone.height:
                value = pl.col("value") if action.reduce != "any" else pl.col("value") != 0
                own_value = value.cast(pl.Float64).alias(action.name)
                filed = alone.select(*PAIR, "timestamp", "day", own_value).drop_nulls("day")
                for (number,), part in filed.group_by("day", maintain_order=True):
                    yield self._organic(part, date_of(number))

    def _ledger(self, rows: pl.DataFrame, partition: int) -> pl.DataFrame:
        log = self.context.project.log
        moments = [rows.select(EVENT, pl.col("day").alias("born"), "day")]
        born = rows.select(EVENT, pl.col("day").alias("born"))
        own = {}
        for action in log.actions:
            actions = self._actions[action.name].filter(pl.col("impression_day") == partition)
            actions = actions.select(pl.col("row").alias(EVENT), "day", "value", "timestamp")
            actions = actions.join(born, on=EVENT).with_columns(pl.max_horizontal("day", "born"))
            own[action.name] = actions
            moments.append(actions.select(EVENT, "born", "day"))
        every = moments[0]
        if log.actions:
            every = pl.concat(moments).unique().sort(EVENT, "day")
        states = every
        for action in log.actions:
            until = every.join(own[action.name].drop("born"), on=EVENT, suffix=" acted")
            until = until.filter(pl.col("day acted") <= pl.col("day"))
            value = until.group_by(EVENT, "day").agg(reduced(action).alias(action.name))
            states = states.join(value, on=[EVENT, "day"], how="left", maintain_order="left")
            if action.missing is not None:
                states = states.with_columns(pl.col(action.name).fill_null(action.missing))
        states = states.join(rows.drop("day"), on=EVENT, maintain_order="left")
        is_birth = pl.col("day") == pl.col("born")
        joined = join_tables(tables_as_of(self.context.source, date_of(partition)), states.lazy())
        return self._signalled(joined, is_birth.cast(pl.Int64), counted=True)

    def _organic(self, rows: pl.DataFrame, day: date) -> pl.DataFrame:
        events = scan_events(self.context, [self.context.workspace.days("events")[-1]])
        blank = events.with_row_index(EVENT).head(0).collect()
        blank = blank.with_columns(
            pl.lit(None, pl.Float64).alias(action.name)
            for action in self.context.project.log.actions
        )
        actions = pl.concat([blank, rows], how="diagonal_relaxed").lazy()
        joined = join_tables(tables_as_of(self.context.source, day), actions)
        return self._signalled(joined, pl.lit(0, pl.Int64), counted=False)

    def _signalled(self, joined: pl.LazyFrame, impressions: pl.Expr, counted: bool) -> pl.DataFrame:
        """A ledger of rows, which are joined to the tables.

        Args:
            counted: whether the rows are impressions, in order of their changes.
        """
        signals = signal_expressions(self.context.project)
        features = self.context.project.features
        keys = {"user_id", "item_id", *(key for keys in features.entities for key in keys)}
        keys |= {column for history in features.histories for column in history.columns}
        found = joined.select(
            EVENT, "day", "timestamp", *keys, impressions.alias("impressions"),
            *(expression.alias(f"{name} now") for name, expression in signals.items()),
        )  # fmt: skip
        columns = []
        for name in signals:
            now = pl.col(f"{name} now")
            again = pl.col(EVENT) == pl.col(EVENT).shift(1)
            before = pl.when(again).then(now.shift(1)) if counted else pl.lit(None, pl.Float64)
            present = now.is_not_null().cast(pl.Int64) - before.is_not_null().cast(pl.Int64)
            columns += [
                now.alias(name),
                before.alias(f"{name} before"),
                (present if counted else pl.lit(0, pl.Int64)).alias(f"{name} n"),
                (now.fill_null(0.0) - before.fill_null(0.0)).alias(f"{name} s"),
            ]
        ordered = found.sort(EVENT, "day") if self.context.project.log.actions else found
        ledger = ordered.with_columns(columns).filter(
            (pl.col("day") < day_number(self.as_of))
            & (pl.col("day") >= self._start(features.windows[-1]))
        )
        return ledger.collect(engine="streaming")

    @cached_property
    def _actions(self) -> dict[str, pl.DataFrame]:
        """Each action's rows that are known before the moment, with their impression.

        `day` is the day on which a row is known, or the next one with events.
        """
        return {action.name: self._known(action) for action in self.context.project.log.actions}

    @property
    def _latest_action(self) -> int:
        """Days after an impression in which it may change; its earlier actions, of any kind, count.

        That of all actions: a return reads the purchase before it.
        """
        log = self.context.project.log
        return max(reach(log, action) for action in log.actions)

    def _known(self, action: Action) -> pl.DataFrame:
        log, workspace = self.context.project.log, self.context.workspace
        late = self._latest_action
        longest = self.context.project.features.windows[-1]
        first, published = (
            self.day - timedelta(days=longest + 2 * late + 2),
            workspace.days("events"),
        )
        first = max(first, published[0] - timedelta(days=1 if log.day_tolerance_hours else 0))
        moment = end_of(log, self.as_of - timedelta(days=1))
        parts = []
        for filed in self.context.source.actions(action.name).days():
            if first <= filed < self.as_of:
                rows = read_actions(self.context, action, filed)
                filed_on = pl.lit(day_number(filed), pl.Int32)
                known = pl.max_horizontal(day_of(pl.col("at"), log), filed_on).alias("day")
                known_rows = rows.filter(pl.col("good") & (pl.col("at") < moment))
                parts.append(known_rows.with_columns(known))
        if not parts:
            nothing = read_actions(self.context, action, date.min).with_columns(
                pl.lit(None, pl.Int32).alias("day")
            )
            parts = [nothing]
        actions = pl.concat(parts, how="vertical_relaxed").with_row_index("action")
        joined = self._belonging(action, actions, published)
        with_events = {day_number(d) for d in published}
        numbers = range(min(with_events) - 2, day_number(self.as_of) + 1)
        following = {n: min((d for d in with_events if d >= n), default=None) for n in numbers}
        return joined.with_columns(pl.col("day").replace_strict(following, return_dtype=pl.Int32))

    def _belonging(
        self, action: Action, actions: pl.DataFrame, published: list[date]
    ) -> pl.DataFrame:
        """The actions with `impression_day` and `row`, null for those without an impression."""
        log, parts = self.context.project.log, []
        back = self.context.project.features.windows[-1] + 3 * self._latest_action + 2
        first = self.day - timedelta(days=back)
        first = min(first, published[-1])
        for own in [d for d in published if d >= first and d <= self.day + timedelta(days=1)]:
            rows = scan_events(self.context, [own]).with_row_index("row")
            identity = pl.lit(None, pl.String) if log.impression is None else pl.col(log.impression)
            chosen = rows.select(
                *PAIR, pl.col("timestamp").alias("shown"), identity.alias("id"), "row",
                pl.lit(day_number(own), pl.Int32).alias("impression_day"),
            )  # fmt: skip
            parts.append(chosen)
        impressions = pl.concat(parts, how="vertical_relaxed")
        schema = impressions.collect_schema()
        actions = actions.cast({key: schema[key] for key in PAIR}, strict=False)
        places = ["shown", "impression_day", "row"]
        pairs = (
            actions.lazy().join(impressions, on=PAIR).filter(pl.col("shown") <= pl.col("timestamp"))
        )
        unnamed = pl.col("impression").is_null() | pl.col("id").is_null()
        nearest = pairs.filter(unnamed).sort(places).group_by("action").last()
        found = nearest.select("action", *places).collect()
        if log.impression is not None and action.impression is not None:
            named = actions.filter(pl.col("impression").is_not_null())
            named = named.cast({"impression": schema["id"]}, strict=False)
            exact = named.lazy().join(
                impressions, left_on="impression", right_on="id", suffix=" of id"
            )
            same = pl.all_horizontal(pl.col(key) == pl.col(f"{key} of id") for key in PAIR)
            exact = exact.with_columns(same.fill_null(False).alias("same"))
            # An id of a request is that of several items.
            ranked = exact.sort(~pl.col("same"), "impression_day", "row")
            exact = ranked.group_by("action").first()
            fits = (pl.col("shown") <= pl.col("timestamp")) & pl.col("same")
            own_id = exact.select("action", *(pl.when(fits).then(c).alias(c) for c in places))
            chosen_ids = own_id.collect()
            others = found.join(chosen_ids, on="action", how="anti")
            found = pl.concat([others, chosen_ids.select(others.columns)], how="vertical_relaxed")
        joined = actions.join(found, on="action", how="left", maintain_order="left")
        inside = (pl.col("at") - pl.col("shown")) <= action.span
        return joined.with_columns(pl.when(inside).then(c).alias(c) for c in places[1:])


def _added(parts: list[pl.DataFrame], keys: list[str]) -> pl.DataFrame:
    """Sums of sums, by key."""
    rows = pl.concat(parts, how="vertical_relaxed")
    sums = [pl.col(c).sum() for c in rows.columns if c not in {*keys, "last"}]
    return rows.group_by(keys).agg(pl.col("last").max(), *sums)


def _latest(history: History, positive: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Each row's history from its user's rows on which the signal becomes positive."""
    ordered = positive.unique().sort(
        ["day", "timestamp", "item_id"], descending=[True, True, False], maintain_order=True
    )
    firsts = [
        pl.col(c).list.first().alias(c) if isinstance(ordered.schema[c], pl.List) else pl.col(c)
        for c in history.columns
    ]
    lists = (
        ordered.with_columns(firsts)
        .group_by("user_id", maintain_order=True)
        .agg(pl.col(c).head(history.length).alias(history.feature(c)) for c in history.columns)
    )
    joined = rows.select("user_id").join(lists, on="user_id", how="left", maintain_order="left")
    types: dict[Any, Any] = {name: rows.schema[name] for name in history_features(history)}
    return joined.select(history_features(history)).cast(types)
