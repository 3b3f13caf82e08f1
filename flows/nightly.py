"""The nightly flow: ingest, features, train, promote and score as sub-flows."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from typing import Literal

import polars as pl
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.runtime import flow_run

from flows.backfill import run_days
from flows.cluster import check_workers, runner_of, shared_context
from flows.connect import connect
from flows.features import features
from flows.ingest import ingest
from flows.night import HOOKS, announce
from flows.promote import promote
from flows.schedule import in_turn, mark_lost_runs, scheduled_yesterday
from flows.score import publish_ranked, score
from flows.train import train
from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError, first_line
from mtl_ranker.features.days import last_final_day, needed_days, needed_history, split_days
from mtl_ranker.nightly import history
from mtl_ranker.nightly.history import NightRecord, record_of
from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.results import Suite
from mtl_ranker.ranking.candidates import (
    check_candidates,
    describe_candidates,
    describe_generated,
)
from mtl_ranker.ranking.rules import check_rules
from mtl_ranker.ranking.scoring import Ranked
from mtl_ranker.reports.history import publish_index
from mtl_ranker.reports.page import with_lists
from mtl_ranker.tracking import registry
from mtl_ranker.training.device import check_devices
from mtl_ranker.training.specs import model_specs
from mtl_ranker.workspace import FileSize

ALARM = "mtl_ranker.night.alarm"  # the event of a night with alarms


def run_name() -> str:
    return f"nightly {flow_run.parameters.get('day') or 'latest'}"


@flow(name="nightly", flow_run_name=run_name, **HOOKS)
def nightly(
    config: str,
    data: str,
    workspace: str,
    day: date | Literal["yesterday"] | None = None,
    wait_minutes: float = 0.0,
    poll_seconds: float | None = None,
    cluster: str | None = None,
) -> Ranked:
    """Train on the log up to day D, which has ended, and rank the candidates of D + 1.

    If a step fails, the champion, or the one before it, ranks the candidates, and the run then
    fails with the original error.

    Args:
        day: D, or "yesterday" in the log's time zone (for schedules); None for the log's last day.
        wait_minutes: how long to wait for a late log.
        poll_seconds: time between checks for a late log; by default 30 seconds, or a twentieth of
            a shorter wait.
        cluster: where days, blocks of users and parts of the candidates are built and ranked (see
            `runner_of`), and models trained (see `trainer_of`).
    """
    context = shared_context(config, data, workspace, cluster)
    model_specs(context.project)
    check_rules(context)
    if cluster is None:  # its workers may have other devices
        check_devices(context.project)
    mark_lost_runs()
    chosen = chosen_day(context, day)
    tomorrow = chosen + timedelta(days=1)
    check_candidates(context, tomorrow)
    check_workers(cluster)
    began = time.monotonic()
    with in_turn(context.workspace, f"nightly {chosen}", wait_minutes):
        try:
            await_log(context, chosen, wait_minutes, poll_seconds or min(30.0, 3 * wait_minutes))
            connect(context)  # before work that a night without MLflow would lose
            context = context.pinned()  # one version of each table for the whole night
            if cluster is not None:
                build_on(cluster, context, chosen)
            ingest(context, chosen)
            look_at_candidates(context, tomorrow)
            features(context, chosen)
            suite = train(context, chosen, cluster)
            decision = promote(context, chosen)
            if registry.alias_version(context.project, "champion") is None:
                raise ProjectError(f"there is no champion to rank with: {decision.reason}")
        except Exception as failure:
            rank_after(failure, context, tomorrow, ["champion", "previous_champion"])
            record_failure(context, chosen, failure)
            raise
        try:
            ranked = score(context, tomorrow, cluster, publish=False)
        except Exception as failure:
            rank_after(failure, context, tomorrow, ["previous_champion"])
            record_failure(context, chosen, failure)
            raise
        record(context, suite, decision, ranked, began)
    announce("done", ranked.path)
    create_markdown_artifact(
        key="night",
        markdown=f"{suite.winner.label} won the training of {chosen}; {decision.reason}.\n\n"
        f"Ranked candidates: `{ranked.path}`",
        description="Result of the night",
    )
    publish_ranked(context, tomorrow)
    return ranked


def record(
    context: Context, suite: Suite, decision: Decision, ranked: Ranked, began: float
) -> None:
    """Add the lists to the night's report, record the night and rebuild the page of all nights.

    The report is replaced here and in MLflow. Never raises, as the ranking is published: a problem
    is printed.

    Args:
        began: when the night began, by the monotonic clock.
    """
    workspace, day = context.workspace, suite.night
    ranked_day = date.fromisoformat(ranked.path.parent.name.removeprefix("date="))
    place = suite.report
    try:
        page = workspace.file(place).read_text("utf-8")
        page = with_lists(page, ranked_day, ranked.effects)
        workspace.publish_file(place, page)
        challenger = registry.alias_version(context.project, "challenger")
        if ranked.effects and challenger is not None:
            registry.replace_report(context.project, challenger, page)
        champion = registry.champion(context.project)
        found = record_of(context, suite, decision, champion, ranked)
        history.store(workspace, replace(found, seconds=time.monotonic() - began))
        announce("history", publish_index(workspace, context.project))
        raise_alarms(context.project, day, history.stored(workspace))
    except Exception as problem:
        announce("history", f"the night is not recorded: {first_line(problem)}", logging.ERROR)


def raise_alarms(project: Project, day: date, records: list[NightRecord]) -> None:
    """Announce what stands out on a night, and send it as one event for Prefect's automations.

    Without a flow run no event is sent.
    """
    lines = history.alarms(records, project)[day]
    for line in lines:
        announce("alarm", line, logging.WARNING)
    if lines and flow_run.id is not None:
        resource = {
            "prefect.resource.id": f"mtl_ranker.project.{project.name}",
            "prefect.resource.name": project.name,
        }
        emit_event(ALARM, resource=resource, payload={"day": str(day), "alarms": lines})


def record_failure(context: Context, day: date, failure: Exception) -> None:
    """Record a night that failed; never raises, as the failure itself is to be reported."""
    try:
        tested = last_final_day(context.project, day)
        record = NightRecord(day=day, tested=tested, failed=first_line(failure))
        history.store(context.workspace, record)
        publish_index(context.workspace, context.project)
    except Exception as problem:
        announce("failed", f"the night is not recorded: {first_line(problem)}", logging.ERROR)


def build_on(cluster: str, context: Context, day: date) -> None:
    """Build events, aggregates and examples that a training on D reads on a cluster."""
    available = context.source.days()
    split = split_days(context.project, needed_days(context.project, available, day), day)
    days = split.all
    wanted = needed_history(context.project, available, days)
    run_days.with_options(task_runner=runner_of(cluster, 2))(context, wanted, days, day)


def chosen_day(context: Context, day: date | Literal["yesterday"] | None) -> date:
    """The day D: given, or the log's last; "yesterday" is the day before the scheduled start."""
    if day == "yesterday":
        return scheduled_yesterday(context.project.log.timezone)
    return day or context.last_day()


def arrival(context: Context, day: date) -> tuple[bool, list[FileSize]]:
    """Whether the log and every stream of actions have the day, and its files.

    A stream that is not divided into days has it.
    """
    streams = [context.source.actions(action.name) for action in context.project.log.actions]
    divided = [stream for stream in streams if not stream.undivided]
    if not all(source.has_day(day) for source in (context.source, *divided)):
        return False, []
    having = [stream for stream in streams if stream.has_day(day)]
    return True, [size for source in (context.source, *having) for size in source.sizes(day)]


SETTLED = 60.0  # seconds since the last change of a file that is not looked at twice


def await_log(context: Context, day: date, wait_minutes: float, poll_seconds: float) -> None:
    """Return once log and streams of actions contain the day and its files have stopped growing.

    With `log.ready` that is when the marker exists. Otherwise files that have changed within the
    last minute are looked at again, after `poll_seconds` or, without waiting, a second. Raises
    ProjectError after `wait_minutes`. A day that is missing although nothing is waited for is left
    to `ingest`.
    """
    deadline = time.monotonic() + 60 * wait_minutes
    previous: list[FileSize] = []
    announced = False
    while True:
        arrived, sizes = arrival(context, day)
        if not arrived and wait_minutes <= 0:
            return
        if arrived and (context.project.log.ready or sizes == previous or _settled(sizes)):
            return
        grows = arrived and bool(previous)
        if time.monotonic() >= deadline and (grows or not arrived):
            problem = "still grows after" if grows else "did not arrive within"
            raise ProjectError(
                f"{context.log_path}: the log of {day} {problem} {wait_minutes:g} minutes"
            )
        if not announced and not arrived:
            announce("wait", f"the log of {day} has not arrived")
            announced = True
        previous = sizes
        time.sleep(poll_seconds or 1.0)


def _settled(sizes: Sequence[FileSize]) -> bool:
    """Whether no file has changed within the last minute."""
    return time.time() - max(size.modified for size in sizes) > SETTLED


def look_at_candidates(context: Context, day: date) -> None:
    """Check a given candidate set before the training, and print what it covers.

    For generated candidates the sources of their context are printed. The user and item tables as
    of the day are checked too.

    A problem is printed at once. The night goes on, as the model is needed when the set has been
    repaired; `score` then fails with the same sentence.
    """
    try:
        for which in ("users", "items"):
            context.source.table(which, day)
        if context.project.scoring.candidates is not None:
            announce("candidates", describe_candidates(context, day))
            return
        for line in describe_generated(context, day):
            level = logging.WARNING if line.startswith("warning: ") else logging.INFO
            announce("candidates", line.removeprefix("warning: "), level)
    except (ProjectError, OSError, pl.exceptions.PolarsError) as problem:
        announce("candidates", problem, logging.ERROR)


def rank_after(failure: Exception, context: Context, day: date, aliases: Sequence[str]) -> None:
    """Rank day D's candidates after a failure, with the first model that can; never raises.

    Args:
        aliases: of the models, in this order.
    """
    reason = first_line(failure)
    try:
        connect(context)
        found = [registry.alias_version(context.project, alias) for alias in aliases]
    except Exception as problem:
        announce("failed", f"{reason}; ranking failed too: {first_line(problem)}", logging.ERROR)
        return
    versions = [version for version in found if version is not None]
    role = aliases[0].replace("_", " ")
    if not versions or not context.workspace.days("events"):
        announce("failed", f"{reason}; there is no {role} to rank with", logging.ERROR)
        return
    message = f"trying the {role} (version {versions[0]}) with the published data"
    announce("failed", f"{reason}; {message}", logging.ERROR)
    for version in versions:
        try:
            ranked = score(context, day, version=version, publish=False)
        except Exception as problem:
            if first_line(problem) != reason:
                announce("failed", f"version {version}: {first_line(problem)}", logging.ERROR)
        else:
            message = f"{ranked.path}, by version {version}, after the failure"
            announce("ranked", message, logging.WARNING)
            break
    else:
        tried = " and ".join(f"version {version}" for version in versions)
        announce("failed", f"no ranking of {day}: {tried} cannot rank either", logging.ERROR)
        return
    try:
        publish_ranked(context, day)
    except Exception as problem:
        announce("failed", first_line(problem), logging.ERROR)
