"""Runs the templates in `sql/` on lazy frames with polars' SQLContext and streaming engine.

Features as of day D are windows over daily aggregates of days strictly before D, so they cannot
see day D. One query text joins them to impressions (training) and to candidates (scoring).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

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
from mtl_ranker.features.sql import day_number, run_sql
from mtl_ranker.features.tables import join_tables, static_tables
from mtl_ranker.features.view import aggregate_dataset, history_dataset, view_sql


@dataclass(frozen=True)
class AsOf:
    """What was known on the morning of day D: a table of windows for each entity.

    Attributes:
        tables: the user and the item table by their key.
        entities: of each, its name, keys, features and table.
        sql: template name → text.
    """

    project: Project
    day: date
    tables: dict[str, pl.LazyFrame]
    entities: list[Entity]
    sql: dict[str, str]

    @classmethod
    def build(cls, context: Context, rows: pl.LazyFrame, day: date) -> AsOf:
        """Windows over the published aggregates before D, of the users and items in `rows`.

        Keys take the types that `rows` have.
        """
        project, source, workspace = context.project, context.source, context.workspace
        features, sql = project.features, view_sql(context)
        static = static_tables(source)
        schema = join_tables(static, rows).collect_schema()
        own = {"user_id", "item_id"} & {key for keys in features.entities for key in keys}
        own |= {"user_id"} if features.histories else set()
        uniques = [rows.select(key).unique() for key in own if key in rows.collect_schema()]
        present = {found.columns[0]: found.to_series() for found in pl.collect_all(uniques)}
        days = history_days(context, day)
        common = {
            "signals": signal_names(project),
            "windows": features.windows,
            "longest": features.windows[-1],
            "smoothing": features.smoothing,
            "relative": features.rates == "relative",
            "as_of": day_number(day),
        }
        queries, names_of = [], []
        for keys in features.entities:
            names = aggregate_feature_names(project, keys)
            names_of.append(names)
            if days:
                daily = workspace.scan(aggregate_dataset(context, keys), days)
                for key in present.keys() & set(keys):
                    daily = daily.filter(pl.col(key).is_in(present[key].implode()))
                totals = workspace.scan(aggregate_dataset(context, []), days)
                windows = run_sql(
                    sql["features/windows.sql"],
                    {"daily": daily, "totals": totals},
                    keys=keys,
                    prefix=entity_name(keys),
                    **common,
                )
                casts = {k: schema[k] for k in keys if schema[k] != pl.Null}
                casts |= dict.fromkeys(names, pl.Float32())
                queries.append(windows.cast(casts))  # type: ignore[arg-type]
            else:
                columns = {key: schema[key] for key in keys} | dict.fromkeys(names, pl.Float32)
                queries.append(pl.LazyFrame(schema=columns))
        # Collected here: planning one query over all entities takes 20 times as long.
        tables = pl.collect_all(queries, engine="streaming")
        entities = [
            Entity(f"entity_{entity_name(keys)}", keys, names, table)
            for keys, names, table in zip(features.entities, names_of, tables, strict=True)
        ]
        users = present.get("user_id")
        entities += [
            _remembered(context, history, days, day, schema, users)
            for history in features.histories
        ]
        return cls(project, day, static, entities, sql)

    def join(self, rows: pl.LazyFrame, only: Collection[str] | None = None) -> pl.LazyFrame:
        """Features for `rows`: impressions or candidates, or a part of a candidate's columns.

        User and item tables join where the rows have their key. `only`: names of entities.
        """
        return self.join_windows(join_tables(self.tables, rows), only)

    def join_windows(self, rows: pl.LazyFrame, only: Collection[str] | None = None) -> pl.LazyFrame:
        """The same for rows that are joined to the user and item tables, or need not be."""
        frames = {"rows": rows}
        chosen = [e for e in self.entities if only is None or e.name in only]
        frames |= {e.name: e.table.lazy() for e in chosen}
        items = self.project.log.items
        has_age = items is not None and items.published
        present = frames["rows"].collect_schema().names()
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
    name: str
    keys: list[str]
    features: list[str]
    table: pl.DataFrame


def _remembered(
    context: Context,
    history: History,
    days: list[date],
    day: date,
    schema: pl.Schema,
    users: pl.Series | None,
) -> Entity:
    """Each of the users' latest positive impressions on `days`, which lie before `day`."""
    project, workspace = context.project, context.workspace
    names = history_features(history)
    if days:
        daily = workspace.scan(history_dataset(context, history), days)
        if users is not None:
            daily = daily.filter(pl.col("user_id").is_in(users.implode()))
        latest = run_sql(
            view_sql(context)["features/history.sql"],
            {"daily": daily},
            prefix=history.name,
            columns=history.columns,
            length=history.length,
            as_of=day_number(day),
            longest=project.features.windows[-1],
        ).cast({"user_id": schema["user_id"]})
        table = latest.collect(engine="streaming")
    else:
        types = {
            name: schema[c] if isinstance(schema[c], pl.List) else pl.List(schema[c])
            for name, c in zip(names, history.columns, strict=True)
        }
        table = pl.DataFrame(schema={"user_id": schema["user_id"], **types})
    return Entity(history.name, ["user_id"], names, table)


@dataclass(frozen=True)
class FeatureSides:
    """What a candidate's features depend on: its user, its item, or the pair of both.

    Attributes:
        user_keys, item_keys: columns of a candidate set that decide the features of either.
        features: feature column → "user", "item" or "pair".
        entities: the same of the tables of windows.
        pair_keys: columns by which the pairs' own tables are joined.
    """

    user_keys: list[str]
    item_keys: list[str]
    features: dict[str, str]
    entities: dict[str, str]
    pair_keys: list[str]


def feature_sides(
    project: Project, tables: Mapping[str, pl.LazyFrame], own: Sequence[str]
) -> FeatureSides:
    """Which features of a candidate set with the columns `own` depend on what.

    A column of the set itself (a surface, the hour) counts to the user's side; together with
    the item it can also decide an item's feature, such as the item's rate on that surface.
    """
    needs: dict[str, set[str]] = {c: {c} for c in own}
    for key, table in tables.items():
        for column in table.collect_schema().names():
            needs.setdefault(column, {key})
    needs["item_age_days"] = needs.get("item_id_published_day", {"item_id"})
    windows = {f"entity_{entity_name(keys)}": keys for keys in project.features.entities}
    of_table = {t: set().union(*(needs[k] for k in keys)) for t, keys in windows.items()}
    for keys, needed in zip(project.features.entities, of_table.values(), strict=True):
        needs |= dict.fromkeys(aggregate_feature_names(project, keys), needed)
    for history in project.features.histories:
        needs |= {feature: {"user_id"} for feature in history_features(history)}
        of_table[history.name] = {"user_id"}

    def side(needed: set[str]) -> str:
        if "item_id" not in needed:
            return "user"
        return "pair" if "user_id" in needed else "item"

    features = {c: side(needs[c]) for c in feature_columns(project)}
    sides = {"user": {"user_id"}, "item": {"item_id"}}
    for column, which in features.items():
        if which != "pair":
            sides[which] |= needs[column]
    entities = {name: side(needed) for name, needed in of_table.items()}
    pair_keys = {k for name, keys in windows.items() if entities[name] == "pair" for k in keys}
    return FeatureSides(
        [c for c in own if c in sides["user"]],
        [c for c in own if c in sides["item"]],
        features,
        entities,
        sorted(pair_keys),
    )


def join_features(context: Context, rows: pl.LazyFrame, day: date) -> pl.LazyFrame:
    """Features as of day D for `rows` (impressions or candidates with user_id and item_id)."""
    return AsOf.build(context, rows, day).join(rows)
