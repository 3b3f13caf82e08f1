"""Candidates of day D → rankings/date=D with the champion."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from prefect import flow, task, unmapped
from prefect.artifacts import create_markdown_artifact
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flows.cluster import runner_of
from flows.night import HOOKS, RETRY, Night, console, open_night, say
from mtl_ranker import registry
from mtl_ranker.features.blocks import Block
from mtl_ranker.features.queries import aggregate_day
from mtl_ranker.scoring import (
    Ranked,
    RankingPlan,
    candidate_days,
    plan_scoring,
    publish_ranking,
    rank_part,
    rankings_made_from,
    score_day,
)


def aggregate_history(night: Night, day: date) -> None:
    """The daily aggregates that features as of D look back at."""
    for published in night.workspace.days("events"):
        longest = night.project.features.windows[-1]
        if 0 < (day - published).days <= longest:
            aggregate_day(night.project, night.source, night.workspace, published)


@task(name="score-day", task_run_name="score {day}", **RETRY)
def score_task(night: Night, day: date) -> Ranked:
    aggregate_history(night, day)
    artifact, version = registry.load_artifact(night.project, "champion")
    columns = (
        TextColumn("[bold]score[/]     {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("reading candidates", total=None)
        return score_day(
            night.project,
            night.source,
            night.workspace,
            artifact,
            version,
            day,
            lambda done, total: progress.update(
                bar, completed=done, total=total, description=f"{day}"
            ),
        )


@task(name="plan-score", task_run_name="plan score {day}", **RETRY)
def plan_task(night: Night, day: date) -> RankingPlan:
    aggregate_history(night, day)
    artifact, version = registry.load_artifact(night.project, "champion")
    return plan_scoring(night.project, night.source, night.workspace, artifact, version, day)


@task(name="score-part", task_run_name="score {day} {file.stem}", **RETRY)
def part_task(night: Night, version: str, day: date, blocks: list[Block], file: Path) -> None:
    registry.connect(night.workspace)
    artifact = registry.load_version(night.project, version)
    rank_part(night.project, night.source, night.workspace, artifact, version, day, blocks, file)


@flow(name="score-parts", validate_parameters=False)
def run_parts(night: Night, plan: RankingPlan) -> None:
    """The parts of a candidate set, wherever the flow's runner takes them."""
    blocks, files = (list(column) for column in zip(*plan.parts, strict=True))
    fixed = (unmapped(night), unmapped(plan.version), unmapped(plan.day))
    part_task.map(*fixed, blocks, files).result()


@flow(name="score", flow_run_name="score {day}", validate_parameters=False)
def score(config: str, data: str, workspace: str, day: date, cluster: str | None = None) -> Ranked:
    """Score and rank day D's candidate set with features as of D; `cluster`: see `runner_of`."""
    night = open_night(config, data, workspace)
    registry.connect(night.workspace)
    if cluster is None:
        ranked = score_task(night, day)
    else:
        runner = runner_of(cluster, 2)
        plan = plan_task(night, day)
        run_parts.with_options(task_runner=runner)(night, plan)
        ranked = publish_ranking(night.workspace, plan)
    say(
        f"[bold]score[/]     {ranked.candidates:,} candidates of {ranked.users:,} users for {day}; "
        f"top {night.project.scoring.top_k} each"
    )
    create_markdown_artifact(key="rankings", markdown=f"`{ranked.path}`: {ranked.rows:,} rows")
    return ranked


@flow(name="score-new", validate_parameters=False, **HOOKS)
def score_new(config: str, data: str, workspace: str, dry_run: bool = False) -> list[Ranked]:
    """Rank every given candidate set that is new, or newer than its ranking: the hourly schedule.

    Sets of days that the log already holds are history and stay as they were ranked.
    """
    night = open_night(config, data, workspace)
    registry.connect(night.workspace)
    artifact, version = registry.load_artifact(night.project, "champion")
    ended = max(night.workspace.days("events"), default=date.min)
    found, waiting = [], 0
    for day in candidate_days(night.project, night.source):
        made = rankings_made_from(
            night.project, night.source, night.workspace, artifact, version, day
        )
        why = night.workspace.stale("rankings", day, made)
        if day > ended and why is not None:
            say(f"[bold]score-new[/] {day}: {why}")
            waiting += 1
            if dry_run:
                continue
            found.append(score(config, data, workspace, day))
    if not waiting:
        say("[bold]score-new[/] every candidate set is ranked")
    return found
