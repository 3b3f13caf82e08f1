"""Examples: a day's impressions with point-in-time features and labels."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path

import polars as pl

from mtl_ranker.context import Context
from mtl_ranker.features.aggregates import history_fingerprint
from mtl_ranker.features.blocks import Block, user_blocks
from mtl_ranker.features.columns import (
    EVENT,
    LABEL,
    SAMPLE_WEIGHT,
    check_feature_columns,
    check_known_beforehand,
    feature_columns,
)
from mtl_ranker.features.point_in_time import join_features
from mtl_ranker.features.tables import scan_events, tables_fingerprint
from mtl_ranker.features.view import examples_dataset, view_sql
from mtl_ranker.logs.contract import derived_columns, label_expression
from mtl_ranker.workspace import fingerprint


@dataclass(frozen=True)
class ExamplesPart:
    """A block of whole users, and the file of their examples until the day is published."""

    block: Block
    file: Path


@dataclass(frozen=True)
class ExamplesPlan:
    """How a day's examples are to be built.

    Attributes:
        why: the reason, for reports.
        made: provenance of the partition.
        parts: of about `features.block_rows` rows each; empty for a day of one block.
    """

    day: date
    why: str
    made: dict[str, str]
    parts: list[ExamplesPart]


def plan_examples(context: Context, day: date) -> ExamplesPlan | None:
    """The plan of examples/date=D, or None when the published partition is up to date."""
    project, workspace = context.project, context.workspace
    provenance = examples_provenance(context, day)
    why = workspace.stale(examples_dataset(context), day, provenance)
    if why is None:
        return None
    events = scan_events(context, [day])
    check_known_beforehand(project, events.collect_schema().names())
    blocks = user_blocks(events, project.features.block_rows)
    if len(blocks) <= 1:
        return ExamplesPlan(day, why, provenance, [])
    files = workspace.parts(examples_dataset(context), day, provenance, len(blocks))
    parts = [ExamplesPart(block, file) for block, file in zip(blocks, files, strict=True)]
    return ExamplesPlan(day, why, provenance, parts)


def build_examples(context: Context, day: date) -> str | None:
    """Publish examples/date=D: the day's impressions with features and labels.

    A day with more rows than `features.block_rows` is built in blocks of whole users, which are
    concatenated; rows are sorted by time within a block.

    Returns why the day was built, or None when the published partition is up to date.
    """
    plan = plan_examples(context, day)
    if plan is None:
        return None
    for part in plan.parts:
        build_examples_part(context, day, part)
    return finish_examples(context, plan)


def build_examples_part(context: Context, day: date, part: ExamplesPart) -> None:
    """Write one block of a plan to its file, unless an earlier attempt has written it."""
    if part.file.is_file():
        return
    rows = examples_of_block(context, day, part.block)
    with context.workspace.staged(part.file) as temporary:
        rows.sink_parquet(temporary, compression="lz4", engine="streaming")


def finish_examples(context: Context, plan: ExamplesPlan) -> str:
    """Publish the day, whose parts are all built; a day without parts is built here.

    Returns why the day was built.
    """
    workspace = context.workspace
    if plan.parts:
        files = [part.file for part in plan.parts]
        workspace.publish_parts(examples_dataset(context), plan.day, files, plan.made)
    else:
        everything = Block(None, None, 0, everything=True)
        rows = examples_of_block(context, plan.day, everything)
        workspace.publish(examples_dataset(context), plan.day, rows, plan.made)
    return plan.why


def examples_of_block(context: Context, day: date, block: Block) -> pl.LazyFrame:
    """The examples of a block of users on one day, sorted by time."""
    project = context.project
    events = scan_events(context, [day]).with_row_index(EVENT)
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
    copied = ["user_id", "item_id", "timestamp", "date", EVENT]
    optional = ("position", "propensity", project.log.random_exposure)
    copied += [c for c in optional if c is not None and c in event_columns]
    copied += project.log.list_columns
    chosen = dict.fromkeys([*copied, *project.log.context, *feature_columns(project)])
    rows = rows.select(*[c for c in event_columns if c in chosen], *label_columns)
    examples = join_features(context, block.of(rows), day)
    check_feature_columns(project, examples.collect_schema())
    return examples.select(*chosen, *label_columns).sort("timestamp", "user_id", "item_id", EVENT)


def examples_provenance(context: Context, day: date) -> dict[str, str]:
    """Provenance of a day's examples; the encoder's settings do not affect them."""
    project, workspace = context.project, context.workspace
    features, sql = project.features, view_sql(context)
    columns = [c.column for c in features.categoricals] + [c.column for c in features.lists]
    of_histories = {
        "sql/features/history.sql": fingerprint(sql["features/history.sql"]),
        "setting features.histories": fingerprint(*features.histories),
    }
    further = [c for c in project.log.list_columns if c not in {*columns, *project.log.context}]
    return {
        **(of_histories if features.histories else {}),
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
