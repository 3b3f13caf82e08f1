"""Point-in-time features: windows over the daily aggregates of days before D.

Windows of day D read days strictly before D only, so that its features do not depend on what
happens on day D. The same SQL joins them to impressions (training) and to candidates (scoring).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import polars as pl

from mtl_ranker.config import History, Project
from mtl_ranker.context import Context
from mtl_ranker.features.aggregates import history_days
from mtl_ranker.features.columns import (
    aggregate_feature_names,
    entity_name,
    feature_columns,
    history_features,
    numeric_features,
    signal_names,
)
from mtl_ranker.features.derived import check_derived, columns_of_derived, with_computed
from mtl_ranker.features.sql import day_number, run_sql
from mtl_ranker.features.tables import join_tables, local_date, tables_as_of
from mtl_ranker.features.vectors import with_keys
from mtl_ranker.features.view import aggregate_dataset, history_dataset, view_sql
from mtl_ranker.logs.blocks import users_between


@dataclass(frozen=True)
class AsOf:
    """The features known at the start of day D.

    Attributes:
        tables: user and item table, by their key.
        entities: a table of features for each entity and each history.
        sql: template name → text.
    """

    project: Project
    day: date
    tables: dict[str, pl.LazyFrame]
    entities: list[Entity]
    sql: dict[str, str]

    @classmethod
    def build(
        cls,
        context: Context,
        rows: pl.LazyFrame,
        day: date,
        known: Sequence[date] | None = None,
    ) -> AsOf:
        """Compute the windows before D for the users and items in `rows`.

        Keys are cast to the types that `rows` have.

        Args:
            known: the aggregated days to read, of those before D; None for all in the windows.
        """
        features = context.project.features
        given = tables_as_of(context.source, day)
        schema = join_tables(given, rows).collect_schema()
        check_derived(context.project, schema)
        filters = {"user_id", "item_id"} & {key for keys in features.entities for key in keys}
        filters |= {"user_id"} if features.histories else set()
        uniques = [rows.select(key).unique() for key in filters if key in rows.collect_schema()]
        values = {frame.columns[0]: frame.to_series() for frame in pl.collect_all(uniques)}
        days = history_days(context, day) if known is None else [d for d in known if d < day]
        lookback = _Lookback(day=day, days=days, values=values, schema=schema)
        windows = [_window_query(context, lookback, keys) for keys in features.entities]
        # Collected here: planning one query over all entities takes 20 times as long.
        tables = pl.collect_all(windows, engine="streaming")
        entities = [
            Entity(
                f"entity_{entity_name(keys)}",
                keys,
                aggregate_feature_names(context.project, keys),
                table,
            )
            for keys, table in zip(features.entities, tables, strict=True)
        ]
        entities += [_history(context, lookback, history) for history in features.histories]
        return cls(context.project, day, given, entities, view_sql(context))

    def join(self, rows: pl.LazyFrame, only: Collection[str] | None = None) -> pl.LazyFrame:
        """Join features to `rows`: impressions, candidates, or some columns of candidates.

        The user and the item table are joined where the rows have their key, and derived features
        are computed where they have the columns.

        Args:
            only: names of the entities to join; None for all.
        """
        joined = with_computed(self.project, join_tables(self.tables, rows), self.day)
        return self.join_windows(joined, only)

    def join_windows(self, rows: pl.LazyFrame, only: Collection[str] | None = None) -> pl.LazyFrame:
        """The same without the user and item tables, and derived features."""
        chosen = [e for e in self.entities if only is None or e.name in only]
        frames = {"rows": rows} | {e.name: e.table.lazy() for e in chosen}
        items = self.project.log.items
        has_age = items is not None and items.published
        present = rows.collect_schema().names()
        published = "item_id_published_day" if has_age else None
        joined = run_sql(
            self.sql["features/join.sql"],
            frames,
            entities=[{"name": e.name, "keys": e.keys, "features": e.features} for e in chosen],
            published=published if published in present else None,
            as_of=day_number(self.day),
        )
        computed = {*self.project.features.numerics, "item_age_days"}
        numbers = sorted(set(numeric_features(self.project)) & computed)
        present = joined.collect_schema().names()
        return joined.with_columns(pl.col(c).cast(pl.Float32) for c in numbers if c in present)


@dataclass(frozen=True)
class Entity:
    """Features of one entity or history.

    Attributes:
        keys: columns by which the table is joined.
        features: its other columns.
        table: one row per distinct key.
    """

    name: str
    keys: list[str]
    features: list[str]
    table: pl.DataFrame


@dataclass(frozen=True, kw_only=True)
class _Lookback:
    """Which aggregates are read for day D.

    Attributes:
        day: D.
        days: aggregated days before D, as far back as the longest window.
        values: user_id and item_id → values that are needed; all where a key is missing here.
        schema: types of the keys.
    """

    day: date
    days: list[date]
    values: dict[str, pl.Series]
    schema: pl.Schema


def _window_query(context: Context, lookback: _Lookback, keys: list[str]) -> pl.LazyFrame:
    """The windows of one entity: its keys, and `aggregate_feature_names`."""
    features, workspace = context.project.features, context.workspace
    names, schema = aggregate_feature_names(context.project, keys), lookback.schema
    if not lookback.days:
        columns: dict[str, Any] = {k: schema[k] for k in keys}
        columns |= dict.fromkeys(names, pl.Float32)
        return pl.LazyFrame(schema=columns)
    daily = workspace.scan(aggregate_dataset(context, keys), lookback.days)
    for key in lookback.values.keys() & set(keys):
        daily = daily.filter(_needed(key, lookback.values[key]))
    totals = workspace.scan(aggregate_dataset(context, []), lookback.days)
    windows = run_sql(
        view_sql(context)["features/windows.sql"],
        {"daily": daily, "totals": totals},
        keys=keys,
        prefix=entity_name(keys),
        signals=signal_names(context.project),
        windows=features.windows,
        longest=features.windows[-1],
        smoothing=features.smoothing,
        relative=features.rates == "relative",
        as_of=day_number(lookback.day),
    )
    casts = {k: schema[k] for k in keys if schema[k] != pl.Null}
    casts |= dict.fromkeys(names, pl.Float32())
    return windows.cast(casts)  # type: ignore[arg-type]


def _needed(key: str, values: pl.Series) -> pl.Expr:
    """Whether a row's key is one of some values.

    By the least and the greatest user, row groups of large days without these users are not read.
    """
    needed = pl.col(key).is_in(values.implode())
    if key == "user_id" and len(values):
        needed = users_between(values.min(), values.max()) & needed
    return needed


def _history(context: Context, lookback: _Lookback, history: History) -> Entity:
    """Each user's latest impressions with a positive signal, the latest first."""
    names, schema, columns = history_features(history), lookback.schema, history.columns
    if lookback.days:
        daily = context.workspace.scan(history_dataset(context, history), lookback.days)
        if "user_id" in lookback.values:
            daily = daily.filter(_needed("user_id", lookback.values["user_id"]))
        latest = run_sql(
            view_sql(context)["features/history.sql"],
            {"daily": daily},
            prefix=history.name,
            columns=columns,
            length=history.length,
            as_of=day_number(lookback.day),
            longest=context.project.features.windows[-1],
        ).cast({"user_id": schema["user_id"]})
        table = latest.collect(engine="streaming")
    else:
        types = {
            name: schema[c] if isinstance(schema[c], pl.List) else pl.List(schema[c])
            for name, c in zip(names, columns, strict=True)
        }
        table = pl.DataFrame(schema={"user_id": schema["user_id"], **types})
    return Entity(history.name, ["user_id"], names, table)


@dataclass(frozen=True)
class FeatureSides:
    """What each of a candidate's features depends on: its user, its item, or the pair.

    Attributes:
        user_keys, item_keys: columns of a candidate set on which the features of a user, or of an
            item, depend.
        features: feature column → "user", "item" or "pair".
        entities: name of an entity → "user", "item" or "pair".
        pair_keys: keys of the entities that depend on the pair.
        derived: derived feature that depends on the pair → the columns that it reads.
    """

    user_keys: list[str]
    item_keys: list[str]
    features: dict[str, str]
    entities: dict[str, str]
    pair_keys: list[str]
    derived: dict[str, list[str]]


def feature_sides(
    project: Project, tables: Mapping[str, pl.LazyFrame], columns: Sequence[str]
) -> FeatureSides:
    """What the features of candidate sets with these columns depend on.

    A context column (a surface, the hour) belongs to the user. Together with the item it can also
    determine a feature of the item, such as its rate on that surface.

    Args:
        tables: user and item table, by their key.
        columns: of the candidate set.
    """
    sources: dict[str, set[str]] = {c: {c} for c in columns}  # column → columns it depends on
    for key, table in tables.items():
        for column in table.collect_schema().names():
            sources.setdefault(column, {key})
    sources["item_age_days"] = sources.get("item_id_published_day", {"item_id"})
    windows = {f"entity_{entity_name(keys)}": keys for keys in project.features.entities}
    entity_sources = {e: set().union(*(sources[k] for k in keys)) for e, keys in windows.items()}
    for entity, keys in windows.items():
        names = aggregate_feature_names(project, keys)
        sources |= dict.fromkeys(names, entity_sources[entity])
    for history in project.features.histories:
        sources |= {feature: {"user_id"} for feature in history_features(history)}
        entity_sources[history.name] = {"user_id"}

    derived = columns_of_derived(project)
    for name, read in derived.items():
        sources[name] = set().union(*(sources[column] for column in read))

    def side(source: set[str]) -> str:
        if "item_id" not in source:
            return "user"
        return "pair" if "user_id" in source else "item"

    # Item popularity reads the item also where it is no feature.
    features = {"user_id": "user", "item_id": "item"}
    features |= {c: side(sources[c]) for c in feature_columns(project)}
    keys_of = {"user": {"user_id"}, "item": {"item_id"}}
    for column, which in features.items():
        if which != "pair":
            keys_of[which] |= sources[column]
    entities = {name: side(source) for name, source in entity_sources.items()}
    pair_keys = {k for name, keys in windows.items() if entities[name] == "pair" for k in keys}
    return FeatureSides(
        user_keys=[c for c in columns if c in keys_of["user"]],
        item_keys=[c for c in columns if c in keys_of["item"]],
        features=features,
        entities=entities,
        pair_keys=sorted(pair_keys),
        derived={name: read for name, read in derived.items() if features[name] == "pair"},
    )


def join_features(context: Context, rows: pl.LazyFrame, day: date) -> pl.LazyFrame:
    """Features for impressions of partition D.

    They are as of D, or as of the date of the impression's timestamp where that is earlier. Vectors
    are keys (features/vectors.py).
    """

    def joined(part: pl.LazyFrame, own: date, known: Sequence[date] | None = None) -> pl.LazyFrame:
        as_of = AsOf.build(context, part, own, known)
        return replace(as_of, tables=with_keys(context, as_of.tables, part)).join(part)

    if not context.project.log.day_tolerance_hours:
        return joined(rows, day)
    as_of = pl.min_horizontal(local_date(context.project), pl.lit(day))
    known, parts = history_days(context, day), []
    for own in rows.select(as_of.unique().sort()).collect().to_series():
        parts.append(joined(rows.filter(as_of == own), own, known))
    return pl.concat(parts) if parts else joined(rows, day)
