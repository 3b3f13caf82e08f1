"""The HTML report of a training: promotion, quality, sharing, slices, drift, gates and experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from importlib import resources
from typing import Any

import jinja2
import numpy as np

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
from mtl_ranker.reports.pictures import Picture, RunPictures, picture, run_pictures
from mtl_ranker.reports.tables import comparison_rows, list_lines

DECISION = "<!-- decision -->", "<!-- /decision -->"
LISTS = "<!-- lists -->", "<!-- /lists -->"


def training_report(project: Project, suite: Suite, pictures: RunPictures | None = None) -> str:
    """The report as self-contained HTML.

    Args:
        pictures: `run_pictures(suite)`, where they are drawn already.
    """
    pictures = run_pictures(suite) if pictures is None else pictures
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
        models=[_model(suite, run, pictures[run.label]) for run in suite.runs],
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


def _model(suite: Suite, run: ModelRun, pictures: Mapping[str, Picture]) -> dict[str, Any]:
    """A run with its pictures and the label of the run that trained its network."""
    shown = ("learning_curves.svg", "calibration.svg", "gradient_cosine.svg")
    network = next(each.label for each in suite.runs if each.trained is run.trained)
    return {
        "run": run,
        "pictures": [pictures[file] for file in shown if file in pictures],
        "winner": run is suite.winner,
        "network": network,
    }


def _front(suite: Suite) -> Picture | None:
    """The winner's trade-off between the groups of objectives on the test days, or None."""
    if suite.blend is None:
        return None
    points, current = suite.blend.points, suite.blend.current
    best = [p for p in points if p.best]
    return picture(
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


def _health(names: list[str], suite: Suite) -> Picture:
    """Rows and mean labels over the days of the split."""
    days = suite.drift.days
    curves = {"rows": {"rows": [float(d.rows) for d in days]}} | {
        f"mean of {n}": {n: [d.label_rates[n] for d in days]} for n in names
    }
    return picture(
        lambda: plots.curves_over_days([d.day for d in days], curves, ""),
        f"Rows and mean labels of {', '.join(names)} on each day of the split, "
        f"{days[0].day} to {days[-1].day}",
    )


def _widest(gains: Sequence[SharingGain]) -> float:
    """The end of an interval that is farthest from zero; 1 without intervals."""
    ends = [abs(end) for g in gains for end in (g.gain.low, g.gain.high) if not np.isnan(end)]
    return max(ends, default=0.0) or 1.0


def _signed(value: float, digits: int = 4) -> str:
    return "–" if np.isnan(value) else f"{value:+.{digits}f}"


def _plain(value: float, digits: int = 2) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"
