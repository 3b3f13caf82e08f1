"""Runs the templates in `sql/` on lazy frames with polars' SQLContext and streaming engine.

Features as of day D are windows over daily aggregates of days strictly before D, so they cannot
see day D. One query text joins them to impressions (training) and to candidates (scoring).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

import jinja2
import polars as pl

from mtl_ranker.config import History, Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.blocks import Block, user_blocks
from mtl_ranker.logs.contract import derived_columns, label_expression
from mtl_ranker.logs.sources import Source
from mtl_ranker.workspace import Workspace, fingerprint

LABEL = "label_"
SAMPLE_WEIGHT = "sample_weight"
PACKAGED_SQL = Path(__file__).resolve().parent.parent / "sql"
CHECKOUT_SQL = Path(__file__).resolve().parent.parent.parent / "sql"


@cache
def sql_text(name: str) -> str:
    folder = PACKAGED_SQL if PACKAGED_SQL.is_dir() else CHECKOUT_SQL
    return (folder / name).read_text("utf-8")


def run_sql(name: str, frames: Mapping[str, pl.LazyFrame], **variables: object) -> pl.LazyFrame:
    """Render `sql/<name>` with `variables` and run it over `frames`."""
    query = _template(sql_text(name)).render(**variables)
    return pl.SQLContext(frames=dict(frames)).execute(query, eager=False)


@cache
def _template(text: str) -> jinja2.Template:
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text)


def day_number(day: date) -> int:
    """Days since 1970-01-01, the unit of every `day` column."""
    return (day - date(1970, 1, 1)).days


def entity_name(keys: list[str]) -> str:
    """`["user_id", "author_id"]` becomes `user_x_author`."""
    return "_x_".join(key.removesuffix("_id") for key in keys)


def signal_names(project: Project) -> list[str]:
    return [o.name for o in project.objectives] + list(project.features.signals)


def aggregate_feature_names(project: Project, keys: list[str]) -> list[str]:
    prefix = entity_name(keys)
    names = []
    for window in project.features.windows:
        names.append(f"{prefix}_daily_impressions_{window}d")
        names += [f"{prefix}_{signal}_rate_{window}d" for signal in signal_names(project)]
    return [*names, f"{prefix}_days_since"]


def numeric_features(project: Project) -> list[str]:
    """Every numeric model input: configured columns, item age, and the windowed aggregates."""
    names = list(project.features.numerics)
    if project.log.items is not None and project.log.items.published:
        names.append("item_age_days")
    for keys in project.features.entities:
        names += aggregate_feature_names(project, keys)
    return names


def history_features(history: History) -> list[str]:
    """The list columns of one history, in the order of its columns."""
    return [history.feature(column) for column in history.columns]


def feature_columns(project: Project) -> list[str]:
    """All raw feature columns that the encoder reads, in a fixed order, none twice."""
    features = project.features
    names = [c.column for c in features.categoricals] + [c.column for c in features.lists]
    for history in features.histories:
        names += history_features(history)
    return list(dict.fromkeys(names + numeric_features(project)))


def aggregate_day(project: Project, source: Source, workspace: Workspace, day: date) -> str | None:
    """Publish every entity's daily counts of one day; why, or None when all were up to date."""
    events_mark = workspace.published_fingerprint("events", day)
    if events_mark is None:
        raise ProjectError(f"events of {day} are not published; run `mtl-ranker ingest` first")
    events = _enriched(static_tables(source), workspace.scan("events", [day]))
    schema = events.collect_schema()
    signals = {
        name: expression.log1p() if _is_log1p(project, name) else expression
        for name, expression in derived_columns(project).items()
    }
    expressions = {o.name: (o.label, o.where, o.transform) for o in project.objectives}
    common = {
        "events": events_mark,
        "user and item tables": fingerprint(*source.tables_state()),
        "setting objectives, features.signals": fingerprint(expressions, project.features.signals),
    }
    daily: dict[str, tuple[dict[str, str], pl.LazyFrame]] = {}  # dataset → made from, rows
    text = "aggregates/entity.sql"
    made = {**common, f"sql/{text}": fingerprint(sql_text(text))}
    for keys in [[], *project.features.entities]:
        _need(schema, keys, "features.entities")
        columns = [pl.col(key) for key in keys if key not in signals]
        labelled = events.select(*columns, *(e.alias(n) for n, e in signals.items()))
        counts = run_sql(text, {"events": labelled}, keys=keys, signals=list(signals))
        daily[aggregate_dataset(keys)] = made, counts
    text = "aggregates/history.sql"
    for history in project.features.histories:
        _need(schema, history.columns, f"features.histories ({history.signal})")
        made = {
            **common,
            f"sql/{text}": fingerprint(sql_text(text)),
            "setting features.histories": fingerprint(history),
        }
        # Of a list column the first value stands for the item.
        columns = [
            pl.col(c).list.first() if isinstance(schema[c], pl.List) else pl.col(c)
            for c in {*history.columns, "item_id"}
        ]
        signal = signals[history.signal].alias(history.signal)
        latest = run_sql(
            text,
            {"events": events.select("user_id", "timestamp", *columns, signal)},
            signal=history.signal,
            columns=history.columns,
            length=history.length,
        )
        daily[history_dataset(history)] = made, latest
    worked = None
    for dataset, (made, rows) in daily.items():
        why = workspace.stale(dataset, day, made)
        if why is not None:
            numbered = rows.with_columns(pl.lit(day_number(day), pl.Int32).alias("day"))
            workspace.publish(dataset, day, numbered, made)
            worked = worked or why
    return worked


def _need(schema: pl.Schema, columns: Sequence[str], place: str) -> None:
    for column in columns:
        if column not in schema:
            raise ProjectError(
                f"{place}: no column {column!r} in the events or joined tables; "
                f"allowed: {', '.join(schema.names())}"
            )


def history_dataset(history: History) -> str:
    return f"aggregates/{history.name}"


def aggregate_dataset(keys: list[str]) -> str:
    return f"aggregates/{entity_name(keys) if keys else 'all'}"


def history_days(project: Project, workspace: Workspace, day: date) -> list[date]:
    """Aggregated days that the windows of day D may see: the longest window, strictly before D."""
    longest = project.features.windows[-1]
    days = workspace.days(aggregate_dataset([]))
    return [d for d in days if 0 < (day - d).days <= longest]


def needed_history(project: Project, available: list[date], days: list[date]) -> list[date]:
    """`days` and the earlier days of the log that their windows look at, ascending."""
    longest = project.features.windows[-1]
    return [d for d in available if any(0 <= (day - d).days <= longest for day in days)]


@dataclass(frozen=True)
class AsOf:
    """What was known on the morning of day D: a table of windows for each entity.

    Attributes:
        tables: the user and the item table by their key.
        entities: of each, its name, keys, features and table.
    """

    project: Project
    day: date
    tables: dict[str, pl.LazyFrame]
    entities: list[Entity]

    @classmethod
    def build(
        cls, project: Project, source: Source, workspace: Workspace, rows: pl.LazyFrame, day: date
    ) -> AsOf:
        """Windows over the published aggregates before D, of the users and items in `rows`.

        Keys take the types that `rows` have.
        """
        features = project.features
        static = static_tables(source)
        schema = _enriched(static, rows).collect_schema()
        own = {"user_id", "item_id"} & {key for keys in features.entities for key in keys}
        own |= {"user_id"} if features.histories else set()
        uniques = [rows.select(key).unique() for key in own if key in rows.collect_schema()]
        present = {found.columns[0]: found.to_series() for found in pl.collect_all(uniques)}
        days = history_days(project, workspace, day)
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
                daily = workspace.scan(aggregate_dataset(keys), days)
                for key in present.keys() & set(keys):
                    daily = daily.filter(pl.col(key).is_in(present[key].implode()))
                totals = workspace.scan(aggregate_dataset([]), days)
                windows = run_sql(
                    "features/windows.sql",
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
            _remembered(project, workspace, history, days, day, schema, users)
            for history in features.histories
        ]
        return cls(project, day, static, entities)

    def join(self, rows: pl.LazyFrame, only: Collection[str] | None = None) -> pl.LazyFrame:
        """Features for `rows`: impressions or candidates, or a part of a candidate's columns.

        User and item tables join where the rows have their key. `only`: names of entities.
        """
        return self.join_windows(_enriched(self.tables, rows), only)

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
            "features/join.sql",
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
    project: Project,
    workspace: Workspace,
    history: History,
    days: list[date],
    day: date,
    schema: pl.Schema,
    users: pl.Series | None,
) -> Entity:
    """Each of the users' latest positive impressions on `days`, which lie before `day`."""
    names = history_features(history)
    if days:
        daily = workspace.scan(history_dataset(history), days)
        if users is not None:
            daily = daily.filter(pl.col("user_id").is_in(users.implode()))
        latest = run_sql(
            "features/history.sql",
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
class Parts:
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


def feature_parts(
    project: Project, tables: Mapping[str, pl.LazyFrame], own: Sequence[str]
) -> Parts:
    """Which features of a candidate set with the columns `own` depend on what.

    A column of the set itself (a surface, the hour) counts to the user's part; together with
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

    def part(needed: set[str]) -> str:
        if "item_id" not in needed:
            return "user"
        return "pair" if "user_id" in needed else "item"

    features = {c: part(needs[c]) for c in feature_columns(project)}
    sides = {"user": {"user_id"}, "item": {"item_id"}}
    for column, which in features.items():
        if which != "pair":
            sides[which] |= needs[column]
    entities = {name: part(needed) for name, needed in of_table.items()}
    pair_keys = {k for name, keys in windows.items() if entities[name] == "pair" for k in keys}
    return Parts(
        [c for c in own if c in sides["user"]],
        [c for c in own if c in sides["item"]],
        features,
        entities,
        sorted(pair_keys),
    )


def join_features(
    project: Project, source: Source, workspace: Workspace, rows: pl.LazyFrame, day: date
) -> pl.LazyFrame:
    """Features as of day D for `rows` (impressions or candidates with user_id and item_id)."""
    return AsOf.build(project, source, workspace, rows, day).join(rows)


@dataclass(frozen=True)
class ExamplesPlan:
    """What is to be built of a day's examples.

    Attributes:
        why: in words.
        made: what they are made from.
        parts: blocks of whole users, about `features.block_rows` rows each, and where each lies
            until all are built; empty for a day that is one block.
    """

    day: date
    why: str
    made: dict[str, str]
    parts: list[tuple[Block, Path]]


def plan_examples(
    project: Project, source: Source, workspace: Workspace, day: date
) -> ExamplesPlan | None:
    """None when the published partition is made from the same events, history and SQL."""
    made = examples_made_from(project, source, workspace, day)
    why = workspace.stale("examples", day, made)
    if why is None:
        return None
    events = workspace.scan("events", [day])
    check_known_beforehand(project, events.collect_schema().names())
    blocks = user_blocks(events, project.features.block_rows)
    if len(blocks) <= 1:
        return ExamplesPlan(day, why, made, [])
    files = workspace.parts("examples", day, made, len(blocks))
    return ExamplesPlan(day, why, made, list(zip(blocks, files, strict=True)))


def build_examples(project: Project, source: Source, workspace: Workspace, day: date) -> str | None:
    """Publish examples/date=D: the day's impressions with features and labels.

    Of a day with more rows than `features.block_rows`, whole users are joined so many rows at a
    time, and lie one block after the other; within a block, and of other days, in order of time.

    Why, or None when the published partition is made from the same events, history and SQL.
    """
    plan = plan_examples(project, source, workspace, day)
    if plan is None:
        return None
    for block, file in plan.parts:
        build_examples_part(project, source, workspace, day, block, file)
    return finish_examples(project, source, workspace, plan)


def build_examples_part(
    project: Project, source: Source, workspace: Workspace, day: date, block: Block, file: Path
) -> None:
    """Write one block of a plan to its file, unless an earlier attempt has."""
    if file.is_file():
        return
    rows = examples_of_block(project, source, workspace, day, block)
    with workspace.aside(file) as temporary:
        rows.sink_parquet(temporary, compression="lz4", engine="streaming")


def finish_examples(
    project: Project, source: Source, workspace: Workspace, plan: ExamplesPlan
) -> str:
    """Publish the day, of which all parts are built; a day without parts is built here. Why."""
    if plan.parts:
        files = [file for _, file in plan.parts]
        workspace.publish_parts("examples", plan.day, files, plan.made)
    else:
        everything = Block(None, None, 0, everything=True)
        rows = examples_of_block(project, source, workspace, plan.day, everything)
        workspace.publish("examples", plan.day, rows, plan.made)
    return plan.why


def examples_of_block(
    project: Project, source: Source, workspace: Workspace, day: date, block: Block
) -> pl.LazyFrame:
    """The examples of some users' impressions of one day, in order of time."""
    events = workspace.scan("events", [day])
    event_columns = events.collect_schema().names()
    rows = events.with_columns(
        *(
            expression.cast(pl.Float32).alias(LABEL + name)
            for name, expression in derived_columns(project).items()
            if name not in project.features.signals
        )
    )
    label_columns = [LABEL + o.name for o in project.objectives]
    if project.training.sample_weight is not None:
        weight = label_expression(project.training.sample_weight, "training.sample_weight")
        rows = rows.with_columns(weight.cast(pl.Float32).alias(SAMPLE_WEIGHT))
        label_columns.append(SAMPLE_WEIGHT)
    carried = ["user_id", "item_id", "timestamp", "date"]
    beside = ("position", "propensity", project.log.random_exposure)
    carried += [c for c in beside if c is not None and c in event_columns]
    wanted = set(carried) | set(project.log.context) | set(feature_columns(project))
    rows = rows.select(*[c for c in event_columns if c in wanted], *label_columns)
    chosen = dict.fromkeys([*carried, *project.log.context, *feature_columns(project)])
    examples = join_features(project, source, workspace, block.of(rows), day)
    check_feature_columns(project, examples.collect_schema())
    return examples.select(*chosen, *label_columns).sort("timestamp", "user_id", "item_id")


def history_fingerprint(project: Project, workspace: Workspace, day: date) -> str:
    """One hash of all aggregates that the windows of day D see."""
    datasets = [aggregate_dataset(keys) for keys in [[], *project.features.entities]]
    datasets += [history_dataset(history) for history in project.features.histories]
    return fingerprint(
        *(
            workspace.published_fingerprint(dataset, d)
            for d in history_days(project, workspace, day)
            for dataset in datasets
        )
    )


def examples_made_from(
    project: Project, source: Source, workspace: Workspace, day: date
) -> dict[str, str]:
    """What decides the examples of a day; the encoder's own settings do not, and are left out."""
    features = project.features
    columns = [c.column for c in features.categoricals] + [c.column for c in features.lists]
    remembered = {
        "sql/features/history.sql": fingerprint(sql_text("features/history.sql")),
        "setting features.histories": fingerprint(*features.histories),
    }
    return {
        **(remembered if features.histories else {}),
        "events": workspace.published_fingerprint("events", day) or "",
        "aggregates of earlier days": history_fingerprint(project, workspace, day),
        "sql/features/windows.sql": fingerprint(sql_text("features/windows.sql")),
        "sql/features/join.sql": fingerprint(sql_text("features/join.sql")),
        "user and item tables": fingerprint(*source.tables_state()),
        "setting features.windows": fingerprint(features.windows),
        "setting features.smoothing": fingerprint(features.smoothing),
        "setting features.rates": fingerprint(features.rates),
        "setting features.entities": fingerprint(features.entities),
        "setting features.signals": fingerprint(list(features.signals)),
        "setting features' columns": fingerprint(columns, features.numerics, project.log.context),
    }


def check_feature_columns(project: Project, schema: pl.Schema) -> None:
    """Every configured feature must exist with a fitting type. Raises ProjectError."""
    features = project.features
    available = [c for c in schema.names() if not c.startswith(LABEL)]
    wanted = {f"features.categoricals ({c.column})": c.column for c in features.categoricals}
    wanted |= {f"features.lists ({c.column})": c.column for c in features.lists}
    wanted |= {f"features.numerics ({c})": c for c in features.numerics}
    for place, column in wanted.items():
        if column not in schema:
            raise ProjectError(f"{place}: no such column; available: {', '.join(available)}")
    for listed in features.lists:
        if not isinstance(schema[listed.column], pl.List):
            raise ProjectError(
                f"features.lists ({listed.column}): is {schema[listed.column]}; "
                "allowed: a list column (see log.items.lists)"
            )


def check_known_beforehand(project: Project, event_columns: Collection[str]) -> None:
    """Whatever is read from the impression itself must be declared as context.

    What an impression left behind (play time, another label) is not known when candidates are
    ranked, and candidates would not carry it. Raises ProjectError naming the column.
    """
    features, context = project.features, project.log.context
    wanted = {f"features.categoricals ({c.column})": c.column for c in features.categoricals}
    wanted |= {f"features.lists ({c.column})": c.column for c in features.lists}
    wanted |= {f"features.numerics ({c})": c for c in features.numerics}
    wanted |= {f"features.entities ({key})": key for keys in features.entities for key in keys}
    known = {"user_id", "item_id", *context}
    for place, column in wanted.items():
        if column in event_columns and column not in known:
            raise ProjectError(
                f"{place}: is a column of the log, which may only be known after the impression; "
                f"allowed: log.context ({', '.join(context) or 'empty'}), where columns stand that "
                "a candidate set has too, and columns of log.users and log.items"
            )
    for index, objective in enumerate(project.objectives):
        if objective.label.strip('"') in context:
            raise ProjectError(
                f"log.context: {objective.label} is the label of objectives[{index}] "
                f"({objective.name}); a label is not known when candidates are ranked"
            )


def static_tables(source: Source) -> dict[str, pl.LazyFrame]:
    """The user and the item table by their key, where the project has them."""
    tables = {"user_id": source.table("users"), "item_id": source.table("items")}
    return {key: table for key, table in tables.items() if table is not None}


def _enriched(tables: Mapping[str, pl.LazyFrame], rows: pl.LazyFrame) -> pl.LazyFrame:
    """Rows joined to the static user and item tables; a row's own columns win.

    Rows without a user or an item are joined to the other table only.
    """
    for key, table in tables.items():
        own = rows.collect_schema()
        if key not in own:
            continue
        new = [c for c in table.collect_schema().names() if c == key or c not in own]
        rows = rows.join(table.select(new).cast({key: own[key]}), on=key, how="left")
    return rows


def _is_log1p(project: Project, name: str) -> bool:
    return any(o.name == name and o.transform == "log1p" for o in project.objectives)
