"""Missing or outdated days of a span, built in parallel."""

from __future__ import annotations

from datetime import date
from typing import Any

from prefect import flow, task, unmapped
from prefect.artifacts import create_table_artifact
from prefect.task_runners import ThreadPoolTaskRunner

from flows.night import HOOKS, RETRY, Night, open_night, say
from mtl_ranker.features.queries import aggregate_day, build_examples, needed_history
from mtl_ranker.logs.ingest import ingest_day


@task(name="backfill-day", task_run_name="backfill {day}", **RETRY)
def day_task(night: Night, day: date) -> dict[str, str]:
    """Events and aggregates of one day, which depend on no other day."""
    report = ingest_day(night.project, night.source, night.workspace, day)
    aggregated = aggregate_day(night.project, night.source, night.workspace, day)
    return {"day": str(day), "events": report.why or "", "aggregates": aggregated or ""}


@task(name="backfill-examples", task_run_name="backfill examples {day}", **RETRY)
def examples_task(night: Night, day: date) -> str:
    return build_examples(night.project, night.source, night.workspace, day) or ""


@flow(name="backfill", validate_parameters=False, **HOOKS)
def backfill(
    config: str, data: str, workspace: str, first: date, last: date, jobs: int = 2
) -> list[dict[str, str]]:
    """Events, aggregates and examples of the days `first`..`last`, and the history they look at.

    Days are built `jobs` at a time; what is published and unchanged is skipped. Returns why each
    part of each day was built.
    """
    night = open_night(config, data, workspace)
    days = night.source.days_between(first, last)
    wanted = needed_history(night.project, night.source.days(), days)
    with night.workspace.lock(f"backfill {first}..{last}"):
        runner: Any = ThreadPoolTaskRunner(max_workers=jobs)
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
    rows = day_task.map(unmapped(night), wanted).result()
    made = examples_task.map(unmapped(night), days).result()
    reasons = dict(zip(days, made, strict=True))
    return [row | {"examples": reasons.get(day, "")} for row, day in zip(rows, wanted, strict=True)]
