"""What a training found, as a table of objectives × models."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from mtl_ranker.evaluation.metrics import quality_metric
from mtl_ranker.training.suite import Suite

SHOWN = ("gauc", "ndcg_10", "log_loss", "calibration", "ece")


def comparison_rows(suite: Suite) -> list[dict[str, Any]]:
    """One row per objective and model (baselines first), metrics averaged over seeds."""
    rows = []
    models = list(dict.fromkeys(run.name for run in suite.runs))
    for task in suite.tasks:
        for name in [*suite.baselines, *models]:
            if name in suite.baselines:
                metrics = suite.baselines[name][task.name]
            else:
                seeds = [r.metrics[task.name] for r in suite.runs if r.name == name]
                metrics = {k: float(np.mean([m[k] for m in seeds])) for k in seeds[0]}
            found = suite.intervals.get((name, task.name))
            quality = quality_metric(task.kind)
            rows.append(
                {
                    "objective": task.name,
                    "model": name,
                    "measure": quality,
                    "quality": _number(metrics[quality]),
                    "interval": f"[{found.low:.4f}, {found.high:.4f}]" if found else "",
                    **{key: _number(metrics[key]) for key in SHOWN if key in metrics},
                }
            )
    return rows


def comparison_table(suite: Suite) -> Table:
    """The same rows for the terminal; the winner on validation is marked."""
    winner = suite.winner.name
    days = suite.days
    span = f"{days.test[0]}" if len(days.test) == 1 else f"{days.test[0]}..{days.test[-1]}"
    table = Table(
        title=f"Test {span}: {len(suite.held_out.user):,} rows; trained on "
        f"{suite.train_rows:,} rows of {days.train[0]}..{days.train[-1]}, "
        f"validated on {days.validate[0]}..{days.validate[-1]}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption="* wins on validation; intervals: 95 % or as configured, users drawn anew",
        caption_justify="left",
    )
    for heading in ("objective", "model"):
        table.add_column(heading, no_wrap=True)
    for heading in ("AUC|R²", "interval", "GAUC", "NDCG@10", "log loss", "calib", "ECE"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in comparison_rows(suite):
        if previous not in (None, row["objective"]):
            table.add_section()
        first = row["objective"] if row["objective"] != previous else ""
        previous = row["objective"]
        marked = f"{row['model']} *" if row["model"] == winner else row["model"]
        cells = [row.get(key, "") for key in SHOWN]
        # The run in MLflow has every digit; the terminal has 80 columns at worst.
        table.add_row(
            first,
            marked,
            row["quality"],
            row["interval"],
            *cells,
            style="bold" if row["model"] == winner else None,
        )
    return table


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"
