"""Calibration of predictions, per objective and optionally per surface: every kind predicts E[y].

A map is fitted on validation rows, on which the weights were not trained, is stored in the artifact
as JSON and is applied before objectives are blended, so that a weighted sum adds calibrated
probabilities and means. scikit-learn is needed to fit maps only, so a served model needs none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.optimize import brentq
from scipy.special import expit

from mtl_ranker.config import Calibrating
from mtl_ranker.models.objectives import Task

TINY = 1e-7


@dataclass(frozen=True)
class Map:
    """A monotone map of predictions through the points (x, y), which lie on a scale.

    Attributes:
        straight: one line through the two points; otherwise linear interpolation between the points
            and constant values beyond them (isotonic regression).
        scale: `log_odds` of the prediction over `top`, `log1p`, `log` or `identity`.
        top: largest value on the scale `log_odds`: 1 for probabilities.

    >>> Map([-1.0, 1.0], [-2.0, 2.0], straight=True)(np.array([0.5])).tolist()
    [0.5]
    >>> Map([0.0, 1.0], [np.log(2), 1 + np.log(2)], True, "log1p")(np.array([4.0])).round(6)
    array([9.])
    """

    x: list[float]
    y: list[float]
    straight: bool
    scale: str = "log_odds"
    top: float = 1.0

    def __call__(self, prediction: np.ndarray) -> np.ndarray:
        """Calibrated predictions, in the same shape."""
        z = on_scale(prediction, self.scale, self.top)
        if self.straight:
            slope = (self.y[1] - self.y[0]) / (self.x[1] - self.x[0])
            z = self.y[0] + slope * (z - self.x[0])
        else:
            z = np.interp(z, self.x, self.y)
        return from_scale(z, self.scale, self.top)

    @property
    def of_probabilities(self) -> bool:
        return self.scale == "log_odds" and self.top == 1.0

    def part(self, share: float) -> Map:
        """A map that moves predictions on the scale only by `share` of the way that this one does.

        >>> Map([0.0, 1.0], [0.5, 2.5], straight=True).part(0.5).y
        [0.25, 1.75]
        """
        moved = [x + share * (y - x) for x, y in zip(self.x, self.y, strict=True)]
        return replace(self, y=moved)


def on_scale(prediction: np.ndarray, scale: str, top: float = 1.0) -> np.ndarray:
    """Predictions on a map's scale (see `Map`)."""
    p = prediction.astype(np.float64)
    if scale == "log_odds":
        p = np.clip(p / top, TINY, 1 - TINY)
        return np.log(p) - np.log1p(-p)
    if scale == "log1p":
        return np.log1p(np.maximum(p, 0.0))
    return np.log(np.maximum(p, TINY)) if scale == "log" else p


def from_scale(z: np.ndarray, scale: str, top: float = 1.0) -> np.ndarray:
    """Predictions from a map's scale: the inverse of `on_scale`, 0 or more on `log1p`."""
    if scale == "log_odds":
        return top * expit(z)
    if scale == "log1p":
        return np.maximum(np.expm1(z), 0.0)
    return np.exp(z) if scale == "log" else z


@dataclass(frozen=True)
class Calibration:
    """The maps of each objective, and of each of its surfaces with enough positives.

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
        """The calibration with `Map.part` of every map of probabilities.

        Maps of numbers are kept in full: on log1p they correct the bias of the transform, which
        does not depend on the rows that a model was trained on, and half of that would be left.
        """

        def moved(each: Map) -> Map:
            return each.part(share) if each.of_probabilities else each

        return replace(
            self,
            everywhere={name: moved(m) for name, m in self.everywhere.items()},
            surfaces={
                name: {value: moved(m) for value, m in maps.items()}
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

    Binary objectives: `settings.method`. Others: isotonic regression, or with `platt` a shift on
    the objective's scale (`shifted`). A surface with too few positives or negatives
    (`settings.min_positives`), or labels other than 0 of another kind, uses the objective's map of
    all rows; an objective with too few is not calibrated.

    Args:
        labels, prediction: [N, T]; NaN = missing label.
        surface: [N], the values of column `settings.by`.
    """
    everywhere: dict[str, Map] = {}
    surfaces: dict[str, dict[str, Map]] = {}
    if settings.method == "none":
        return Calibration()
    text = None if surface is None else surface.cast(pl.String)
    for t, task in enumerate(tasks):
        known = ~np.isnan(labels[:, t])
        if not _enough(task, labels[known, t], settings.min_positives):
            continue
        everywhere[task.name] = _fit(task, settings, labels[known, t], prediction[known, t])
        if text is None:
            continue
        for value in text.unique().drop_nulls().sort().to_list():
            rows = known & (text == value).fill_null(False).to_numpy()
            if _enough(task, labels[rows, t], settings.min_positives):
                surface_map = _fit(task, settings, labels[rows, t], prediction[rows, t])
                surfaces.setdefault(task.name, {})[value] = surface_map
    chained = {t.name: t.conditional_on for t in tasks if t.conditional_on is not None}
    return Calibration(settings.by, everywhere, surfaces, chained)


def _fit(task: Task, settings: Calibrating, label: np.ndarray, prediction: np.ndarray) -> Map:
    if task.kind == "binary":
        fit = {"platt": platt, "isotonic": isotonic}[settings.method]
        return fit(label, prediction)
    if settings.method == "isotonic":
        return isotonic_mean(label, prediction)
    return shifted(task, label, prediction)


def platt(label: np.ndarray, probability: np.ndarray) -> Map:
    """Logistic regression of the label on the predicted log-odds (Platt 1999).

    Where the slope is negative, the predictions order rows worse than chance. It becomes almost 0,
    as the order of predictions is kept, and the intercept is fitted to it: the base rate.
    """
    from sklearn.linear_model import LogisticRegression

    z = on_scale(probability, "log_odds")
    # Weak L2 regularisation keeps the slope finite on separable rows.
    model = LogisticRegression(C=100.0, tol=1e-8, max_iter=200).fit(z.reshape(-1, 1), label > 0.5)
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope < LEAST_SLOPE:
        slope = LEAST_SLOPE
        intercept = _shift(slope * z, float((label > 0.5).mean()))
    return Map([0.0, 1.0], [intercept, intercept + slope], straight=True)


LEAST_SLOPE = 1e-3  # keeps the order of predictions


def shifted(task: Task, label: np.ndarray, prediction: np.ndarray) -> Map:
    """A shift on the objective's scale, by which the mean prediction is the mean label.

    On `log1p`, 1 + y is multiplied by Duan's smearing factor (JASA 1983), in its form as a ratio of
    means, Σ(1 + y) / Σ(1 + p), which needs no equal variance of the residuals. Watch time is
    multiplied by Σ y / Σ p, other regressions move by the mean residual, and an ordinal level moves
    in the log-odds of its share of the highest level.

    Args:
        label, prediction: [N], in the label's unit.
    """
    if task.kind == "ordinal":
        top = float(task.levels - 1)
        z = on_scale(prediction, "log_odds", top)
        mean = float(np.clip(label.mean() / top, TINY, 1 - TINY))
        shift, scale = _shift(z, mean), "log_odds"
        return Map([0.0, 1.0], [shift, 1 + shift], True, scale, top)
    scale = "log" if task.kind == "watch_time" else task.transform
    if scale == "identity":
        shift = float((label - prediction).mean(dtype=np.float64))
    else:
        one = 0.0 if scale == "log" else 1.0
        floor = TINY if scale == "log" else 0.0
        means = (label.mean(dtype=np.float64), np.maximum(prediction, floor).mean(dtype=np.float64))
        shift = float(np.log(one + means[0]) - np.log(one + means[1]))
    return Map([0.0, 1.0], [shift, 1 + shift], True, scale)


def _shift(z: np.ndarray, mean: float) -> float:
    """The s by which the mean of σ(z + s) over log-odds z [N] is `mean`, in (0, 1)."""
    wide = 40.0 + float(np.abs(z).max(initial=0.0))
    return float(brentq(lambda s: float(expit(z + s).mean()) - mean, -wide, wide, xtol=1e-10))


def isotonic(label: np.ndarray, probability: np.ndarray) -> Map:
    """Isotonic regression of the label on the prediction (Zadrozny & Elkan, KDD 2002).

    The steps are interpolated linearly, and values are kept half a row away from 0 and 1.
    """
    from sklearn.isotonic import IsotonicRegression

    margin = 0.5 / len(label)
    model = IsotonicRegression(y_min=margin, y_max=1 - margin, out_of_bounds="clip")
    model.fit(probability.astype(np.float64), label)
    x = np.clip(model.X_thresholds_, TINY, 1 - TINY)
    z = np.log(x) - np.log1p(-x)
    keep = np.r_[True, np.diff(z) > 0]
    y = model.y_thresholds_
    return Map(z[keep].tolist(), (np.log(y) - np.log1p(-y))[keep].tolist(), straight=False)


def isotonic_mean(label: np.ndarray, prediction: np.ndarray) -> Map:
    """Isotonic regression of a number on its prediction, with steps interpolated linearly."""
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(out_of_bounds="clip")
    model.fit(prediction.astype(np.float64), label.astype(np.float64))
    x, y = model.X_thresholds_.tolist(), model.y_thresholds_.tolist()
    return Map(x, y, straight=False, scale="identity")


def _enough(task: Task, label: np.ndarray, least: int) -> bool:
    """Whether there are enough positives and as many negatives, or labels other than 0."""
    if task.kind != "binary":
        return int((label != 0).sum()) >= least
    positives = int((label > 0.5).sum())
    return min(positives, len(label) - positives) >= least


def _ancestors(name: str, conditional_on: Mapping[str, str]) -> list[str]:
    ancestors = []
    while name in conditional_on:
        name = conditional_on[name]
        ancestors.append(name)
    return ancestors
