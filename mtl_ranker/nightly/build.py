"""Build the days that a training reads one after the other, without Prefect."""

from __future__ import annotations

from datetime import date

import polars as pl

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.columns import EVENT
from mtl_ranker.features.days import SplitDays, needed_days, needed_history, split_days
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.view import examples_dataset, model_context
from mtl_ranker.logs.ingest import ingest_day, ingest_missing
from mtl_ranker.ranking.artifact import RankerArtifact


def build_split(context: Context, day: date) -> SplitDays:
    """Publish events, aggregates and examples that a training on D reads; returns its split.

    Published and unchanged days are skipped. Raises ProjectError for an empty part of the split
    and for a day that breaks the contract.
    """
    project = context.project
    needed = needed_days(project, context.source.days(), day)
    split = split_days(project, needed, day)
    for needed_day in needed:
        ingest_day(context, needed_day)
        aggregate_day(context, needed_day)
    for split_day in split.all:
        build_examples(context, split_day, day)
    return split


def model_examples(
    context: Context, artifact: RankerArtifact, days: list[date], night: date | None = None
) -> pl.DataFrame:
    """Examples of `scan_model_examples`, in the order of the events."""
    rows = scan_model_examples(context, artifact, days, night).collect(engine="streaming")
    return rows.sort("date", EVENT)


def scan_model_examples(
    context: Context, artifact: RankerArtifact, days: list[date], night: date | None = None
) -> pl.LazyFrame:
    """Examples of published days with a model's own features.

    Where they differ from the project's, they are built here. Raises ProjectError for days that
    are not built.

    Args:
        night: D, on which the labels are known; None for the last published day.
    """
    own, workspace = model_context(context, artifact.project, artifact.sql), context.workspace
    if own.examples_in:
        ingest_missing(own, needed_history(own.project, own.source.days(), days))
    published = workspace.days("events")
    if own.examples_in:
        for day in needed_history(own.project, published, days):
            aggregate_day(own, day)
        for day in days:
            build_examples(own, day, night)
    dataset = examples_dataset(own)
    unbuilt = sorted(set(days) - set(workspace.days(dataset)))
    if unbuilt:
        raise ProjectError(
            f"examples of {unbuilt[0]} are not built; run `mtl-ranker features` first"
        )
    return workspace.scan(dataset, days)
