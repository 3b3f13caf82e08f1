"""The backfill flow: build missing or outdated days of a span in parallel."""

from __future__ import annotations

from datetime import date

from prefect import flow, task, unmapped
from prefect.artifacts import create_table_artifact

from flows.cluster import runner_of, shared_context
from flows.features import aggregate_task
from flows.ingest import actions_task
from flows.night import HOOKS, RETRY, announce
from mtl_ranker.context import Context
from mtl_ranker.errors import counted
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.days import days_between, needed_history
from mtl_ranker.features.examples import (
    ExamplesPart,
    ExamplesPlan,
    build_examples_part,
    finish_examples,
    plan_examples,
)
from mtl_ranker.logs.ingest import ingest_day


@task(name="backfill-day", task_run_name="backfill {day}", **RETRY)
def day_task(context: Context, day: date) -> dict[str, str]:
    """Build the events and aggregates of one day.

    With actions only the events, as aggregates then depend on the events of earlier days.
    """
    report = ingest_day(context, day)
    aggregated = None if context.project.log.actions else aggregate_day(context, day)
    return {"day": str(day), "events": report.why or "", "aggregates": aggregated or ""}


@task(name="plan-examples", task_run_name="plan examples {day}", **RETRY)
def plan_task(context: Context, day: date, night: date | None) -> ExamplesPlan | None:
    return plan_examples(context, day, night)


@task(name="examples-part", task_run_name="examples {day} {part.file.stem}", **RETRY)
def part_task(context: Context, day: date, part: ExamplesPart) -> None:
    build_examples_part(context, day, part)


@task(name="publish-examples", task_run_name="publish examples {plan.day}", **RETRY)
def publish_task(context: Context, plan: ExamplesPlan) -> str:
    return finish_examples(context, plan)


@flow(name="backfill", **HOOKS)
def backfill(
    config: str,
    data: str,
    workspace: str,
    first: date,
    last: date,
    jobs: int = 2,
    cluster: str | None = None,
) -> list[dict[str, str]]:
    """Build events, aggregates and examples of `first`..`last`, and the days of their windows.

    Published and unchanged days are skipped. Returns a row per day with the reasons why its events,
    aggregates and examples were built.

    Args:
        jobs: days at a time.
        cluster: see `runner_of`.
    """
    context = shared_context(config, data, workspace, cluster).pinned()
    days = days_between(context.source.days(), first, last)
    needed = needed_history(context.project, context.source.days(), days)
    with context.workspace.lock(f"backfill {first}..{last}"):
        runner = runner_of(cluster, jobs)
        rows = run_days.with_options(task_runner=runner)(context, needed, days)
    datasets = ("events", "aggregates", "examples")
    built = [row for row in rows if any(row[d] for d in datasets)]
    for row in built:
        reasons = [f"{d} {row[d]}" for d in datasets if row[d]]
        announce("backfill", f"{row['day']}: {'; '.join(reasons)}")
    announce("backfill", f"{counted(len(built), 'day')} built, {len(rows) - len(built)} up to date")
    create_table_artifact(key="backfill", table=rows, description="Why each day was built")
    return rows


@flow(name="backfill-days", validate_parameters=False)
def run_days(
    context: Context, needed: list[date], days: list[date], night: date | None = None
) -> list[dict[str, str]]:
    """Events and aggregates of all needed days in parallel, then examples of `days`.

    The blocks of users of a large day are separate tasks. Returns a row per needed day.

    Args:
        night: on which the labels are known; None for the last published day.
    """
    rows = day_task.map(unmapped(context), needed).result()
    if context.project.log.actions:
        actions_task.map(unmapped(context), needed).result()
        made = aggregate_task.map(unmapped(context), needed).result()
        rows = [row | {"aggregates": why or ""} for row, why in zip(rows, made, strict=True)]
    plans = [
        plan
        for plan in plan_task.map(unmapped(context), days, unmapped(night)).result()
        if plan is not None
    ]
    parts = [(plan.day, part) for plan in plans for part in plan.parts]
    if parts:
        part_days, day_parts = (list(column) for column in zip(*parts, strict=True))
        part_task.map(unmapped(context), part_days, day_parts).result()
    published = publish_task.map(unmapped(context), plans).result() if plans else []
    context.workspace.refresh()
    reasons = {plan.day: why for plan, why in zip(plans, published, strict=True)}
    return [row | {"examples": reasons.get(day, "")} for row, day in zip(rows, needed, strict=True)]
