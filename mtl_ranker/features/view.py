"""A feature view: the definition of a model's features.

A model is trained, judged and scored on its own view, independent of later changes of the
project file. `model_context` gives the context of a saved model: where its view differs from the
project's, its aggregates and examples are in a folder of their own, named after the view.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mtl_ranker.config import History, Log, Project, Table
from mtl_ranker.context import Context
from mtl_ranker.features import sql as templates
from mtl_ranker.features.columns import entity_name
from mtl_ranker.workspace import fingerprint

AGGREGATE_SQL = ("aggregates/entity.sql", "aggregates/history.sql")
FEATURE_SQL = ("features/windows.sql", "features/join.sql", "features/history.sql")
VIEWS = "views"
EXAMPLES = "examples"
# Settings of a table that define where its rows are.
PLACE = ("path", "format", "version", "partition", "valid_from", "valid_to")


def view_sql(context: Context) -> dict[str, str]:
    """Template name → text: of the saved model, or of this version."""
    given, names = context.sql or {}, (*AGGREGATE_SQL, *FEATURE_SQL)
    return {name: given.get(name) or templates.sql_text(name) for name in names}


def aggregates_digest(context: Context) -> str:
    """A hash of what decides the daily aggregates of an entity, given the events and tables."""
    project, sql = context.project, view_sql(context)
    return _digest(
        {
            "labels": [[o.name, o.label, o.where, o.transform] for o in project.objectives],
            "signals": project.features.signals,
            "histories": [history.model_dump() for history in project.features.histories],
            "tables": [_columns(project.log.users), _columns(project.log.items)],
            "sql": {name: sql[name] for name in AGGREGATE_SQL},
        }
    )


def view_digest(context: Context) -> str:
    """A hash of what decides the features of a row, given the events and tables.

    Settings that only the encoder reads (bins, minimum counts) are not part of it.
    """
    features, sql = context.project.features, view_sql(context)
    return _digest(
        {
            "aggregates": aggregates_digest(context),
            "windows": features.windows,
            "smoothing": features.smoothing,
            "rates": features.rates,
            "entities": features.entities,
            "categoricals": [c.column for c in features.categoricals],
            "lists": [c.column for c in features.lists],
            "numerics": features.numerics,
            "context": context.project.log.context,
            **({"derived": features.derived} if features.derived else {}),
            **({"embeddings": features.embeddings} if features.embeddings else {}),
            "sql": {name: sql[name] for name in FEATURE_SQL},
        }
    )


def _columns(table: Table | None) -> dict[str, Any] | None:
    """A table's settings without its place and layout."""
    return None if table is None else table.model_dump(exclude=set(PLACE))


def _digest(content: dict[str, Any]) -> str:
    return fingerprint(json.dumps(content, sort_keys=True))[:12]


def examples_dataset(context: Context) -> str:
    return f"{context.examples_in}{EXAMPLES}"


def aggregate_dataset(context: Context, keys: list[str]) -> str:
    """Of an entity; of all events without `keys`."""
    return f"{context.aggregates_in}aggregates/{entity_name(keys) if keys else 'all'}"


def history_dataset(context: Context, history: History) -> str:
    return f"{context.aggregates_in}aggregates/{history.name}"


def model_context(context: Context, project: Project, sql: Mapping[str, str] | None) -> Context:
    """The context in which a saved model's features are built.

    Features, labels and context columns are the model's. How the log is read, where the tables lie,
    the candidates and how many of them are kept are those of the present project file. An action
    that this file does not name any more has no rows after the end of its stream, and such a column
    of a table is null once the table does not have it.

    Args:
        project, sql: of the saved model.
    """
    current = context.project
    tables = {
        which: _at_current_path(getattr(project.log, which), getattr(current.log, which))
        for which in ("users", "items")
    }
    if tables["items"] is None and current.log.items and current.scoring.eligible:
        keys: dict[str, Any] = {"columns": [], "lists": {}, "published": None}
        tables["items"] = current.log.items.model_copy(update=keys)
    # A label may read an action that the project file does not name any more.
    names = {action.name for action in current.log.actions}
    removed = [action for action in project.log.actions if action.name not in names]
    read = {"context": project.log.context, "actions": [*current.log.actions, *removed]}
    log = current.log.model_copy(update=read | tables)
    scoring = current.scoring.model_copy(
        update={"blend": project.scoring.blend, "weights": project.scoring.weights}
    )
    # Labels of open days are to be the same as those of the current project.
    immature = {"immature": current.training.immature}
    training = project.training.model_copy(update=immature)
    own = replace(
        context,
        project=project.model_copy(update={"log": log, "scoring": scoring, "training": training}),
        source=context.source.with_log(log, _past_columns(log, current.log)),
        sql=sql,
        aggregates_in="",
        examples_in="",
        past_actions=frozenset(action.name for action in removed),
    )
    aggregates, view = aggregates_digest(own), view_digest(own)
    return replace(
        own,
        aggregates_in="" if aggregates == aggregates_digest(context) else f"{VIEWS}/{aggregates}/",
        examples_in="" if view == view_digest(context) else f"{VIEWS}/{view}/",
    )


def views_of(
    context: Context, models: Iterable[tuple[Project, Mapping[str, str] | None]]
) -> set[str]:
    """Names of the folders in `views/` that saved models need, each given by project and SQL."""
    needed = set()
    for project, sql in models:
        own = model_context(context, project, sql)
        needed |= {place.split("/")[1] for place in (own.aggregates_in, own.examples_in) if place}
    return needed


def _past_columns(log: Log, current: Log) -> set[str]:
    """Columns of a model's tables, as log.items.price, that the project file does not name."""
    past: set[str] = set()
    for which in ("users", "items"):
        table, now = getattr(log, which), getattr(current, which)
        if table is not None and now is not None:
            named = {*now.joined, now.key, now.published, now.valid_from, now.valid_to, None}
            past |= {f"log.{which}.{c}" for c in {*table.joined, table.published} - named}
    return past


def _at_current_path(table: Table | None, current: Table | None) -> Table | None:
    """A table with the model's columns; its place and key are those of the project file."""
    if table is None or current is None:
        return table
    return table.model_copy(update={name: getattr(current, name) for name in (*PLACE, "key")})
