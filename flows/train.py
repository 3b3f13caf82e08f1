"""The train flow: examples → every model × seed → MLflow → a registered challenger."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from math import isnan
from pathlib import PurePath

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from flows.cluster import trainer_of
from flows.connect import connect
from flows.night import RETRY, announce, working
from mtl_ranker.context import Context
from mtl_ranker.errors import counted
from mtl_ranker.evaluation.sharing import without_verdict
from mtl_ranker.evaluation.slices import worst
from mtl_ranker.features.arrivals import arrivals
from mtl_ranker.features.audit import audit_day
from mtl_ranker.features.days import last_final_day, open_labels
from mtl_ranker.nightly.contenders import Callbacks
from mtl_ranker.nightly.plan import TrainingPlan
from mtl_ranker.nightly.results import Suite
from mtl_ranker.nightly.suite import contenders_of, train_suite
from mtl_ranker.reports.console import console, progress_bar
from mtl_ranker.reports.page import warnings_of
from mtl_ranker.reports.tables import comparison_rows, comparison_table
from mtl_ranker.tracking import connection, registry, runs, system
from mtl_ranker.training.loop import Epoch


@task(name="train-suite", task_run_name="train {day}", cache_policy=NO_CACHE)
def train_task(context: Context, day: date, plan: TrainingPlan, cluster: str | None) -> Suite:
    settings = context.project.training
    trainings = len(contenders_of(context.project, plan)) + settings.refit
    if len(settings.seeds) == 1:
        trainings += settings.spread_seeds
    epochs_each = settings.epochs if plan.start is None else settings.continued_epochs
    columns = (
        TextColumn("[bold]train[/]     {task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} epochs"),
        TimeElapsedColumn(),
    )
    with progress_bar(*columns) as progress:
        bar = progress.add_task("reading examples", total=trainings * epochs_each)
        epochs: dict[tuple[str, int], int] = {}

        def say(message: str) -> None:
            """A line where the bar is not redrawn, as in a log file."""
            if not console.is_terminal:
                announce("train", message)

        def on_epoch(name: str, seed: int, epoch: Epoch) -> None:
            if (name, seed) not in epochs:
                say(f"{name} seed {seed}")
            epochs[name, seed] = epoch.number
            loss = "" if isnan(epoch.monitored) else f", normalised loss {epoch.monitored:.4f}"
            description = f"{name} seed {seed}{loss}"
            progress.update(bar, completed=sum(epochs.values()), description=description)

        def on_step(message: str) -> None:
            say(message)
            progress.update(bar, description=message)

        say(f"up to {counted(trainings, 'training')} of at most {counted(epochs_each, 'epoch')}")
        with trainer_of(cluster) as trainer:
            suite = train_suite(context, day, Callbacks(on_epoch, on_step), trainer, plan)
        progress.update(bar, completed=trainings * epochs_each, description=f"{trainings} models")
    return suite


@task(name="plan-training", **RETRY)
def plan_task(context: Context, day: date) -> TrainingPlan:
    return registry.night_plan(context, day)


@task(name="log-and-register", **RETRY)
def register_task(
    context: Context, suite: Suite, measured: Sequence[system.Sample]
) -> tuple[runs.Logged, str, PurePath]:
    logged, version, report = registry.record(context, suite, measured)
    return logged, version.version, report


SHOWN = 5  # differences of an audit


@task(name="examine-features", cache_policy=NO_CACHE)
def examined(context: Context, day: date, suite: Suite) -> Suite:
    """The suite with an audit of its features, and the arrival of its labels."""
    rows = context.project.training.audit_rows
    audit = audit_day(context, suite.days.test[-1], rows) if rows else None
    return replace(suite, audit=audit, arrivals=arrivals(context, day))


@flow(name="train", flow_run_name="train {day}", validate_parameters=False)
def train(context: Context, day: date, cluster: str | None = None) -> Suite:
    """Train and evaluate models on the split that ends with D; register the winner.

    The plan of the night defines the models and their start (nightly/plan.py).

    Args:
        cluster: see `trainer_of`.
    """
    connect(context)
    with context.workspace.lock(f"train {day}"):
        tested = last_final_day(context.project, day)
        if tested < day:
            announce("train", f"tests on {tested}: {open_labels(context.project, tested, day)}")
        plan = plan_task(context, day)
        with system.system_measured() as measured:
            suite = train_task(context, day, plan, cluster)
        suite = examined(context, day, suite)
        with working("train", "logging runs, figures and the model to MLflow"):
            logged, version, report = register_task(context, suite, measured)
    console.print(comparison_table(suite, console.width))
    for gain in suite.gains:
        if gain.verdict != "undecided":
            announce("sharing", gain)
    for reason in without_verdict(suite.gains):
        announce("sharing", reason)
    for warning in warnings_of(suite):
        announce("warning", warning, logging.WARNING)
    for worst_slice in worst(suite.slices):
        announce("slices", worst_slice)
    for estimate in suite.off_policy:
        announce("off-policy", estimate)
    if suite.audit is not None:
        level = logging.WARNING if suite.audit.differences else logging.INFO
        announce("audit", suite.audit, level)
        for difference in suite.audit.differences[:SHOWN]:
            announce("", difference, level)
    for arrival in suite.arrivals:
        announce("labels", arrival)
    for problem in suite.unlabelled:
        announce("labels", problem, logging.WARNING)
    if suite.drift.summary is not None:
        announce("drift", suite.drift.summary, logging.WARNING)
    for note in suite.notes:
        announce("note", note)
    winner = suite.winner
    announce("report", report)
    announce("mlflow", connection.where_to_look(logged.trainings_link, context.workspace))
    announce(
        "train",
        f"{winner.label} wins on validation; registered as "
        f"{context.project.name} version {version}, alias challenger",
    )
    create_table_artifact(
        key="comparison",
        table=comparison_rows(suite),
        description="Objectives × models on the test days",
    )
    create_markdown_artifact(
        key="mlflow-run",
        markdown=f"MLflow experiment `{logged.experiment_id}`, run `{logged.run_id}`: "
        f"`mtl-ranker ui --workspace {context.workspace.where()}` and open "
        f"[all trainings]({logged.trainings_link}), [this one]({logged.run_link}) or "
        f"[the comparison of its models]({logged.comparison_link}).\n\n"
        f"The report is `report.html` of that run and `{report}`.",
        description="The training in MLflow",
    )
    return suite
