"""Examples → every model × seed → MLflow → a registered challenger."""

from __future__ import annotations

import logging
from datetime import date
from math import isnan
from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flows.night import Night, console, open_night, say
from mtl_ranker import registry
from mtl_ranker.evaluation.report import warnings_of
from mtl_ranker.evaluation.slices import worst
from mtl_ranker.evaluation.summary import comparison_rows, comparison_table
from mtl_ranker.training.loop import Epoch
from mtl_ranker.training.suite import Suite, train_suite


@task(name="train-suite", task_run_name="train {day}")
def train_task(night: Night, day: date) -> Suite:
    settings = night.project.training
    runs = len(night.project.models) * len(settings.seeds) + settings.refit
    columns = (
        TextColumn("[bold]train[/]     {task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} epochs"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("reading examples", total=runs * settings.epochs)
        passed: dict[tuple[str, int], int] = {}

        def on_epoch(name: str, seed: int, epoch: Epoch) -> None:
            passed[name, seed] = epoch.number
            loss = "" if isnan(epoch.monitored) else f", normalised loss {epoch.monitored:.4f}"
            done = sum(passed.values())
            progress.update(
                bar,
                completed=done,
                description=f"{name} seed {seed}{loss}",
            )

        def on_step(words: str) -> None:
            progress.update(bar, description=words)

        suite = train_suite(night.project, night.workspace, day, on_epoch, on_step=on_step)
        progress.update(bar, completed=runs * settings.epochs, description=f"{runs} models")
    return suite


@task(name="log-and-register", retries=2, retry_delay_seconds=[2, 10])
def register_task(night: Night, suite: Suite) -> tuple[registry.Logged, str, Path]:
    logged, version, report = registry.record(night.project, night.workspace, suite)
    return logged, version.version, report


@flow(name="train", flow_run_name="train {day}", validate_parameters=False)
def train(config: str, data: str, workspace: str, day: date) -> Suite:
    """Train and evaluate every model on the split that ends with D; register the winner."""
    night = open_night(config, data, workspace)
    registry.connect(night.workspace)
    suite = train_task(night, day)
    with console.status("writing runs, pictures and the model to MLflow"):
        logged, version, report = register_task(night, suite)
    console.print(comparison_table(suite, console.width))
    for gain in suite.gains:
        if gain.verdict != "undecided":
            say(f"[bold]sharing[/]   {gain}")
    for words in warnings_of(suite):
        say(f"[bold yellow]warning[/]   {words}", logging.WARNING)
    for each in worst(suite.slices):
        say(f"[bold]slices[/]    {each}")
    for estimate in suite.off_policy:
        say(f"[bold]off-policy[/] {estimate}")
    for words in suite.drift.warnings:
        say(f"[bold yellow]drift[/]     {words}", logging.WARNING)
    winner = suite.winner
    say(f"[bold]report[/]    {report}")
    say(f"[bold]mlflow[/]    {logged.link}")
    say(
        f"[bold]train[/]     {winner.label} wins on validation; registered as "
        f"{night.project.name} version {version}, alias challenger"
    )
    create_table_artifact(
        key="comparison",
        table=comparison_rows(suite),
        description="Objectives × models on the test days",
    )
    create_markdown_artifact(
        key="mlflow-run",
        markdown=f"MLflow experiment `{logged.experiment_id}`, run `{logged.run_id}`: "
        f"`mtl-ranker ui --workspace {workspace}` and open [the run]({logged.link}) or "
        f"[the comparison of its models]({logged.comparison_link}).\n\n"
        f"The report, `report.html` of that run, lies also in `{report}`.",
        description="Where the training lies in MLflow",
    )
    return suite
