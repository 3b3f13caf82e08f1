"""Missing or outdated days of a span, built in parallel."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from prefect import flow, task, unmapped
from prefect.artifacts import create_table_artifact

from flows.cluster import runner_of
from flows.night import HOOKS, RETRY, Night, open_night, say
from mtl_ranker.features.blocks import Block
from mtl_ranker.features.queries import (
    ExamplesPlan,
    aggregate_day,
    build_examples_part,
    finish_examples,
    needed_history,
    plan_examples,
)
from mtl_ranker.logs.ingest import ingest_day


@task(name="backfill-day", task_run_name="backfill {day}", **RETRY)
def day_task(night: Night, day: date) -> dict[str, str]:
    """Events and aggregates of one day, which depend on no other day."""
    report = ingest_day(night.project, night.source, night.workspace, day)
    aggregated = aggregate_day(night.project, night.source, night.workspace, day)
    return {"day": str(day), "events": report.why or "", "aggregates": aggregated or ""}


@task(name="plan-examples", task_run_name="plan examples {day}", **RETRY)
def plan_task(night: Night, day: date) -> ExamplesPlan | None:
    return plan_examples(night.project, night.source, night.workspace, day)


@task(name="examples-part", task_run_name="examples {day} {file.stem}", **RETRY)
def part_task(night: Night, day: date, block: Block, file: Path) -> None:
    build_examples_part(night.project, night.source, night.workspace, day, block, file)


@task(name="publish-examples", task_run_name="publish examples {plan.day}", **RETRY)
def publish_task(night: Night, plan: ExamplesPlan) -> str:
    return finish_examples(night.project, night.source, night.workspace, plan)


@flow(name="backfill", validate_parameters=False, **HOOKS)
def backfill(
    config: str,
    data: str,
    workspace: str,
    first: date,
    last: date,
    jobs: int = 2,
    cluster: str | None = None,
) -> list[dict[str, str]]:
    """Events, aggregates and examples of the days `first`..`last`, and the history they look at.

    Days are built `jobs` at a time; what is published and unchanged is skipped. Returns why each
    part of each day was built. `cluster`: see `runner_of`.
    """
    night = open_night(config, data, workspace)
    days = night.source.days_between(first, last)
    wanted = needed_history(night.project, night.source.days(), days)
    with night.workspace.lock(f"backfill {first}..{last}"):
        runner = runner_of(cluster, jobs)
        rows = run_days.with_options(task_runner=runner)(night, wanted, days)
    built = [row for row in rows if any(row[k] for k in ("events", "aggregates", "examples"))]
    for row in built:
        parts = [f"{k} {row[k]}" for k in ("events", "aggregates", "examples") if row[k]]
        say(f"[bold]backfill[/]  {row['day']}: {'; '.join(parts)}")
    say(f"[bold]backfill[/]  {len(built)} days built, {len(rows) - len(built)} up to date")
    create_table_artifact(key="backfill", table=rows, description="Why each day was built")
    return rows


@flow(name="backfill-days", validate_parameters=False)
def run_days(night: Night, wanted: list[date], days: list[date]) -> list[dict[str, str]]:
    """All events and aggregates in parallel, then the examples that look back at them: a large
    day's blocks of users each by itself.
    """
    rows = day_task.map(unmapped(night), wanted).result()
    plans = [plan for plan in plan_task.map(unmapped(night), days).result() if plan is not None]
    parts = [(plan.day, *part) for plan in plans for part in plan.parts]
    if parts:
        dates, blocks, files = (list(column) for column in zip(*parts, strict=True))
        part_task.map(unmapped(night), dates, blocks, files).result()
    made = publish_task.map(unmapped(night), plans).result() if plans else []
    reasons = {plan.day: why for plan, why in zip(plans, made, strict=True)}
    return [row | {"examples": reasons.get(day, "")} for row, day in zip(rows, wanted, strict=True)]
