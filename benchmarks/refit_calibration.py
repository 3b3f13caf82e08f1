"""How far a calibration map should move what a refit model predicts.

The map was fitted on validation days for weights that had not seen them; a refit model has. Each
share of the way is tried on several days, each tested alone, without another training.
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
from mtl_ranker.nightly.contenders import Contender, refit, train_model, with_trees

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
METRICS = ("auc", "ece", "log_loss")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dates", type=date.fromisoformat, nargs="+", required=True)
    options.add_argument("--seeds", type=int, default=3)
    chosen = results.parse(options)
    found: dict[float, list[dict[str, dict[str, float]]]] = {share: [] for share in SHARES}
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
        by = project.calibration.by
        surface = held_out.frame[by] if by else None
        for share in SHARES:
            maps = stopped.artifact.calibration.part(share)
            moved = maps.apply([task.name for task in tasks], again.raw_prediction, surface)
            found[share].append(evaluate_all(tasks, held_out.labels, moved, held_out.user))
    assert parts is not None
    means = {
        share: {
            task.name: {k: float(np.mean([m[task.name][k] for m in runs])) for k in METRICS}
            for task in parts.tasks
        }
        for share, runs in found.items()
    }
    table = Table(title=f"means of {len(jobs)} refit models: AUC, ECE, log loss")
    table.add_column("share of the way", justify="right")
    for task in parts.tasks:
        table.add_column(task.name, justify="right", no_wrap=True)
    for share, each in means.items():
        cells = [f"{m['auc']:.5f}, {m['ece']:.4f}, {m['log_loss']:.5f}" for m in each.values()]
        table.add_row(f"{share:g}", *cells)
    CONSOLE.print(table)
    results.write(chosen, {str(share): each for share, each in means.items()})


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """AUC, ECE and log loss of each objective by the share of the calibration map."""
    objectives = list(next(iter(figures.values())))
    rows = [
        [f"{float(share):g}"]
        + [f"{m['auc']:.5f}, {m['ece']:.4f}, {m['log_loss']:.5f}" for m in each.values()]
        for share, each in figures.items()
    ]
    return {"refit_calibration": markdown.table(["share of the way", *objectives], rows)}


def summary(figures: Mapping[str, Any]) -> str:
    first = next(iter(next(iter(figures.values()))))
    errors = [f"{each[first]['ece']:.4f} at {float(s):g}" for s, each in figures.items()]
    return f"ECE of {first}: {', '.join(errors)}"


if __name__ == "__main__":
    main()
