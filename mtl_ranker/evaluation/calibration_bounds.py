"""Whether predictions are calibrated on average: ratio to the labels, and shift in log-odds.

Both have intervals over users: a bound is broken only if the whole interval lies outside. Neither
depends on an objective's base rate, as the expected calibration error does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import t as student

from mtl_ranker.config import Promotion
from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.evaluation.metrics import PredictedRows
from mtl_ranker.models.objectives import Task

TINY = 1e-7
MIN_POSITIVES = 10  # positives, and as many negatives of a binary objective
MIN_USERS = 5  # with a positive


@dataclass(frozen=True)
class Calibrated:
    """One objective's calibration on held-out rows.

    Attributes:
        positives: labels above 0.
        users: with such a label.
        ratio: sum of predictions over sum of labels; None if the labels are too few or may be
            negative.
        shift: what must be added to every predicted log-odds for the predictions to have the mean
            of the labels (calibration in the large, Van Calster et al. 2016); None as of `ratio`,
            and for objectives that are not binary.
    """

    objective: str
    positives: int
    users: int
    ratio: Interval | None = None
    shift: Interval | None = None


def calibrated(
    tasks: Sequence[Task], rows: PredictedRows, confidence: float = 0.95
) -> list[Calibrated]:
    """Each objective's calibration on N rows, with intervals over users.

    The variance is that of sums over users (delta method, Liang & Zeger 1986 for clusters), and the
    quantile is Student's with one degree of freedom less than users with a positive.
    """
    found = []
    for t, task in enumerate(tasks):
        known = ~np.isnan(rows.labels[:, t])
        label = rows.labels[known, t].astype(np.float64)
        prediction = rows.prediction[known, t].astype(np.float64)
        _, user = np.unique(rows.user[known], return_inverse=True)
        positive = label > 0
        positives, users = int(positive.sum()), len(np.unique(user[positive]))
        least = min(positives, len(label) - positives) if task.kind == "binary" else positives
        if least < MIN_POSITIVES or users < MIN_USERS or label.min() < 0:
            found.append(Calibrated(task.name, positives, users))
            continue
        quantile = float(student.ppf((1 + confidence) / 2, users - 1))
        ratio = _ratio(label, prediction, user, quantile)
        shift = None
        if task.kind == "binary" and np.isfinite(prediction).all():
            shift = _shift(label, prediction, user, quantile)
        found.append(Calibrated(task.name, positives, users, ratio, shift))
    return found


def _ratio(
    label: np.ndarray, prediction: np.ndarray, user: np.ndarray, quantile: float
) -> Interval:
    """Σ p / Σ y with an interval on its logarithm; user codes [N] from 0."""
    observed, predicted = label.sum(), max(float(prediction.sum()), TINY)
    influence = np.bincount(user, weights=prediction / predicted - label / observed)
    log, half = float(np.log(predicted / observed)), quantile * _standard_error(influence)
    low, value, high = np.exp([log - half, log, log + half])
    return Interval(float(value), float(low), float(high))


def _shift(
    label: np.ndarray, prediction: np.ndarray, user: np.ndarray, quantile: float
) -> Interval:
    """The s with Σ σ(logit p + s) = Σ y, the intercept of a logistic regression with offset."""
    z = logit(np.clip(prediction, TINY, 1 - TINY))
    wide = 40.0 + float(np.abs(z).max())
    value = float(brentq(lambda s: float(expit(z + s).mean() - label.mean()), -wide, wide))
    p = expit(z + value)
    influence = np.bincount(user, weights=label - p) / (p * (1 - p)).sum()
    half = quantile * _standard_error(influence)
    return Interval(value, value - half, value + half)


def _standard_error(influence: np.ndarray) -> float:
    """Of a sum of influences [U] of independent users, with the small-sample correction."""
    users = len(influence)
    return float(np.sqrt(users / max(users - 1, 1) * (influence**2).sum()))


def out_of_bounds(found: Sequence[Calibrated], rule: Promotion) -> list[str]:
    """What breaks the bounds with its whole interval, in words."""
    problems, r, most = [], rule.max_calibration_ratio, rule.max_calibration_shift
    for each in found:
        ratio, shift = each.ratio, each.shift
        if ratio is not None and not (ratio.low <= r and ratio.high >= 1 / r):
            problems.append(
                f"{each.objective}: its predictions are {ratio.value:.2f} [{ratio.low:.2f}, "
                f"{ratio.high:.2f}] times the labels, allowed {1 / r:.2f} to {r:.2f} "
                "(promotion.max_calibration_ratio)"
            )
        elif shift is not None and not (shift.low <= most and shift.high >= -most):
            problems.append(
                f"{each.objective}: its log-odds are off by {-shift.value:+.2f} "
                f"[{-shift.high:+.2f}, {-shift.low:+.2f}], allowed {-most:+.2f} to {most:+.2f} "
                "(promotion.max_calibration_shift)"
            )
    return problems


def unsupported(found: Sequence[Calibrated]) -> list[str]:
    """Which objectives cannot be judged, and what it takes, in words."""
    return [
        f"the calibration of {each.objective} is not judged: {each.positives} positive labels of "
        f"{each.users} users; needed: {MIN_POSITIVES} positives and, for a binary objective, "
        f"negatives, of {MIN_USERS} users, and no label below 0"
        for each in found
        if each.ratio is None
    ]
