"""`mtl-ranker backtest`: replay the nights of a span."""

from __future__ import annotations

import json
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


def backtest_command(
    context: Context, first: date, last: date, only: Sequence[str]
) -> dict[str, Any]:
    """Replay the nights, print and draw the curves. Returns the figures."""
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

        def tell(words: str) -> None:
            progress.update(bar, advance=1, description=words)

        found = backtest(context, first, last, tell)
    for table in _backtest_tables(project, found):
        console.print(table)
    for day, words in found.promotions.items():
        console.print(f"{day}  {words}", highlight=False)
    curves = {
        f"{objective}, {metric.upper()}": {
            policy: found.curve(policy, objective, metric) for policy in POLICIES
        }
        for objective, metrics in measures(project).items()
        for metric in metrics
    }
    title = f"{project.name}: kept since the night of {found.replayed[0].night}, or trained again"
    figure = plots.curves_over_days(found.days, curves, title)
    place = f"backtests/{first}_{last}"
    picture = workspace.publish_file(f"{place}.png", plots.png(figure))
    content = {
        "days": [str(d) for d in found.days],
        "replayed": [
            asdict(r) | {"day": str(r.day), "night": str(r.night)} for r in found.replayed
        ],
        "promotions": {str(d): w for d, w in found.promotions.items()},
        "gains_over_kept": {f"{p} {o}": asdict(g) for (p, o), g in found.gains.items()},
    }
    workspace.publish_file(f"{place}.json", json.dumps(content, indent=1))
    child_runs = {
        policy: {
            f"{objective}_{metric}": sum(values[policy]) / len(values[policy])
            for (objective, metric), values in (
                (key.split(", "), value) for key, value in curves.items()
            )
        }
        for policy in POLICIES
    }
    params = {"from": str(first), "to": str(last), "models": ", ".join(project.models)}
    logged = runs.log_study(
        workspace, f"{project.name}-backtest", params, child_runs, {"curves.png": figure}, content
    )
    console.print(f"picture  {picture}\nmlflow   {logged.link}", highlight=False)
    return content


def _backtest_tables(project: Project, found: Backtest) -> list[Table]:
    made = []
    for objective, metrics in measures(project).items():
        table = Table(box=box.SIMPLE_HEAD, title=objective, title_justify="left")
        table.add_column("day", no_wrap=True)
        for metric in metrics:
            for policy in POLICIES:
                table.add_column(f"{policy} {metric.upper()}", justify="right", no_wrap=True)
        for number, day in enumerate(found.days):
            values = [found.curve(p, objective, m)[number] for m in metrics for p in POLICIES]
            table.add_row(str(day), *(f"{v:.4f}" for v in values))
        for policy in POLICIES[1:]:
            gain = found.gains[policy, objective]
            table.caption = (table.caption or "") + (
                f"{policy} over kept, all days' rows: {gain.value:+.4f} "
                f"[{gain.low:+.4f}, {gain.high:+.4f}]\n"
            )
        table.caption_justify = "left"
        made.append(table)
    return made
