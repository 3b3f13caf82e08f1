"""Missing or outdated days of a span, built in parallel."""

from __future__ import annotations

import importlib.util
import os
from datetime import date
from typing import Any

from prefect import flow, task, unmapped
from prefect.artifacts import create_table_artifact
from prefect.task_runners import ThreadPoolTaskRunner

from flows.night import HOOKS, RETRY, Night, open_night, say
from mtl_ranker.errors import ProjectError
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


def runner_of(cluster: str | None, jobs: int) -> Any:
    """Threads of this process, or Dask's workers: a day is a unit of work, wherever it runs.

    Args:
        cluster: `local` starts a Dask cluster of `jobs` processes here; an address such as
            tcp://scheduler:8786 is of a running one, whose workers see the same folders.

    Raises ProjectError without prefect-dask, or without a Prefect server: an ephemeral API, one a
    process, would leave several processes with one SQLite file (PrefectHQ/prefect#7277).
    """
    if cluster is None:
        return ThreadPoolTaskRunner(max_workers=jobs)
    if importlib.util.find_spec("prefect_dask") is None:
        raise ProjectError(
            "--cluster: prefect-dask is not installed: pip install mtl_ranker[cluster]"
        )
    if "PREFECT_API_URL" not in os.environ:
        raise ProjectError(
            "--cluster needs a Prefect server: set PREFECT_API_URL (docs/performance.md)"
        )
    from prefect_dask import DaskTaskRunner

    if cluster == "local":
        return DaskTaskRunner(cluster_kwargs={"n_workers": jobs, "threads_per_worker": 1})
    if "://" not in cluster:
        raise ProjectError(
            f"--cluster {cluster}: allowed: local, or an address such as tcp://host:8786"
        )
    return DaskTaskRunner(address=cluster)


@flow(name="backfill-days", validate_parameters=False)
def run_days(night: Night, wanted: list[date], days: list[date]) -> list[dict[str, str]]:
    """All events and aggregates in parallel, then the examples that look back at them."""
    rows = day_task.map(unmapped(night), wanted).result()
    made = examples_task.map(unmapped(night), days).result()
    reasons = dict(zip(days, made, strict=True))
    return [row | {"examples": reasons.get(day, "")} for row, day in zip(rows, wanted, strict=True)]
