"""Build the days that a training reads one after the other, without Prefect."""

from __future__ import annotations

from datetime import date

from mtl_ranker.context import Context
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.days import SplitDays, needed_days, split_days
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day


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
        build_examples(context, split_day)
    return split
