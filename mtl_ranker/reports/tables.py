"""The results of a training as a table of objectives × models."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from mtl_ranker.evaluation.influence import MEASURE_NAMES
from mtl_ranker.evaluation.intervals import ONE_SEED, Interval
from mtl_ranker.evaluation.metrics import quality_metric
from mtl_ranker.features.days import span
from mtl_ranker.nightly.results import Suite

MIN_COLUMNS = 4  # objective, model, quality, interval

METRICS = ("ndcg_10", "auc", "log_loss", "calibration", "ece")
HEADINGS = ("NDCG@10", "AUC", "log loss", "calib", "ECE")


def comparison_rows(suite: Suite) -> list[dict[str, Any]]:
    """One row per objective and model, baselines first, with metrics averaged over seeds.

    `quality` is the measure by which models are compared: GAUC by list, AUC or R².
    """
    rows = []
    models = list(dict.fromkeys(run.name for run in suite.runs))
    for task in suite.tasks:
        for name in [*suite.baselines, *models]:
            if name in suite.baselines:
                metrics = suite.baselines[name][task.name]
            else:
                seeds = [r.metrics[task.name] for r in suite.runs if r.name == name]
                metrics = {k: float(np.mean([m[k] for m in seeds])) for k in seeds[0]}
            interval = suite.intervals.get((name, task.name))
            quality = suite.measures.get(task.name, quality_metric(task.kind))
            rows.append(
                {
                    "objective": task.name,
                    "model": name,
                    "measure": quality,
                    "quality": _number(metrics[quality]),
                    "interval": _bounds(interval),
                    **{key: _number(metrics[key]) for key in METRICS if key in metrics},
                }
            )
    return rows


def comparison_table(suite: Suite, width: int) -> Table:
    """The same rows for a terminal of `width` characters, with the winner on validation marked.

    An objective's measure is below its name. If they do not fit, the last metrics are left out,
    as rich would cut numbers.
    """
    winner = suite.winner.name
    days = suite.days
    confidence = 100 * suite.winner.artifact.project.promotion.confidence
    seeds = suite.winner.artifact.project.training.seeds
    table = Table(
        title=f"Test {span(days.test)}: {len(suite.held_out.user):,} rows; trained on "
        f"{suite.trained_on}, validated on {span(days.validate)}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption=f"* wins on validation; intervals: {confidence:g} % over users"
        f"{' and seeds' if len(seeds) > 1 else f' ({ONE_SEED})'}",
        caption_justify="left",
    )
    table.caption = "\n".join([str(table.caption), *list_lines(suite)])
    rows = comparison_rows(suite)
    marks = {winner: f"{winner} *"}
    columns = [
        [row["objective"] for row in rows],
        [marks.get(r["model"], r["model"]) for r in rows],
    ]
    keys = ("quality", "interval", *METRICS)
    columns += [[row.get(key, "") for row in rows] for key in keys]
    headings = ["objective", "model", "quality", "interval", *HEADINGS]
    # The frame takes one character; each column has a blank on both sides and a divider.
    room, shown = width - 1, 0
    for heading, cells in zip(headings, columns, strict=True):
        room -= 3 + max(len(text) for text in [heading, *cells])
        if room < 0 and shown >= MIN_COLUMNS:
            break
        table.add_column(heading, justify="left" if shown < 2 else "right", no_wrap=True)
        shown += 1
    if shown < len(headings):
        left_out = ", ".join(headings[shown:])
        table.caption = f"{table.caption}\n{left_out}: in a wider terminal, and in the report"
    previous, place = None, 0
    for row, values in zip(rows, zip(*columns[:shown], strict=True), strict=True):
        if previous not in (None, row["objective"]):
            table.add_section()
        place = 0 if row["objective"] != previous else place + 1
        first = [row["objective"], MEASURE_NAMES[row["measure"]], ""][min(place, 2)]
        previous = row["objective"]
        style = "bold" if row["model"] == winner else None
        table.add_row(first, *values[1:], style=style)
    return table


def list_lines(suite: Suite) -> list[str]:
    """For each binary objective the number of lists with both labels, and of all lists."""
    lines = []
    for name, count in suite.lists.items():
        too_few = suite.measures.get(name) == "auc"
        words = "; too few, so models are compared by AUC over rows" if too_few else ""
        lines.append(f"{name}: {count}{words}")
    return lines


def _bounds(interval: Interval | None) -> str:
    if interval is None or np.isnan(interval.low):
        return ""
    return f"[{interval.low:.4f}, {interval.high:.4f}]"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"
