"""`mtl-ranker blend`: engagement against satisfaction, and the weights of a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from mtl_ranker.context import Context
from mtl_ranker.evaluation.pareto import Point
from mtl_ranker.nightly.blend_search import Blend, BlendSearch, check_weights, find_blend
from mtl_ranker.reports import plots
from mtl_ranker.reports.console import console, progress_bar
from mtl_ranker.tracking import connection, registry
from mtl_ranker.workspace import Workspace


def write_blend(found: Blend, workspace: Workspace, version: str, day: date) -> Path:
    """The front as `blends/D.json` and `blends/D.png`; the picture's path."""
    title = f"model version {version}, test days up to {day}, {found.how}"
    figure = plots.pareto_front(
        found.points, {"now": found.current, "proposed": found.proposed}, title
    )
    content = asdict(found) | {"version": version, "day": str(day)}
    workspace.publish_file(f"blends/{day}.json", json.dumps(content, indent=1))
    return workspace.publish_file(f"blends/{day}.png", plots.png(figure))


@dataclass(frozen=True)
class BlendOptions:
    """What `mtl-ranker blend` is asked.

    Attributes:
        alias: which registered model, champion or challenger.
        search: the weights to try, unless some are given.
        given: objective → weight by hand; empty to search.
        store: store the choice with the model.
    """

    alias: str = "champion"
    search: BlendSearch = field(default_factory=BlendSearch)
    given: dict[str, float] = field(default_factory=dict)
    store: bool = False


def blend_command(context: Context, day: date, options: BlendOptions) -> dict[str, Any] | None:
    """Draw the front, propose weights; with `store`, the model blends by them from now on.

    Returns the figures of a search, None for weights given by hand.
    """
    project, figures = context.project, None
    connection.connect(context.workspace)
    artifact, version = registry.load_artifact(project, options.alias)
    if options.given:
        chosen = check_weights(project, options.given)
        method = options.search.how or artifact.project.scoring.blend
    else:
        with progress_bar() as progress:
            bar = progress.add_task("trying weights", total=options.search.tries)
            blend = find_blend(
                context, day, artifact, options.search, lambda: progress.advance(bar)
            )
        console.print(_blend_table(blend, options.search.satisfaction_share))
        picture = write_blend(blend, context.workspace, version, day)
        console.print(f"picture  {picture}", highlight=False)
        figures = asdict(blend) | {"version": version, "day": str(day)}
        chosen, method = blend.proposed.weights, blend.how
    words = ", ".join(f"{name} {weight:g}" for name, weight in chosen.items())
    if options.store:
        registry.store_blend(project, version, method, chosen)
        console.print(f"stored   {project.name} version {version} blends {method}: {words}")
    else:
        console.print(f"not stored: add --store to let version {version} blend {method}: {words}")
    return figures


def _blend_table(found: Blend, share: float) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{found.how}: {sum(p.best for p in found.points)} of {len(found.points)} choices "
        "on the front; chosen on half of the test days' users, then looked at on the others",
        title_justify="left",
    )
    table.add_column("weights", no_wrap=True)
    for heading in ("", "engagement", "satisfaction", "others': engagement", "satisfaction"):
        table.add_column(heading, justify="right" if heading else "left")

    def row(name: str, point: Point, test: Point | None = None) -> None:
        words = ", ".join(f"{n} {w:g}" for n, w in point.weights.items())
        values = [point.engagement, point.satisfaction]
        values += [] if test is None else [test.engagement, test.satisfaction]
        table.add_row(words, name, *(f"{v:.4f}" for v in values))

    row(
        "now" + (" (on the front)" if found.current.best else ""),
        found.current,
        found.current_on_test,
    )
    row(f"proposed, {share:.0%} satisfaction", found.proposed, found.proposed_on_test)
    front = sorted((p for p in found.points if p.best), key=lambda p: -p.engagement)
    for point in front[:: max(1, len(front) // 8)]:
        row("front", point)
    return table
