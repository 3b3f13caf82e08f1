"""The whole night as one flow of sub-flows."""

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
from flows.night import HOOKS, say
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
    """After day D has ended: learn from the log up to D, rank the candidates of D + 1.

    `day` is a day, "yesterday" in the log's time zone (what a schedule wants), or nothing: the
    log's last day. A log that is late is waited for, `wait_minutes` at most, and looked for every
    30 seconds, or twenty times in a shorter wait. Whatever fails before
    scoring, yesterday's champion ranks the candidates, and the run then fails with what failed.
    With a `cluster` (see `runner_of`) days, blocks of users and parts of the candidates are built
    and ranked there; the training stays here.
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
                bad_night(context, chosen, failure)
            except Exception as second:
                say(
                    f"[bold red]failed[/]    ranking failed too: {first_line(second)}",
                    logging.ERROR,
                )
            raise
        ranked = score(context, chosen + timedelta(days=1), cluster)
    say(f"[bold green]done[/]      {ranked.path}")
    create_markdown_artifact(
        key="night",
        markdown=f"{suite.winner.label} won the training of {chosen}; {decision.reason}.\n\n"
        f"Ranked candidates: `{ranked.path}`",
        description="What the night did",
    )
    return ranked


def build_on(cluster: str, context: Context, day: date) -> None:
    """Events, aggregates and examples that a training on D reads, on a cluster."""
    available = context.source.days()
    split = split_days(context.project, needed_days(context.project, available, day), day)
    days = [*split.train, *split.validate, *split.test]
    wanted = needed_history(context.project, available, days)
    run_days.with_options(task_runner=runner_of(cluster, 2))(context, wanted, days)


def chosen_day(context: Context, day: date | str | None) -> date:
    """The day D that is meant. Raises ProjectError for a text that names none."""
    if day == "yesterday":
        return datetime.now(ZoneInfo(context.project.log.timezone)).date() - timedelta(days=1)
    if isinstance(day, str):
        try:
            return date.fromisoformat(day)
        except ValueError as error:
            raise ProjectError(f"day {day!r}: expected YYYY-MM-DD or yesterday") from error
    return day or context.last_day()


def await_log(context: Context, day: date, wait_minutes: float, poll_seconds: float) -> None:
    """Return once the log holds the day and, if it came late, no longer grows.

    Raises ProjectError when the deadline passes without it.
    """
    if wait_minutes <= 0:
        return
    deadline = time.monotonic() + 60 * wait_minutes
    before: list[str] | None = None
    waited = False
    while True:
        here = day in context.source.days()
        now = context.source.state(day) if here else None
        if here and (not waited or now == before):
            return
        if time.monotonic() >= deadline:
            raise ProjectError(
                f"{context.log_path}: the log of {day} did not arrive "
                f"within {wait_minutes:g} minutes"
            )
        if not waited:
            say(f"[bold]wait[/]      the log of {day} is not here yet")
        waited, before = True, now
        time.sleep(poll_seconds)


def first_line(failure: Exception) -> str:
    """What an exception says, or its kind where it says nothing."""
    return (str(failure).strip() or type(failure).__name__).splitlines()[0]


def bad_night(context: Context, day: date, failure: Exception) -> None:
    """Rank with yesterday's champion although something failed; say so. Never hides the failure."""
    connection.connect(context.workspace)
    version = registry.alias_version(context.project, "champion")
    reason = first_line(failure)
    if version is None or not context.workspace.days("events"):
        say(
            f"[bold red]failed[/]    {reason}; there is no champion yet that could rank",
            logging.ERROR,
        )
        return
    say(
        f"[bold red]failed[/]    {reason}; the champion (version {version}) ranks with what is "
        "published",
        logging.ERROR,
    )
    ranked = score(context, day + timedelta(days=1))
    say(f"[bold yellow]ranked[/]    {ranked.path}, by version {version}, after a bad night")
