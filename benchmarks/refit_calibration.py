"""How far a calibration map should move what a refit model predicts.

The map was fitted on validation days for weights that had not seen them; a refit model has. Each
share of the way is tried on several days, each tested alone. Beside it: maps that are cross-fitted
over the latest days, each of which is left out of one further training.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.prepared import examples_of, parser
from benchmarks.quality import CONSOLE, project_of
from mtl_ranker.evaluation.metrics import evaluate_all
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.contenders import (
    Contender,
    fit_to,
    held_out_predictions,
    refit,
    train_model,
    with_trees,
)

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
METRICS = ("auc", "ece", "log_loss", "calibration")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dates", type=date.fromisoformat, nargs="+", required=True)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--days", type=int, nargs="+", default=[2, 4], help="to cross-fit over")
    chosen = results.parse(options)
    names = [*(f"{share:g}" for share in SHARES), *(f"{days} days" for days in chosen.days)]
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in names}
    jobs = [(day, seed) for day in chosen.dates for seed in range(chosen.seeds)]
    parts = None
    for day, seed in track(jobs, description="refit models", console=CONSOLE):
        project = project_of(1, 28, "is_comment")
        if parts is None or parts.days.test != [day]:
            parts = examples_of(project, chosen.data, day)
        tasks, held_out = parts.tasks, parts.held_out
        spec = make("mmoe", project.models["mmoe"], len(tasks), project.features.groups)
        stopped = with_trees(
            project, parts, train_model(project, parts, Contender("mmoe", spec, seed))
        )
        again = refit(project, parts, stopped)
        days = [*parts.days.train, *parts.days.validate]
        folds = held_out_predictions(project, parts, stopped, days[-max(chosen.days) :])
        calibrations = [stopped.artifact.calibration.part(share) for share in SHARES]
        calibrations += [fit_to(tasks, project.calibration, folds[-each:]) for each in chosen.days]
        by = project.calibration.by
        surface = held_out.frame[by] if by else None
        for name, maps in zip(names, calibrations, strict=True):
            moved = maps.apply([task.name for task in tasks], again.raw_prediction, surface)
            found[name].append(evaluate_all(tasks, held_out.labels, moved, held_out.lists))
        CONSOLE.print(
            f"{day}, seed {seed}: ECE "
            + "; ".join(f"{name} {found[name][-1][tasks[0].name]['ece']:.4f}" for name in names)
        )
    assert parts is not None
    means = {
        name: {
            task.name: {k: float(np.mean([m[task.name][k] for m in runs])) for k in METRICS}
            | {"distance": float(np.mean([abs(np.log(m[task.name]["calibration"])) for m in runs]))}
            for task in parts.tasks
        }
        for name, runs in found.items()
    }
    table = Table(title=f"means of {len(jobs)} refit models: {HEADING}")
    table.add_column("maps", justify="right")
    for task in parts.tasks:
        table.add_column(task.name, justify="right", no_wrap=True)
    for name, each in means.items():
        table.add_row(name, *map(_cell, each.values()))
    CONSOLE.print(table)
    results.write(chosen, means)


HEADING = "AUC, ECE, log loss, predictions / labels"


def _cell(m: Mapping[str, float]) -> str:
    return f"{m['auc']:.5f}, {m['ece']:.4f}, {m['log_loss']:.5f}, {m['calibration']:.3f}"


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The metrics of each objective by the share of the map, and by the days cross-fitted over."""
    objectives = list(next(iter(figures.values())))
    rows = [[name, *map(_cell, each.values())] for name, each in figures.items()]
    return {"refit_calibration": markdown.table(["maps", *objectives], rows)}


def summary(figures: Mapping[str, Any]) -> str:
    first = next(iter(next(iter(figures.values()))))
    errors = [f"{each[first]['ece']:.4f} at {name}" for name, each in figures.items()]
    return f"ECE of {first}: {', '.join(errors)}"


if __name__ == "__main__":
    main()
