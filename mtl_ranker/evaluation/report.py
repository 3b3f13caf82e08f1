"""One self-contained HTML page per training: what to believe, what sharing did, who hears whom."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from mtl_ranker.config import Project
from mtl_ranker.evaluation import plots
from mtl_ranker.evaluation.slices import worst
from mtl_ranker.evaluation.summary import comparison_rows
from mtl_ranker.training.suite import ModelRun, Suite

# Readable on a light and on a dark page.
NEUTRAL = "#7d8590"
STYLE: dict[Any, Any] = {
    **{f"{part}.color": NEUTRAL for part in ("text", "xtick", "ytick")},
    "axes.labelcolor": NEUTRAL,
    "axes.edgecolor": NEUTRAL,
    "axes.titlecolor": NEUTRAL,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "svg.fonttype": "none",
}


def training_report(project: Project, suite: Suite) -> str:
    """The page as text. It loads nothing from the network."""
    page = resources.files("mtl_ranker") / "evaluation" / "report.html"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"signed": _signed, "plain": _plain}
    names = [task.name for task in suite.tasks]
    groups = {objective.name: objective.group for objective in project.objectives}
    return environment.from_string(page.read_text("utf-8")).render(
        project=project,
        suite=suite,
        names=names,
        groups=groups,
        rows=comparison_rows(suite),
        models=[_model(names, suite, run) for run in suite.runs],
        health_picture=_health(names, suite),
        slices=suite.slices,
        worst=worst(suite.slices),
        span=_span,
        widest=max((abs(x) for g in suite.gains for x in (g.gain.low, g.gain.high)), default=1.0),
    )


def warnings_of(suite: Suite) -> list[str]:
    """What the diagnosis of each training found, with its name."""
    return [f"{run.label}: {words}" for run in suite.runs for words in run.diagnosis.warnings]


def _model(names: list[str], suite: Suite, run: ModelRun) -> dict[str, Any]:
    epochs = run.trained.epochs
    train = np.array([e.train_loss for e in epochs])
    validate = np.array([e.validate_loss for e in epochs])
    cosine = np.array([e.gradient_cosine for e in epochs])
    best = run.trained.best_epochs
    pictures = [
        _picture(
            lambda: plots.learning_curves(names, train, validate, best, ""),
            f"Loss of {run.label} by epoch, training and validation, for {', '.join(names)}; "
            f"best epochs {', '.join(map(str, best))}",
        ),
        _picture(
            lambda: plots.calibration(
                names,
                suite.held_out.labels,
                {"as trained": run.raw_prediction, "calibrated": run.test_prediction},
                "",
            ),
            f"Predicted against observed means of {run.label} on the test days in ten bins, "
            f"before and after calibration, for {', '.join(names)}",
        ),
    ]
    if len(names) > 1:
        last = "; ".join(
            f"{names[a]} and {names[b]} {cosine[-1, a, b]:+.2f}"
            for a in range(len(names))
            for b in range(a)
        )
        pictures.append(
            _picture(
                lambda: plots.gradient_cosines(names, cosine, ""),
                f"Cosine between objectives' gradients of {run.label} by epoch; at the end {last}",
            )
        )
    return {"run": run, "pictures": pictures, "winner": run is suite.winner}


def _health(names: list[str], suite: Suite) -> dict[str, str]:
    days = suite.drift.days
    curves = {"rows": {"rows": [float(d.rows) for d in days]}} | {
        f"mean of {n}": {n: [d.label_rates[n] for d in days]} for n in names
    }
    return _picture(
        lambda: plots.curves_over_days([d.day for d in days], curves, ""),
        f"Rows and mean labels of {', '.join(names)} on each day of the split, "
        f"{days[0].day} to {days[-1].day}",
    )


def _picture(draw: Callable[[], Figure], words: str) -> dict[str, str]:
    with mpl.rc_context(STYLE):
        figure = draw()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"source": f"data:image/svg+xml;base64,{data}", "words": words}


def _span(days: list[Any]) -> str:
    return str(days[0]) if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _signed(value: float, digits: int = 4) -> str:
    return "–" if np.isnan(value) else f"{value:+.{digits}f}"


def _plain(value: float, digits: int = 2) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"
