"""The nightly flow: ingest, features, train, promote and score as sub-flows."""

from __future__ import annotations

import logging
import time
from datetime import date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from flows.backfill import run_days
from flows.cluster import runner_of
from flows.features import features
from flows.ingest import ingest
from flows.night import HOOKS, announce
from flows.promote import promote
from flows.score import score
from flows.train import train
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.days import needed_days, needed_history, split_days
from mtl_ranker.logs.sources import open_context
from mtl_ranker.ranking.scoring import Ranked
from mtl_ranker.tracking import connection, registry
from mtl_ranker.training.network import model_specs


def run_name() -> str:
    return f"nightly {flow_run.parameters.get('day') or 'latest'}"


@flow(name="nightly", flow_run_name=run_name, validate_parameters=False, **HOOKS)
def nightly(
    config: str,
    data: str,
    workspace: str,
    day: date | str | None = None,
    wait_minutes: float = 0.0,
    poll_seconds: float | None = None,
    cluster: str | None = None,
) -> Ranked:
    """Train on the log up to day D, which has ended, and rank the candidates of D + 1.

    If a step before scoring fails, the current champion ranks the candidates, and the run then
    fails with the original error.

    Args:
        day: D, or "yesterday" in the log's time zone (for schedules); None for the log's last day.
        wait_minutes: how long to wait for a late log.
        poll_seconds: time between checks for a late log; by default 30 seconds, or a twentieth of
            a shorter wait.
        cluster: where days, blocks of users and parts of the candidates are built and ranked (see
            `runner_of`); the training runs in this process.
    """
    context = open_context(config, Path(data), Path(workspace))
    model_specs(context.project)
    chosen = chosen_day(context, day)
    with context.workspace.lock(f"nightly {chosen}"):
        try:
            await_log(context, chosen, wait_minutes, poll_seconds or min(30.0, 3 * wait_minutes))
            if cluster is not None:
                build_on(cluster, context, chosen)
            ingest(context, chosen)
            features(context, chosen)
            suite = train(context, chosen)
            decision = promote(context, chosen)
        except Exception as failure:
            try:
                rank_with_champion(context, chosen, failure)
            except Exception as ranking_failure:
                announce(
                    f"[bold red]failed[/]    ranking failed too: {first_line(ranking_failure)}",
                    logging.ERROR,
                )
            raise
        ranked = score(context, chosen + timedelta(days=1), cluster)
    announce(f"[bold green]done[/]      {ranked.path}")
    create_markdown_artifact(
        key="night",
        markdown=f"{suite.winner.label} won the training of {chosen}; {decision.reason}.\n\n"
        f"Ranked candidates: `{ranked.path}`",
        description="Result of the night",
    )
    return ranked


def build_on(cluster: str, context: Context, day: date) -> None:
    """Build events, aggregates and examples that a training on D reads on a cluster."""
    available = context.source.days()
    split = split_days(context.project, needed_days(context.project, available, day), day)
    days = [*split.train, *split.validate, *split.test]
    wanted = needed_history(context.project, available, days)
    run_days.with_options(task_runner=runner_of(cluster, 2))(context, wanted, days)


def chosen_day(context: Context, day: date | str | None) -> date:
    """The day D: given, yesterday, or the log's last. Raises ProjectError for an invalid text."""
    if day == "yesterday":
        return datetime.now(ZoneInfo(context.project.log.timezone)).date() - timedelta(days=1)
    if isinstance(day, str):
        try:
            return date.fromisoformat(day)
        except ValueError as error:
            raise ProjectError(f"day {day!r}: expected YYYY-MM-DD or yesterday") from error
    return day or context.last_day()


def await_log(context: Context, day: date, wait_minutes: float, poll_seconds: float) -> None:
    """Return once the log contains the day and, if it was late, its files no longer change.

    Raises ProjectError after `wait_minutes`.
    """
    if wait_minutes <= 0:
        return
    deadline = time.monotonic() + 60 * wait_minutes
    previous_state: list[str] | None = None
    waited = False
    while True:
        arrived = day in context.source.days()
        state = context.source.state(day) if arrived else None
        if arrived and (not waited or state == previous_state):
            return
        if time.monotonic() >= deadline:
            raise ProjectError(
                f"{context.log_path}: the log of {day} did not arrive "
                f"within {wait_minutes:g} minutes"
            )
        if not waited:
            announce(f"[bold]wait[/]      the log of {day} is not here yet")
        waited, previous_state = True, state
        time.sleep(poll_seconds)


def first_line(failure: Exception) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(failure).strip() or type(failure).__name__).splitlines()[0]


def rank_with_champion(context: Context, day: date, failure: Exception) -> None:
    """After a failure, rank the candidates of D + 1 with the current champion, if there is one."""
    connection.connect(context.workspace)
    version = registry.alias_version(context.project, "champion")
    reason = first_line(failure)
    if version is None or not context.workspace.days("events"):
        announce(
            f"[bold red]failed[/]    {reason}; there is no champion to rank with",
            logging.ERROR,
        )
        return
    announce(
        f"[bold red]failed[/]    {reason}; the champion (version {version}) ranks with the "
        "published data",
        logging.ERROR,
    )
    ranked = score(context, day + timedelta(days=1))
    announce(f"[bold yellow]ranked[/]    {ranked.path}, by version {version}, after the failure")
