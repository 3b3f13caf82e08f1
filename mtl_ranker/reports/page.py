"""The HTML report of a training: promotion, quality, sharing, slices, drift, gates and experts."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from datetime import date
from importlib import resources
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from mtl_ranker.config import Project
from mtl_ranker.errors import counted
from mtl_ranker.evaluation.influence import MEASURE_NAMES
from mtl_ranker.evaluation.sharing import SharingGain
from mtl_ranker.evaluation.slices import worst
from mtl_ranker.features.days import days_named, span
from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.results import ModelRun, Suite, at_the_cap
from mtl_ranker.ranking.rules import Effect
from mtl_ranker.reports import plots
from mtl_ranker.reports.tables import comparison_rows, list_lines

DECISION = "<!-- decision -->", "<!-- /decision -->"
LISTS = "<!-- lists -->", "<!-- /lists -->"

# Readable on light and dark pages.
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
    """The report as self-contained HTML."""
    names = [task.name for task in suite.tasks]
    groups = {objective.name: objective.group for objective in project.objectives}
    return template("report.html").render(
        project=project,
        suite=suite,
        names=names,
        groups=groups,
        rows=comparison_rows(suite),
        lists=list_lines(suite),
        measures=MEASURE_NAMES,
        models=[_model(names, suite, run) for run in suite.runs],
        counted=counted,
        health_picture=_health(names, suite),
        front=_front(suite),
        slices=suite.slices,
        worst=worst(suite.slices),
        span=span,
        named=days_named,
        widest=_widest(suite.gains),
    )


def with_decision(
    page: str, decision: Decision, challenger: str, champion: str | None, confidence: float
) -> str:
    """The page with the promotion decision inserted, or replaced if it has one.

    Args:
        challenger, champion: versions; champion is the one before the decision, None without one.
        confidence: of the decision's intervals.
    """
    rows = [*(decision.differences or {}).items()]
    if decision.blended is not None:
        rows.append(("blended quality", decision.blended))
    fragment = template("decision.html").render(
        decision=decision,
        challenger=challenger,
        champion=champion,
        confidence=f"{100 * confidence:g}",
        rows=rows,
    )
    return _inserted(page, DECISION, fragment)


def with_lists(page: str, day: date, effects: Sequence[Effect]) -> str:
    """The page with what rules and exploration changed of day D's lists; inserted or replaced."""
    return _inserted(page, LISTS, template("lists.html").render(day=day, effects=effects))


def _inserted(page: str, marks: tuple[str, str], fragment: str) -> str:
    """The page with a fragment between two marks; unchanged without the marks."""
    start, end = marks
    before, found, rest = page.partition(start)
    return f"{before}{start}\n{fragment}\n{end}{rest.partition(end)[2]}" if found else page


def warnings_of(suite: Suite) -> list[str]:
    """Suspicious figures, then the warnings of each training and of its network's diagnosis.

    A run with trees shares its network with another run and is left out.
    """
    of_networks = [
        f"{r.label}: {warning}" for r in suite.trainings for warning in r.diagnosis.warnings
    ]
    capped = [
        f"{run.label}: the best epoch of {', '.join(names)} is the last one allowed "
        f"({run.artifact.project.training.epochs}), so a longer training may be better; raise "
        "training.epochs"
        for run in suite.trainings
        if (names := at_the_cap(run))
    ]
    return [*suite.suspicious, *capped, *of_networks]


def _model(names: list[str], suite: Suite, run: ModelRun) -> dict[str, Any]:
    """A run with its pictures and the label of the run that trained its network."""
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
            f"Mean prediction and mean label of {run.label} in ten bins of the test rows, "
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
    network = next(each.label for each in suite.runs if each.trained is run.trained)
    return {"run": run, "pictures": pictures, "winner": run is suite.winner, "network": network}


def _front(suite: Suite) -> dict[str, str] | None:
    """The winner's trade-off between the groups of objectives on the test days, or None."""
    if suite.blend is None:
        return None
    points, current = suite.blend.points, suite.blend.current
    best = [p for p in points if p.best]
    return _picture(
        lambda: plots.pareto_front(points, {"current": current}, ""),
        f"Satisfaction against engagement NDCG@10 of {len(points)} choices of weights, "
        f"{len(best)} of them on the front; the project's weights give "
        f"{current.engagement:.4f} and {current.satisfaction:.4f}",
    )


def template(name: str) -> jinja2.Template:
    """A template of this package, with the filters `plain` and `signed` for numbers.

    `theme` is what the style of all pages has in common.
    """
    folder = resources.files("mtl_ranker") / "reports"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"signed": _signed, "plain": _plain}
    environment.globals["theme"] = (folder / "theme.css").read_text("utf-8")
    return environment.from_string((folder / name).read_text("utf-8"))


def _health(names: list[str], suite: Suite) -> dict[str, str]:
    """Rows and mean labels over the days of the split."""
    days = suite.drift.days
    curves = {"rows": {"rows": [float(d.rows) for d in days]}} | {
        f"mean of {n}": {n: [d.label_rates[n] for d in days]} for n in names
    }
    return _picture(
        lambda: plots.curves_over_days([d.day for d in days], curves, ""),
        f"Rows and mean labels of {', '.join(names)} on each day of the split, "
        f"{days[0].day} to {days[-1].day}",
    )


def _widest(gains: Sequence[SharingGain]) -> float:
    """The end of an interval that is farthest from zero; 1 without intervals."""
    ends = [abs(end) for g in gains for end in (g.gain.low, g.gain.high) if not np.isnan(end)]
    return max(ends, default=0.0) or 1.0


def _picture(draw: Callable[[], Figure], alternative: str) -> dict[str, str]:
    """A figure as an inline SVG, with its alternative text."""
    with mpl.rc_context(STYLE):
        figure = draw()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"source": f"data:image/svg+xml;base64,{data}", "alternative": alternative}


def _signed(value: float, digits: int = 4) -> str:
    return "–" if np.isnan(value) else f"{value:+.{digits}f}"


def _plain(value: float, digits: int = 2) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"
