"""The score flow: candidates of day D → rankings/date=D with the champion."""

from __future__ import annotations

import logging
from datetime import date
from pathlib import Path

from prefect import flow, task, unmapped
from prefect.artifacts import create_markdown_artifact
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from flows.cluster import runner_of
from flows.connect import connect
from flows.night import HOOKS, RETRY, announce
from flows.schedule import mark_lost_runs
from mtl_ranker.context import Context
from mtl_ranker.logs.sources import open_context
from mtl_ranker.ranking.artifact import RegisteredRanker
from mtl_ranker.ranking.candidates import candidate_days
from mtl_ranker.ranking.published import publish_to_table
from mtl_ranker.ranking.scoring import (
    Ranked,
    RankingPart,
    RankingPlan,
    plan_scoring,
    publish_ranking,
    rank_part,
    ranking_scope,
    rankings_provenance,
    score_day,
)
from mtl_ranker.reports.console import console, progress_bar
from mtl_ranker.tracking import registry


@task(name="score-day", task_run_name="score {day}", **RETRY)
def score_task(context: Context, day: date, version: str | None) -> Ranked:
    ranker = _ranker(context, version)
    columns = (
        TextColumn("[bold]score[/]     {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with progress_bar(*columns, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading candidates", total=None)

        def on_block(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total, description=f"{day}")

        return score_day(context, ranker, day, on_block)


def _ranker(context: Context, version: str | None) -> RegisteredRanker:
    if version is None:
        return registry.load_artifact(context.project, "champion")
    return registry.load_version(context.project, version)


@task(name="plan-score", task_run_name="plan score {day}", **RETRY)
def plan_task(context: Context, day: date, version: str | None) -> RankingPlan:
    return plan_scoring(context, _ranker(context, version), day)


@task(name="score-part", task_run_name="score {day} {part.file.stem}", **RETRY)
def part_task(context: Context, version: str, day: date, part: RankingPart) -> None:
    connect(context)
    rank_part(context, registry.load_version(context.project, version), day, part)


@task(name="publish-ranking", task_run_name="publish {day}", **RETRY)
def publish_task(context: Context, day: date) -> int | None:
    return publish_to_table(context, day)


@flow(name="score-parts", validate_parameters=False)
def run_parts(context: Context, plan: RankingPlan) -> None:
    """Rank the parts of a candidate set on the flow's task runner."""
    constant = (unmapped(context), unmapped(plan.version), unmapped(plan.day))
    part_task.map(*constant, plan.parts).result()


@flow(name="score", flow_run_name="score {day}", validate_parameters=False)
def score(
    context: Context,
    day: date,
    cluster: str | None = None,
    version: str | None = None,
    publish: bool = True,
) -> Ranked:
    """Rank day D's candidates with a model's own features as of D.

    Only one run ranks a day at a time; a second one waits for it. A night that trains may go on
    meanwhile.

    Args:
        cluster: see `runner_of`.
        version: the model; by default the champion.
        publish: write the ranking to the table of `scoring.publish` as well (`publish_ranked`).
    """
    connect(context)
    if cluster is None:
        ranked = score_task(context, day, version)
    else:
        with context.workspace.lock(f"score {day}", ranking_scope(day), wait=True):
            runner = runner_of(cluster, 2)
            plan = plan_task(context, day, version)
            run_parts.with_options(task_runner=runner)(context, plan)
            context.workspace.refresh()
            ranked = publish_ranking(context.workspace, plan)
    announce(
        "score",
        f"{ranked.candidates:,} candidates of {ranked.users:,} users for {day}; "
        f"top {context.project.scoring.top_k} each",
    )
    if ranked.repeated:
        announce(
            "score",
            f"{ranked.repeated:,} rows have the user and item of another row and another "
            f"{' or '.join(context.project.log.context)}: the first of them is ranked",
            logging.WARNING,
        )
    for effect in ranked.effects:
        announce("lists", effect)
    lines = [f"`{ranked.path}`: {ranked.rows:,} rows", *(f"- {e}" for e in ranked.effects)]
    create_markdown_artifact(key="rankings", markdown="\n".join(lines))
    if publish:
        publish_ranked(context, day)
    return ranked


def publish_ranked(context: Context, day: date) -> None:
    """Write the day's ranking to the table of `scoring.publish`, if the project has one."""
    version = publish_task(context, day) if context.project.scoring.publish else None
    if version is not None:
        announce("score", f"{day} is in {context.project.scoring.publish}, version {version}")


@flow(name="score-new", **HOOKS)
def score_new(config: str, data: str, workspace: str, dry_run: bool = False) -> list[Ranked]:
    """Rank every given candidate set that is new or has changed (hourly schedule).

    Days that the log already contains are skipped.
    """
    context = open_context(config, Path(data), Path(workspace)).pinned()
    mark_lost_runs()
    connect(context)
    with context.workspace.lock("score-new", "score-new"):
        return _score_outdated(context, dry_run)


def _score_outdated(context: Context, dry_run: bool) -> list[Ranked]:
    champion = registry.load_artifact(context.project, "champion")
    ended = max(context.workspace.days("events"), default=date.min)
    rankings, outdated = [], 0
    for day in candidate_days(context):
        provenance = rankings_provenance(context, champion, day)
        why = context.workspace.stale("rankings", day, provenance)
        if day > ended and why is not None:
            announce("score-new", f"{day}: {why}")
            outdated += 1
            if dry_run:
                continue
            rankings.append(score(context, day))
        elif day > ended and not dry_run:
            publish_ranked(context, day)  # if the store was not reachable before
    if not outdated:
        announce("score-new", "every candidate set is ranked")
    return rankings
