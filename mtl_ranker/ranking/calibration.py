"""Calibration of predicted probabilities, per objective and optionally per surface.

A map is fitted on validation rows, on which the weights were not trained, is stored in the artifact
as JSON and is applied before objectives are blended, so that a weighted sum adds calibrated
probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from mtl_ranker.config import Calibrating
from mtl_ranker.models.objectives import Task

TINY = 1e-7


@dataclass(frozen=True)
class Map:
    """A monotone map of log-odds to log-odds through the points (x, y).

    Attributes:
        straight: one line through the two points (Platt 1999); otherwise linear interpolation
            between the points and constant values beyond them (isotonic regression).

    >>> Map([-1.0, 1.0], [-2.0, 2.0], straight=True)(np.array([0.5])).tolist()
    [0.5]
    """

    x: list[float]
    y: list[float]
    straight: bool

    def __call__(self, probability: np.ndarray) -> np.ndarray:
        """Calibrated probabilities, in the same shape."""
        p = np.clip(probability.astype(np.float64), TINY, 1 - TINY)
        z = np.log(p) - np.log1p(-p)
        if self.straight:
            slope = (self.y[1] - self.y[0]) / (self.x[1] - self.x[0])
            z = self.y[0] + slope * (z - self.x[0])
        else:
            z = np.interp(z, self.x, self.y)
        return 1.0 / (1.0 + np.exp(-z))

    def part(self, share: float) -> Map:
        """A map that moves log-odds only by `share` of the way that this one does.

        >>> Map([0.0, 1.0], [0.5, 2.5], straight=True).part(0.5)
        Map(x=[0.0, 1.0], y=[0.25, 1.75], straight=True)
        """
        moved = [x + share * (y - x) for x, y in zip(self.x, self.y, strict=True)]
        return Map(self.x, moved, self.straight)


@dataclass(frozen=True)
class Calibration:
    """The maps of each binary objective, and of each of its surfaces with enough positives.

    Attributes:
        by: the context column that holds the surface; None for one map per objective.
        everywhere: objective → map fitted on all rows.
        surfaces: objective → surface (as text) → map.
        conditional_on: objective → the objective whose probability it cannot exceed.
    """

    by: str | None = None
    everywhere: dict[str, Map] = field(default_factory=dict)
    surfaces: dict[str, dict[str, Map]] = field(default_factory=dict)
    conditional_on: dict[str, str] = field(default_factory=dict)

    def apply(
        self, names: Sequence[str], prediction: np.ndarray, surface: pl.Series | None
    ) -> np.ndarray:
        """Calibrated predictions [N, T]; objectives without a map are unchanged.

        Args:
            names: the objectives, one per column of `prediction` [N, T].
            surface: [N], the values of column `by`.
        """
        calibrated = prediction.astype(np.float32, copy=True)
        text = None if self.by is None or surface is None else surface.cast(pl.String)
        for t, name in enumerate(names):
            if name not in self.everywhere:
                continue
            calibrated[:, t] = self.everywhere[name](prediction[:, t])
            for value, surface_map in self.surfaces.get(name, {}).items():
                if text is not None:
                    rows = (text == value).fill_null(False).to_numpy()
                    calibrated[rows, t] = surface_map(prediction[rows, t])
        index = {name: t for t, name in enumerate(names)}
        for t, name in enumerate(names):
            # All ancestors, as a parent in a later column is not clipped yet.
            for parent in _ancestors(name, self.conditional_on):
                calibrated[:, t] = np.minimum(calibrated[:, t], calibrated[:, index[parent]])
        return calibrated

    def part(self, share: float) -> Calibration:
        """The calibration with `Map.part` of every map."""
        return replace(
            self,
            everywhere={name: m.part(share) for name, m in self.everywhere.items()},
            surfaces={
                name: {value: m.part(share) for value, m in maps.items()}
                for name, maps in self.surfaces.items()
            },
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), "utf-8")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        everywhere = {name: Map(**m) for name, m in content["everywhere"].items()}
        surfaces = {
            name: {value: Map(**m) for value, m in maps.items()}
            for name, maps in content["surfaces"].items()
        }
        chained = content.get("conditional_on", content.get("after", {}))  # "after" until 0.1
        return cls(content["by"], everywhere, surfaces, chained)


def fit_calibration(
    tasks: Sequence[Task],
    labels: np.ndarray,
    prediction: np.ndarray,
    settings: Calibrating,
    surface: pl.Series | None = None,
) -> Calibration:
    """Fit the maps on N validation rows.

    A surface with too few positives or negatives (`settings.min_positives`) uses the objective's
    map of all rows; an objective with too few is not calibrated.

    Args:
        labels, prediction: [N, T]; NaN = missing label.
        surface: [N], the values of column `settings.by`.
    """
    everywhere: dict[str, Map] = {}
    surfaces: dict[str, dict[str, Map]] = {}
    if settings.method == "none":
        return Calibration()
    fit = {"platt": platt, "isotonic": isotonic}[settings.method]
    text = None if surface is None else surface.cast(pl.String)
    for t, task in enumerate(tasks):
        if task.kind != "binary":
            continue
        known = ~np.isnan(labels[:, t])
        if not _enough(labels[known, t], settings.min_positives):
            continue
        everywhere[task.name] = fit(labels[known, t], prediction[known, t])
        if text is None:
            continue
        for value in text.unique().drop_nulls().sort().to_list():
            rows = known & (text == value).fill_null(False).to_numpy()
            if _enough(labels[rows, t], settings.min_positives):
                surface_map = fit(labels[rows, t], prediction[rows, t])
                surfaces.setdefault(task.name, {})[value] = surface_map
    chained = {t.name: t.conditional_on for t in tasks if t.conditional_on is not None}
    return Calibration(settings.by, everywhere, surfaces, chained)


def platt(label: np.ndarray, probability: np.ndarray) -> Map:
    """Logistic regression of the label on the predicted log-odds (Platt 1999)."""
    p = np.clip(probability.astype(np.float64), TINY, 1 - TINY)
    z = (np.log(p) - np.log1p(-p)).reshape(-1, 1)
    # Weak L2 regularisation keeps the slope finite on separable rows.
    model = LogisticRegression(C=100.0, tol=1e-8, max_iter=200).fit(z, label > 0.5)
    slope, shift = float(model.coef_[0, 0]), float(model.intercept_[0])
    slope = max(slope, 1e-3)  # keeps the order of predictions
    return Map([0.0, 1.0], [shift, shift + slope], straight=True)


def isotonic(label: np.ndarray, probability: np.ndarray) -> Map:
    """Isotonic regression of the label on the prediction (Zadrozny & Elkan, KDD 2002).

    The steps are interpolated linearly, and values are kept half a row away from 0 and 1.
    """
    margin = 0.5 / len(label)
    model = IsotonicRegression(y_min=margin, y_max=1 - margin, out_of_bounds="clip")
    model.fit(probability.astype(np.float64), label)
    x = np.clip(model.X_thresholds_, TINY, 1 - TINY)
    z = np.log(x) - np.log1p(-x)
    keep = np.r_[True, np.diff(z) > 0]
    y = model.y_thresholds_
    return Map(z[keep].tolist(), (np.log(y) - np.log1p(-y))[keep].tolist(), straight=False)


def _enough(label: np.ndarray, min_positives: int) -> bool:
    """Whether there are enough positives and as many negatives."""
    positives = int((label > 0.5).sum())
    return min(positives, len(label) - positives) >= min_positives


def _ancestors(name: str, conditional_on: Mapping[str, str]) -> list[str]:
    ancestors = []
    while name in conditional_on:
        name = conditional_on[name]
        ancestors.append(name)
    return ancestors
