"""Runs the templates in `sql/` on lazy frames with polars' SQLContext and streaming engine.

Features as of day D are windows over daily aggregates of days strictly before D, so they cannot
see day D. One query text joins them to impressions (training) and to candidates (scoring).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import date
from functools import cache
from pathlib import Path

import jinja2
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
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
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    query = environment.from_string(sql_text(name)).render(**variables)
    return pl.SQLContext(frames=dict(frames)).execute(query, eager=False)


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


def feature_columns(project: Project) -> list[str]:
    """All raw feature columns that the encoder reads, in a fixed order, none twice."""
    features = project.features
    names = [c.column for c in features.categoricals] + [c.column for c in features.lists]
    return list(dict.fromkeys(names + numeric_features(project)))


def aggregate_day(project: Project, source: Source, workspace: Workspace, day: date) -> str | None:
    """Publish every entity's daily counts of one day; why, or None when all were up to date."""
    events_mark = workspace.published_fingerprint("events", day)
    if events_mark is None:
        raise ProjectError(f"events of {day} are not published; run `mtl-ranker ingest` first")
    events = _enriched(source, workspace.scan("events", [day]))
    schema = events.collect_schema()
    signals = {
        name: expression.log1p() if _is_log1p(project, name) else expression
        for name, expression in derived_columns(project).items()
    }
    worked = None
    expressions = {o.name: (o.label, o.where, o.transform) for o in project.objectives}
    common = {
        "events": events_mark,
        "sql/aggregates/entity.sql": fingerprint(sql_text("aggregates/entity.sql")),
        "user and item tables": fingerprint(*source.tables_state()),
        "setting objectives, features.signals": fingerprint(expressions, project.features.signals),
    }
    for keys in [[], *project.features.entities]:
        for key in keys:
            if key not in schema:
                raise ProjectError(
                    f"features.entities: no column {key!r} in the events or joined tables; "
                    f"allowed: {', '.join(schema.names())}"
                )
        dataset = aggregate_dataset(keys)
        why = workspace.stale(dataset, day, common)
        if why is None:
            continue
        columns = [pl.col(key) for key in keys if key not in signals]
        labelled = events.select(*columns, *(e.alias(n) for n, e in signals.items()))
        daily = run_sql(
            "aggregates/entity.sql", {"events": labelled}, keys=keys, signals=list(signals)
        ).with_columns(pl.lit(day_number(day), pl.Int32).alias("day"))
        workspace.publish(dataset, day, daily, common)
        worked = worked or why
    return worked


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


def join_features(
    project: Project, source: Source, workspace: Workspace, rows: pl.LazyFrame, day: date
) -> pl.LazyFrame:
    """Features as of day D for `rows` (impressions or candidates with user_id and item_id)."""
    as_of = day_number(day)
    features = project.features
    frames = {"rows": _enriched(source, rows)}
    entities = []
    days = history_days(project, workspace, day)
    common = {
        "signals": signal_names(project),
        "windows": features.windows,
        "longest": features.windows[-1],
        "smoothing": features.smoothing,
        "relative": features.rates == "relative",
        "as_of": as_of,
    }
    schema = frames["rows"].collect_schema()
    for keys in features.entities:
        name = f"entity_{entity_name(keys)}"
        names = aggregate_feature_names(project, keys)
        if days:
            daily = workspace.scan(aggregate_dataset(keys), days)
            totals = workspace.scan(aggregate_dataset([]), days)
            windows = run_sql(
                "features/windows.sql",
                {"daily": daily, "totals": totals},
                keys=keys,
                prefix=entity_name(keys),
                **common,
            )
            # Collected here: planning one query over all entities takes 20 times as long.
            casts = {k: schema[k] for k in keys if schema[k] != pl.Null}
            casts |= dict.fromkeys(names, pl.Float32())
            table = windows.collect(engine="streaming").cast(casts)  # type: ignore[arg-type]
            frames[name] = table.lazy()
        else:
            columns = {key: schema[key] for key in keys} | dict.fromkeys(names, pl.Float32)
            frames[name] = pl.LazyFrame(schema=columns)
        entities.append({"name": name, "keys": keys, "features": names})
    items = project.log.items
    published = "item_id_published_day" if items is not None and items.published else None
    joined = run_sql(
        "features/join.sql", frames, entities=entities, published=published, as_of=as_of
    )
    computed = set(numeric_features(project)) & {*project.features.numerics, "item_age_days"}
    present = joined.collect_schema().names()
    return joined.with_columns(pl.col(c).cast(pl.Float32) for c in sorted(computed) if c in present)


def build_examples(project: Project, source: Source, workspace: Workspace, day: date) -> str | None:
    """Publish examples/date=D: the day's impressions with features and labels.

    Why, or None when the published partition is made from the same events, history and SQL.
    """
    made = examples_made_from(project, source, workspace, day)
    why = workspace.stale("examples", day, made)
    if why is None:
        return None
    events = workspace.scan("events", [day])
    labels = derived_columns(project)
    event_columns = events.collect_schema().names()
    check_known_beforehand(project, event_columns)
    rows = events.with_columns(
        *(
            expression.cast(pl.Float32).alias(LABEL + name)
            for name, expression in labels.items()
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
    examples = join_features(project, source, workspace, rows, day)
    check_feature_columns(project, examples.collect_schema())
    chosen = dict.fromkeys([*carried, *project.log.context, *feature_columns(project)])
    examples = examples.select(*chosen, *label_columns).sort("timestamp", "user_id", "item_id")
    workspace.publish("examples", day, examples, made)
    return why


def history_fingerprint(project: Project, workspace: Workspace, day: date) -> str:
    """One hash of all aggregates that the windows of day D see."""
    return fingerprint(
        *(
            workspace.published_fingerprint(aggregate_dataset(keys), d)
            for d in history_days(project, workspace, day)
            for keys in [[], *project.features.entities]
        )
    )


def examples_made_from(
    project: Project, source: Source, workspace: Workspace, day: date
) -> dict[str, str]:
    """What decides the examples of a day; the encoder's own settings do not, and are left out."""
    features = project.features
    columns = [c.column for c in features.categoricals] + [c.column for c in features.lists]
    return {
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


def _enriched(source: Source, rows: pl.LazyFrame) -> pl.LazyFrame:
    """Rows joined to the static user and item tables; a row's own columns win."""
    for which, key in (("users", "user_id"), ("items", "item_id")):
        table = source.table(which)
        if table is None:
            continue
        own = rows.collect_schema()
        new = [c for c in table.collect_schema().names() if c == key or c not in own]
        rows = rows.join(table.select(new).cast({key: own[key]}), on=key, how="left")
    return rows


def _is_log1p(project: Project, name: str) -> bool:
    return any(o.name == name and o.transform == "log1p" for o in project.objectives)
