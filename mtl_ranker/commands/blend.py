"""`mtl-ranker blend`: the trade-off over blend weights, and the weights stored with a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import PurePath
from typing import Any

from rich import box
from rich.table import Table

from mtl_ranker.context import Context
from mtl_ranker.evaluation.pareto import Point
from mtl_ranker.nightly.blend_search import Blend, BlendSearch, check_weights, find_blend
from mtl_ranker.ranking.blend import BlendChoice
from mtl_ranker.reports import plots
from mtl_ranker.reports.console import console, progress_bar
from mtl_ranker.tracking import connection, registry
from mtl_ranker.workspace import Workspace


def write_blend(blend: Blend, workspace: Workspace, version: str, day: date) -> PurePath:
    """Publish the front as `blends/D.json` and `blends/D.png`; returns the picture's path."""
    title = f"model version {version}, test days {blend.test_days}, {blend.how}"
    figure = plots.pareto_front(
        blend.points, {"current": blend.current, "proposed": blend.proposed}, title
    )
    content = asdict(blend) | {"version": version, "day": str(day)}
    workspace.publish_file(f"blends/{day}.json", json.dumps(content, indent=1))
    return workspace.publish_file(f"blends/{day}.png", plots.png(figure))


@dataclass(frozen=True)
class BlendOptions:
    """The options of `mtl-ranker blend`.

    Attributes:
        alias: the registered model, champion or challenger.
        search: which weights to try if none are given.
        given: objective → weight; empty to search.
        store: whether to store the weights with the model.
    """

    alias: str = "champion"
    search: BlendSearch = field(default_factory=BlendSearch)
    given: dict[str, float] = field(default_factory=dict)
    store: bool = False


def blend_command(context: Context, day: date, options: BlendOptions) -> dict[str, Any] | None:
    """Plot the front and propose weights; with `store`, store them with the model.

    Returns the results of a search, None for given weights.
    """
    project, results = context.project, None
    connection.connect(context.workspace)
    artifact, version = registry.load_artifact(project, options.alias)
    if options.given:
        chosen = check_weights(artifact.project, options.given)
        method = options.search.how or artifact.project.scoring.blend
    else:
        with progress_bar() as progress:
            bar = progress.add_task("trying weights", total=options.search.tries)
            blend = find_blend(
                context, day, artifact, options.search, lambda: progress.advance(bar)
            )
        words = f"{options.search.satisfaction_share:.0%} satisfaction"
        if project.scoring.maximise is not None:
            words = "by scoring.maximise and keep"
        console.print(blend_table(blend, words))
        if blend.worse_on_test:
            console.print(
                "on the other users the proposal is worse on both engagement and satisfaction; "
                "keep the current weights",
                highlight=False,
                soft_wrap=True,
            )
        if blend.better is not None:
            console.print(str(blend.better), highlight=False, soft_wrap=True, markup=False)
        picture = write_blend(blend, context.workspace, version, day)
        console.print(f"picture  {picture}", highlight=False)
        results = asdict(blend) | {"version": version, "day": str(day)}
        chosen, method = blend.proposed.weights, blend.how
    weights = ", ".join(f"{name} {weight:g}" for name, weight in chosen.items())
    if options.store:
        given = artifact.project.scoring.conditional
        registry.store_blend(project, version, BlendChoice(method, chosen, given))
        console.print(f"stored   {project.name} version {version} blends {method}: {weights}")
    else:
        console.print(f"not stored: add --store to let version {version} blend {method}: {weights}")
    return results


def blend_table(blend: Blend, rule: str) -> Table:
    """The current and the proposed weights on both halves of the users, and points of the front.

    Args:
        rule: by which the proposal was chosen.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{blend.how}: {sum(p.best for p in blend.points)} of {len(blend.points)} choices "
        f"on the front; test days {blend.test_days}: chosen on half of the users, evaluated on the "
        "others",
        title_justify="left",
    )
    table.add_column("weights", no_wrap=True)
    for heading in ("", "engagement", "satisfaction", "others': engagement", "satisfaction"):
        table.add_column(heading, justify="right" if heading else "left")

    def row(name: str, point: Point, test: Point | None = None) -> None:
        weights = ", ".join(f"{n} {w:g}" for n, w in point.weights.items())
        values = [point.engagement, point.satisfaction]
        values += [] if test is None else [test.engagement, test.satisfaction]
        table.add_row(weights, name, *(f"{v:.4f}" for v in values))

    row(
        "current" + (" (on the front)" if blend.current.best else ""),
        blend.current,
        blend.current_on_test,
    )
    row(f"proposed, {rule}", blend.proposed, blend.proposed_on_test)
    # Weights that rank alike are one point of the front.
    shown = {(round(p.engagement, 4), round(p.satisfaction, 4)): p for p in blend.points if p.best}
    front = sorted(shown.values(), key=lambda p: -p.engagement)
    for point in front[:: max(1, len(front) // 8)]:
        row("front", point)
    return table
