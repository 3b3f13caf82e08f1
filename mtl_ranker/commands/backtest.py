"""`mtl-ranker backtest`: compare promotion policies over the nights of a span."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from typing import Any

from rich import box
from rich.table import Table

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.nightly.backtest import POLICIES, Backtest, backtest, measures
from mtl_ranker.reports import plots
from mtl_ranker.reports.console import console, progress_bar
from mtl_ranker.tracking import connection, runs

VERDICTS = {1: "significantly better", -1: "significantly worse", 0: "no significant difference"}


def backtest_command(
    context: Context, first: date, last: date, only: Sequence[str]
) -> dict[str, Any]:
    """Run the backtest, print its tables and plot its curves; returns the results."""
    project, workspace = context.project, context.workspace
    for name in only:
        if name not in project.models:
            raise ProjectError(
                f"--model {name}: no [models.{name}]; allowed: {', '.join(project.models)}"
            )
    if only:
        models = {name: project.models[name] for name in only}
        project = project.model_copy(update={"models": models})
        context = replace(context, project=project)
    connection.connect(workspace)
    days = sum(first <= d <= last for d in context.source.days())
    with progress_bar() as progress:
        bar = progress.add_task("first night", total=max(days, 1))

        def on_step(message: str) -> None:
            progress.update(bar, advance=1, description=message)

        result = backtest(context, first, last, on_step)
    for table in _backtest_tables(project, result):
        console.print(table)
    for day, reason in result.promotions.items():
        console.print(f"{day}  {reason}", highlight=False)
    curves = {
        f"{objective}, {metric.upper()}": {
            policy: result.curve(policy, objective, metric) for policy in POLICIES
        }
        for objective, metrics in measures(project).items()
        for metric in metrics
    }
    title = f"{project.name}: model of the night of {result.replayed[0].night} kept, or retrained"
    figure = plots.curves_over_days(result.days, curves, title)
    path = f"backtests/{first}_{last}"
    picture = workspace.publish_file(f"{path}.png", plots.png(figure))
    content = {
        "days": [str(d) for d in result.days],
        "replayed": [
            asdict(r) | {"day": str(r.day), "night": str(r.night)} for r in result.replayed
        ],
        "promotions": {str(d): reason for d, reason in result.promotions.items()},
        "gains_over_kept": {
            f"{policy} {objective}": asdict(gain.interval)
            | {"p_value": gain.p_value, "verdict": gain.verdict, "note": gain.note}
            for (policy, objective), gain in result.gains.items()
        },
    }
    workspace.publish_file(f"{path}.json", json.dumps(content, indent=1))
    child_runs = {
        policy: {
            f"{objective}_{metric}": mean
            for (objective, metric), values in (
                (key.split(", "), value) for key, value in curves.items()
            )
            if (mean := _mean_of_known(values[policy])) is not None
        }
        for policy in POLICIES
    }
    params = {"from": str(first), "to": str(last), "models": ", ".join(project.models)}
    record = runs.StudyRecord(
        name=f"{project.name}-backtest",
        params=params,
        runs=child_runs,
        figures={"curves.png": figure},
        content=content,
    )
    logged = runs.log_study(workspace, record)
    link = connection.where_to_look(logged.link, workspace)
    console.print(f"picture  {picture}\nmlflow   {link}", highlight=False)
    return content


def _mean_of_known(values: Sequence[float]) -> float | None:
    """The mean of a metric over the days on which it is defined, or None."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _backtest_tables(project: Project, result: Backtest) -> list[Table]:
    """A table per objective: days × policies and metrics."""
    tables = []
    for objective, metrics in measures(project).items():
        table = Table(box=box.SIMPLE_HEAD, title=objective, title_justify="left")
        table.add_column("day", no_wrap=True)
        for metric in metrics:
            for policy in POLICIES:
                table.add_column(f"{policy} {metric.upper()}", justify="right", no_wrap=True)
        for number, day in enumerate(result.days):
            values = [result.curve(p, objective, m)[number] for m in metrics for p in POLICIES]
            table.add_row(str(day), *(f"{v:.4f}" for v in values))
        for policy in POLICIES[1:]:
            gain = result.gains[policy, objective]
            verdict = gain.note or VERDICTS[gain.verdict]
            words = f"{policy} over kept, all days' rows: {gain.interval.signed}, {verdict}\n"
            table.caption = (table.caption or "") + words
        table.caption_justify = "left"
        tables.append(table)
    return tables
