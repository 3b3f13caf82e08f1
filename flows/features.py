"""The features flow: events → daily aggregates → examples."""

from __future__ import annotations

from datetime import date

from prefect import flow, task

from flows.night import RETRY, announce, with_progress
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError, counted
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.columns import feature_columns
from mtl_ranker.features.days import needed_days, split_days
from mtl_ranker.features.examples import build_examples


@task(name="aggregate-day", task_run_name="aggregate {day}", **RETRY)
def aggregate_task(context: Context, day: date) -> str | None:
    return aggregate_day(context, day)


@task(name="build-examples", task_run_name="examples {day}", **RETRY)
def examples_task(context: Context, day: date, night: date) -> str | None:
    return build_examples(context, day, night)


@flow(name="features", flow_run_name="features {day}", validate_parameters=False)
def features(context: Context, day: date) -> list[date]:
    """Build aggregates of all needed days, and examples of the days that training on D reads.

    Raises ProjectError if the events of D are not published.
    """
    project = context.project
    published = needed_days(project, context.workspace.days("events"), day)
    if day not in published:
        raise ProjectError(f"events of {day} are not published; run `mtl-ranker ingest` first")
    days = split_days(project, published, day)
    rows = days.all
    with context.workspace.lock(f"features {day}"):
        aggregated = [
            aggregate_task(context, d) for d in with_progress(published, "aggregating days")
        ]
        built = [examples_task(context, d, day) for d in with_progress(rows, "building examples")]
    announce(
        "features",
        f"{counted(len([a for a in aggregated if a]), 'day')} aggregated, "
        f"{counted(len([b for b in built if b]), 'day')} of examples "
        f"built, the rest up to date; {len(feature_columns(project))} features",
    )
    return rows
