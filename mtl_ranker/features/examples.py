"""Examples: a day's impressions with point-in-time features and labels.

Labels that read actions are as known at the end of the night's day D. While the windows of a day's
actions are open, its labels are refreshed; its features stay as they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import PurePath

import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import history_fingerprint
from mtl_ranker.features.columns import (
    EVENT,
    LABEL,
    OPEN,
    SAMPLE_WEIGHT,
    check_feature_columns,
    check_known_beforehand,
    feature_columns,
)
from mtl_ranker.features.point_in_time import join_features
from mtl_ranker.features.sql import day_number
from mtl_ranker.features.tables import scan_events, tables_fingerprint
from mtl_ranker.features.view import examples_dataset, view_sql
from mtl_ranker.logs.actions import (
    action_days,
    actions_digest,
    end_of,
    final_day,
    with_actions,
)
from mtl_ranker.logs.blocks import Block, user_blocks
from mtl_ranker.logs.contract import (
    derived_columns,
    label_actions,
    label_expression,
    may_fall,
    unusable_labels,
)
from mtl_ranker.workspace import VERSION, fingerprint

LOG = logging.getLogger(__name__)
LABELS = "actions of the labels"  # in the provenance: all that can change while features stay


@dataclass(frozen=True)
class ExamplesPart:
    """A block of whole users, and the file of their examples until the day is published.

    Attributes:
        file: below the workspace's root.
        night: D, on which the labels are known.
    """

    block: Block
    file: PurePath
    night: date


@dataclass(frozen=True)
class ExamplesPlan:
    """How a day's examples are to be built.

    Attributes:
        why: the reason, for reports.
        made: provenance of the partition.
        parts: of about `features.block_rows` rows each; empty for a day of one block.
        night: D, on which the labels are known.
        only_labels: the features are up to date.
    """

    day: date
    why: str
    made: dict[str, str]
    parts: list[ExamplesPart]
    night: date
    only_labels: bool = False


def plan_examples(context: Context, day: date, night: date | None = None) -> ExamplesPlan | None:
    """The plan of a day's examples, or None when the published partition is up to date.

    Args:
        night: D, on which the labels are known; None for the last published day.
    """
    project, workspace = context.project, context.workspace
    night = night or workspace.days("events")[-1]
    provenance, dataset = examples_provenance(context, day, night), examples_dataset(context)
    why = workspace.stale(dataset, day, provenance)
    if why is None:
        return None
    published = workspace.provenance(dataset, day) or {}
    if LABELS in published and _without(published) == _without(provenance):
        return ExamplesPlan(day, why, provenance, [], night, only_labels=True)
    events = scan_events(context, [day])
    check_known_beforehand(project, events.collect_schema().names())
    blocks = user_blocks(events, project.features.block_rows)
    if len(blocks) <= 1:
        return ExamplesPlan(day, why, provenance, [], night)
    files = workspace.parts(examples_dataset(context), day, provenance, len(blocks))
    parts = [ExamplesPart(block, file, night) for block, file in zip(blocks, files, strict=True)]
    return ExamplesPlan(day, why, provenance, parts, night)


def _without(provenance: dict[str, str]) -> dict[str, str]:
    """The provenance of the features alone.

    The versions of tables are left out: the joined rows determine whether features change.
    """
    return {
        name: made
        for name, made in provenance.items()
        if name != LABELS and not name.startswith(VERSION)
    }


def build_examples(context: Context, day: date, night: date | None = None) -> str | None:
    """Publish a day's examples: its impressions with features and labels.

    A day with more rows than `features.block_rows` is built in blocks of whole users, which are
    concatenated; rows are sorted by time within a block.

    Returns why the day was built, or None when the published partition is up to date.

    Args:
        night: D, on which the labels are known; None for the last published day.
    """
    context = context.pinned()
    plan = plan_examples(context, day, night)
    if plan is None:
        return None
    for part in plan.parts:
        build_examples_part(context, day, part)
    return finish_examples(context, plan)


def build_examples_part(context: Context, day: date, part: ExamplesPart) -> None:
    """Write one block of a plan to its file, unless an earlier attempt has written it."""
    if context.workspace.has(part.file):
        return
    rows = examples_of_block(context, day, part)
    with context.workspace.published(part.file) as temporary:
        rows.sink_parquet(temporary, compression="lz4", engine="streaming")


def finish_examples(context: Context, plan: ExamplesPlan) -> str:
    """Publish the day, whose parts are all built; a day without parts is built here.

    Returns why the day was built.
    """
    workspace = context.workspace
    _warn_of_labels(context, plan)
    if plan.only_labels:
        rows = _relabelled(context, plan)
        workspace.publish(examples_dataset(context), plan.day, rows, plan.made)
    elif plan.parts:
        files = [part.file for part in plan.parts]
        workspace.publish_parts(examples_dataset(context), plan.day, files, plan.made)
    else:
        everything = Block(None, None, 0, everything=True)
        place = workspace.place(examples_dataset(context), plan.day)
        whole = ExamplesPart(everything, PurePath(place), plan.night)
        rows = examples_of_block(context, plan.day, whole)
        workspace.publish(examples_dataset(context), plan.day, rows, plan.made)
    return plan.why


def _relabelled(context: Context, plan: ExamplesPlan) -> pl.LazyFrame:
    """The published examples with new labels."""
    published = context.workspace.scan(examples_dataset(context), [plan.day])
    columns = published.collect_schema().names()
    names = _label_columns(context.project)
    labels = labelled_events(context, plan.day, plan.night).select(EVENT, *names)
    known = _label_columns(context.project, every=True)
    features = [c for c in columns if c not in known]
    kept = published.select(features).join(labels, on=EVENT, how="left", maintain_order="left")
    return kept.select(*features, *names)


def _warn_of_labels(context: Context, plan: ExamplesPlan) -> None:
    """Log how many labels are missing as their actions give a value that is not allowed.

    Raises ProjectError for a label of which this is true on more than `log.max_bad_share` of the
    rows.
    """
    project = context.project
    counts = unusable_labels(project)
    if not counts:
        return
    rows = _with_known_actions(context, plan.day, plan.night)
    found = rows.select(pl.len(), *(count.alias(reason) for reason, count in counts.items()))
    total, *each = found.collect(engine="streaming").row(0)
    for reason, count in zip(counts, each, strict=True):
        message = f"{context.log_path} ({plan.day}): {count:,} of {total:,} rows: {reason}"
        if count > project.log.max_bad_share * total:
            raise ProjectError(
                f"{message}; allowed: log.max_bad_share = {project.log.max_bad_share:.1%}"
            )
        if count:
            LOG.warning("%s; these labels are missing", message)


def _with_known_actions(context: Context, day: date, night: date) -> pl.LazyFrame:
    """A day's events with `EVENT` and, in a project with actions, what is known of them on D."""
    rows = scan_events(context, [day]).with_row_index(EVENT)
    if not context.project.log.actions:
        return rows
    return with_actions(context, rows, day, pl.col("known") <= day_number(night))


def _label_columns(project: Project, every: bool = False) -> list[str]:
    """Names of the columns that `labelled_events` adds.

    Args:
        every: with those that it adds under other settings of the training.
    """
    names = [LABEL + o.name for o in project.objectives]
    open_ones = [o.name for o in project.objectives] if every else soft_objectives(project)
    names += [OPEN + name for name in open_ones]
    return names if project.training.sample_weight is None else [*names, SAMPLE_WEIGHT]


def soft_objectives(project: Project) -> list[str]:
    """Objectives with soft labels: binary ones whose label reads actions that only raise it.

    None without `training.immature = "soft"`.
    """
    if project.training.immature != "soft":
        return []
    return [
        objective.name
        for objective in project.objectives
        if objective.kind == "binary"
        and label_actions(project, [objective])
        and not may_fall(project, objective)
    ]


def labelled_events(context: Context, day: date, night: date) -> pl.LazyFrame:
    """A day's events with `EVENT`, labels and sample weights, as known at the end of D.

    With `training.immature = "positives"`, a binary label that actions only raise is missing while
    it is 0 and the window of its actions is open, and any other label while the window is open.
    With `"soft"`, every label is missing while the window is open; what is observed of the labels
    of `soft_objectives` is in columns of their own (`OPEN`), which only trainings read.

    Args:
        night: D.
    """
    project, labels = context.project, derived_columns(context.project)
    softened, columns = soft_objectives(project), []
    for objective in project.objectives:
        label, actions = labels[objective.name], label_actions(project, [objective])
        if actions and project.training.immature != "wait":
            late = max(action.span for action in actions)
            # `final_day` has a second tolerance, for the row's own time after the end of its day.
            late += timedelta(hours=project.log.day_tolerance_hours)
            is_open = pl.col("timestamp") + late >= end_of(project.log, night)
            may_change = is_open
            if objective.name in softened:
                observed = pl.when(is_open).then(label).cast(pl.Float32)
                columns.append(observed.alias(OPEN + objective.name))
            elif project.training.immature == "positives" and not may_fall(project, objective):
                may_change = is_open & (label == 0)
            label = pl.when(~may_change).then(label)
        columns.append(label.cast(pl.Float32).alias(LABEL + objective.name))
    if project.training.sample_weight is not None:
        weight = label_expression(project.training.sample_weight, "training.sample_weight")
        columns.append(weight.cast(pl.Float32).alias(SAMPLE_WEIGHT))
    return _with_known_actions(context, day, night).with_columns(columns)


def examples_of_block(context: Context, day: date, part: ExamplesPart) -> pl.LazyFrame:
    """The examples of a block of users on one day, sorted by time."""
    project, block = context.project, part.block
    event_columns = scan_events(context, [day]).with_row_index(EVENT).collect_schema().names()
    rows = labelled_events(context, day, part.night)
    label_columns = _label_columns(project)
    copied = ["user_id", "item_id", "timestamp", "date", EVENT]
    optional = ("position", "propensity", project.log.random_exposure)
    copied += [c for c in optional if c is not None and c in event_columns]
    copied += project.log.list_columns
    chosen = dict.fromkeys([*copied, *project.log.context, *feature_columns(project)])
    rows = rows.select(*[c for c in event_columns if c in chosen], *label_columns)
    examples = join_features(context, block.of(rows), day)
    check_feature_columns(project, examples.collect_schema())
    return examples.select(*chosen, *label_columns).sort("timestamp", "user_id", "item_id", EVENT)


def examples_provenance(context: Context, day: date, night: date | None = None) -> dict[str, str]:
    """Provenance of a day's examples; the encoder's settings do not affect them.

    Args:
        night: D, on which the labels are known; None for the last published day.
    """
    project, workspace = context.project, context.workspace
    features, sql = project.features, view_sql(context)
    columns = [c.column for c in features.categoricals] + [c.column for c in features.lists]
    of_histories = {
        "sql/features/history.sql": fingerprint(sql["features/history.sql"]),
        "setting features.histories": fingerprint(*features.histories),
    }
    with_labels = {}
    if project.log.actions:
        last = night or max(workspace.days("events"), default=day)
        with_labels = {LABELS: _known_labels(context, day, last)}
    further = [c for c in project.log.list_columns if c not in {*columns, *project.log.context}]
    made = {
        **with_labels,
        **(of_histories if features.histories else {}),
        **({"setting features.derived": fingerprint(features.derived)} if features.derived else {}),
        **(
            {"setting features.embeddings": fingerprint(features.embeddings)}
            if features.embeddings
            else {}
        ),
        **({"setting log.list or log.request": fingerprint(further)} if further else {}),
        "events": workspace.published_fingerprint("events", day) or "",
        "aggregates of earlier days": history_fingerprint(context, day),
        "sql/features/windows.sql": fingerprint(sql["features/windows.sql"]),
        "sql/features/join.sql": fingerprint(sql["features/join.sql"]),
        "rows of the user and item tables": tables_fingerprint(context, day),
        "setting features.windows": fingerprint(features.windows),
        "setting features.smoothing": fingerprint(features.smoothing),
        "setting features.rates": fingerprint(features.rates),
        "setting features.entities": fingerprint(features.entities),
        "setting features.signals": fingerprint(list(features.signals)),
        "setting features' columns": fingerprint(
            columns, features.numerics, project.log.context, EVENT
        ),
    }
    tables = {k: v for k, v in context.source.versions().items() if k in ("log.users", "log.items")}
    return workspace.with_versions(examples_dataset(context), day, made, tables)


def _known_labels(context: Context, day: date, night: date) -> str:
    """A hash of the actions that a day's labels read, and of how they are read."""
    project, number = context.project, day_number(day)
    actions = label_actions(project)
    days = {action.name: action_days(context, action, day) for action in actions}
    which = (pl.col("impression_day") == number) & (pl.col("known") <= day_number(night))
    known = actions_digest(context, f"labels of {day}", days, which)
    is_open = project.training.immature != "wait" and final_day(project, actions, day) > night
    settings = [(a.name, a.reduce, a.value) for a in actions]
    return fingerprint(known, project.training.immature, night if is_open else None, settings)
