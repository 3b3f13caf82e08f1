"""`mtl-ranker history`: the nights of a workspace as a table, a page, JSON and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.nightly.history import alarms, as_json, prometheus, stored
from mtl_ranker.reports.console import console
from mtl_ranker.reports.history import history_table, publish_index
from mtl_ranker.workspace import Workspace


def history_command(project: Project, workspace: Workspace, metrics: Path | None) -> dict[str, Any]:
    """Print the nights, rebuild `reports/index.html`, and write the last night's metrics.

    Raises ProjectError for a workspace without recorded nights.
    """
    records = stored(workspace)
    if not records:
        raise ProjectError(
            f"{workspace.where('history')}: no nights are recorded; run `mtl-ranker nightly` first"
        )
    console.print(history_table(records, project, console.width))
    for line in alarms(records, project)[records[-1].day]:
        console.print(f"alarm    {line}", highlight=False, markup=False)
    page = publish_index(workspace, project)
    console.print(f"page     {page}", highlight=False)
    if metrics is not None:
        # Renamed into its place: the node exporter never reads half a file.
        outside = Workspace(metrics.resolve().parent)
        outside.publish_file(metrics.name, prometheus(records, project))
    return as_json(records, project)
