"""The names of feature and label columns, in one place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import polars as pl

from mtl_ranker.config import Features, History, Project
from mtl_ranker.errors import ProjectError, first_line
from mtl_ranker.logs.actions import EVENT

LABEL = "label_"
OPEN = "open_label_"  # of a label as observed while actions may change it; null once it is final

SAMPLE_WEIGHT = "sample_weight"


def entity_name(keys: list[str]) -> str:
    """The entity's name in columns and datasets: `user_x_author` for user_id and author_id."""
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
    """Every numeric input: configured columns, derived ones, item age, and aggregates."""
    names = [*project.features.numerics, *project.features.derived]
    if project.log.items is not None and project.log.items.published:
        names.append("item_age_days")
    for keys in project.features.entities:
        names += aggregate_feature_names(project, keys)
    return names


def table_sides(project: Project) -> dict[str, str]:
    """Column of the user or item table → "user" or "item"."""
    tables = ((project.log.users, "user"), (project.log.items, "item"))
    return {c: side for table, side in tables if table is not None for c in table.joined}


def derived_features(project: Project) -> dict[str, pl.Expr]:
    """Name → expression of each derived feature. Raises ProjectError for text that is no SQL."""
    found = {}
    for name, text in project.features.derived.items():
        try:
            found[name] = pl.sql_expr(text)
        except pl.exceptions.PolarsError as error:
            raise ProjectError(
                f"features.derived.{name}: {text!r} is no SQL expression ({first_line(error)})"
            ) from error
    return found


def columns_of_derived(project: Project) -> dict[str, list[str]]:
    """Derived feature → the columns that it reads."""
    derived = derived_features(project).items()
    return {name: list(dict.fromkeys(e.meta.root_names())) for name, e in derived}


def keys_of_numerics(project: Project) -> dict[str, list[str]]:
    """Numeric feature → the columns whose values it is a function of on a day.

    Features of the user or item table have the table's key, aggregates the entity's keys, a context
    column itself, and derived features the keys of the columns that they read.
    """
    tables = ((project.log.users, "user_id"), (project.log.items, "item_id"))
    keys = {column: [key] for table, key in tables if table is not None for column in table.columns}
    keys["item_age_days"] = ["item_id"]
    for entity in project.features.entities:
        keys |= dict.fromkeys(aggregate_feature_names(project, entity), entity)
    for name, read in columns_of_derived(project).items():
        keys[name] = list(dict.fromkeys(k for column in read for k in keys.get(column, [column])))
    return {name: keys.get(name, [name]) for name in numeric_features(project)}


def rates(project: Project, windows: Sequence[int] | None = None) -> set[str]:
    """Smoothed rates: all keys without an event in the window have the same value on a day.

    Args:
        windows: some of `features.windows`; None for all.
    """
    return {
        f"{entity_name(keys)}_{signal}_rate_{window}d"
        for keys in project.features.entities
        for signal in signal_names(project)
        for window in (project.features.windows if windows is None else windows)
    }


def growing_numerics(project: Project, history_days: int) -> set[str]:
    """Numeric features whose distribution moves by itself from day to day.

    The age of items grows, and so do counts over a window that is longer than the log before it,
    the spread of smoothed rates over it, and the days since an entity's latest impression, which
    the longest window bounds.

    Args:
        history_days: days of the log before the first day with rows.
    """
    windows = [w for w in project.features.windows if w > history_days]
    growing = {"item_age_days"} | rates(project, windows)
    for entity in project.features.entities:
        prefix = entity_name(entity)
        growing |= {f"{prefix}_daily_impressions_{window}d" for window in windows}
        if windows:
            growing.add(f"{prefix}_days_since")
    return growing


def history_features(history: History) -> list[str]:
    """The list columns of one history, in the order of its columns."""
    return [history.feature(column) for column in history.columns]


def feature_columns(project: Project) -> list[str]:
    """All distinct feature columns that the encoder reads, in a fixed order."""
    features = project.features
    names = [c.column for c in features.categoricals] + [c.column for c in features.lists]
    for history in features.histories:
        names += history_features(history)
    return list(dict.fromkeys(names + numeric_features(project) + features.embeddings))


def check_feature_columns(project: Project, schema: pl.Schema) -> None:
    """Raise ProjectError unless every configured feature exists with a fitting type."""
    features = project.features
    available = [c for c in schema.names() if not c.startswith((LABEL, OPEN))]
    wanted = {f"features.categoricals ({c.column})": c.column for c in features.categoricals}
    wanted |= {f"features.lists ({c.column})": c.column for c in features.lists}
    wanted |= {f"features.numerics ({c})": c for c in features.numerics}
    wanted |= {f"features.embeddings ({c})": c for c in features.embeddings}
    for place, column in wanted.items():
        if column not in schema:
            raise ProjectError(f"{place}: no such column; available: {', '.join(available)}")
    for place, column in wanted.items():
        kind, dtype = place.partition(" ")[0].removeprefix("features."), schema[column]
        value = dtype.inner if kind == "lists" and isinstance(dtype, pl.List) else dtype
        number = value.is_numeric() or value in (pl.Boolean, pl.Null)
        is_date = value == pl.Date or isinstance(value, pl.Datetime)
        fits = (number or value == pl.String) if kind != "numerics" else number or is_date
        if kind == "lists" and not isinstance(dtype, pl.List):
            fits = dtype == pl.Null
        if kind == "embeddings":  # of examples, which have keys
            fits = dtype == pl.Int64 or is_vector(dtype)
        if not fits:
            raise ProjectError(f"{place}: is {dtype}; allowed: {FITTING[kind]}")
    check_shared(features, schema)


def check_shared(features: Features, schema: Mapping[str, pl.DataType]) -> None:
    """Raise ProjectError unless the columns that share a name hold values of one type.

    They have one vocabulary, and match features compare them.

    Args:
        schema: with the columns of categoricals and lists.
    """
    found: dict[str, tuple[str, str]] = {}  # shared name → the first column, and where it is named
    for setting in ("categoricals", "lists"):
        for feature in getattr(features, setting):
            column = feature.column
            if feature.share is None or value_type(schema[column]) == pl.Null:
                continue
            place = f"features.{setting} ({column})"
            first, other = found.setdefault(feature.share, (column, place))
            if value_type(schema[first]) != value_type(schema[column]):
                raise ProjectError(
                    f"{place}: is {schema[column]}, but {other} is {schema[first]}, and both have "
                    f"share = {feature.share!r}; allowed: values of one type"
                )


def value_type(dtype: pl.DataType) -> pl.DataType:
    """The type of a column's values, or of the values in its lists."""
    return pl.Series(dtype=dtype.inner).dtype if isinstance(dtype, pl.List) else dtype


def is_vector(dtype: pl.DataType) -> bool:
    """Whether values are lists or arrays of numbers."""
    inner = dtype.inner if isinstance(dtype, pl.List | pl.Array) else None
    return inner is not None and inner.is_numeric()


# What a feature may be, by the setting that names it.
FITTING = {
    "categoricals": "text, a number or a Boolean; a list column belongs in features.lists",
    "numerics": "a number, a Boolean or a date, one per row; text belongs in features.categoricals",
    "lists": "a list of text, numbers or Booleans; text with a separator becomes one by "
    "log.items.lists or log.users.lists",
    "embeddings": "a list or an array of numbers",
}


def generated_columns(project: Project) -> set[str]:
    """Names of the columns that are computed, which no column of log or tables may have."""
    names = set(numeric_features(project)) - set(project.features.numerics)
    for history in project.features.histories:
        names |= set(history_features(history))
    return names | {p + o.name for o in project.objectives for p in (LABEL, OPEN)} | {EVENT}


def check_names(project: Project, columns: Collection[str]) -> None:
    """Raise ProjectError where two columns would have one name.

    Args:
        columns: of the events, with the columns of user and item tables.
    """
    for column in columns:
        if column in generated_columns(project):
            raise ProjectError(
                f"column {column!r} of {_origin(project, column)} has the name of a generated "
                "column (features.entities, windows and signals make them); allowed: any other "
                "name"
            )
    reserved = {"day", "impressions", *signal_names(project)}
    named: dict[str, list[str]] = {}
    for keys in project.features.entities:
        for key in keys:
            if key in reserved:
                raise ProjectError(
                    f"features.entities ({key}): is the name of "
                    f"{'an objective or signal' if key in signal_names(project) else 'a column'} "
                    "of the daily aggregates; allowed: a key of another name"
                )
        other = named.setdefault(entity_name(keys), keys)
        if other is not keys:
            raise ProjectError(
                f"features.entities: {other} and {keys} make features of the same names "
                f"({entity_name(keys)}_…); allowed: each entity once"
            )


def _origin(project: Project, column: str) -> str:
    """The table's setting and path, or the log."""
    log = project.log
    for which, table in (("users", log.users), ("items", log.items)):
        if table is not None and column in table.joined:
            return f"log.{which} ({table.path})"
    return f"the log ({log.path})"


RANKING_COLUMNS = ("user_id", "item_id", "score", "rank", "model_version")
EXPLORATION_COLUMNS = ("propensity", "exploration_seed")  # of a ranking with exploration


def check_known_beforehand(project: Project, event_columns: Collection[str]) -> None:
    """Raise ProjectError for a feature from a column of the log that is not declared as context.

    The outcome of an impression (play time, another label) is not known when candidates are ranked,
    and candidate sets do not have it.
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
                f"allowed: log.context ({', '.join(context) or 'empty'}), for columns that a "
                "candidate set has too, and columns of log.users and log.items"
            )
    for index, objective in enumerate(project.objectives):
        used = set(pl.sql_expr(objective.label).meta.root_names())
        if used and used <= set(context):
            raise ProjectError(
                f"log.context: {', '.join(sorted(used))} is the label of objectives[{index}] "
                f"({objective.name}); a label is not known when candidates are ranked"
            )
        of_ranking = [*RANKING_COLUMNS, *context]
        if project.scoring.exploration is not None:
            of_ranking += EXPLORATION_COLUMNS
        if objective.name in of_ranking:
            raise ProjectError(
                f"objectives[{index}].name: {objective.name!r} is the name of another column of "
                f"the ranking ({', '.join(of_ranking)}); allowed: any other name"
            )
