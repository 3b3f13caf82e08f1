"""Bootstrap intervals clustered by user: a user's rows are drawn together or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtl_ranker.evaluation.metrics import auc_of_own_group, quality_metric


@dataclass(frozen=True)
class Interval:
    """A value with its percentile bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def user_draws(user: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each row counts in each resample: [resamples, rows], equal within a user."""
    _, codes = np.unique(user, return_inverse=True)
    users = int(codes.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(users, np.full(users, 1 / users), size=resamples)
    return counts.astype(np.float32)[:, codes]


def weighted_auc(label: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC under each row of weights [resamples, rows]; ties count half. NaN with one class."""
    order = np.argsort(score, kind="stable")
    label, score = label[order] > 0.5, score[order]
    starts = np.flatnonzero(np.r_[True, np.diff(score) != 0])
    values = np.empty(len(weights))
    for index, weight in enumerate(weights):
        w = weight[order].astype(np.float64)
        positive = np.add.reduceat(w * label, starts)
        negative = np.add.reduceat(w * ~label, starts)
        below = np.cumsum(negative) - negative
        pairs = positive.sum() * negative.sum()
        values[index] = (positive * (below + negative / 2)).sum() / pairs if pairs else np.nan
    return values


def weighted_r2(label: np.ndarray, prediction: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """R² under each row of weights [resamples, rows]."""
    w = weights.astype(np.float64)
    mean = (w @ label) / w.sum(1)
    spread = w @ label**2 - w.sum(1) * mean**2
    return 1.0 - (w @ (label - prediction) ** 2) / spread


def quality_draws(
    kind: str, label: np.ndarray, prediction: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """One objective's quality in each resample: AUC, or R² where it is not binary."""
    known = ~np.isnan(label)
    measure = weighted_auc if quality_metric(kind) == "auc" else weighted_r2
    return measure(
        label[known].astype(np.float64), prediction[known].astype(np.float64), weights[:, known]
    )


def gauc_draws(
    label: np.ndarray, score: np.ndarray, user: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """GAUC under each row of weights [resamples, rows] from `user_draws` of the same users."""
    own = auc_of_own_group(label, score, user)
    known = ~np.isnan(own)
    w = weights[:, known].astype(np.float64)
    return (w @ own[known]) / np.where(w.sum(1) > 0, w.sum(1), np.nan)


def interval(value: float, draws: np.ndarray, confidence: float = 0.95) -> Interval:
    """The percentile interval of draws; NaN ends where every draw is NaN."""
    tail = (1 - confidence) / 2
    draws = draws[~np.isnan(draws)]
    if len(draws) == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Resampled:
    """A quality, and its value under each resample of users (and of trainings) [R].

    Two of them that were resampled with the same weights can be subtracted: the difference is
    paired, resample by resample.
    """

    value: float
    draws: np.ndarray

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.value - other.value, self.draws - other.draws)

    def interval(self, confidence: float = 0.95) -> Interval:
        return interval(self.value, self.draws, confidence)


def resampled_quality(
    kind: str, label: np.ndarray, predictions: Sequence[np.ndarray], weights: np.ndarray
) -> Resampled:
    """The mean quality of one or several trainings of a model on one objective.

    Args:
        kind: of the objective: AUC for binary, R² for others.
        label: [N], NaN = missing.
        predictions: [N] of each training (seed).
        weights: [resamples, N] of `user_draws`.
    """
    once = np.ones((1, len(label)), np.float32)
    values = [float(quality_draws(kind, label, p, once)[0]) for p in predictions]
    draws = [quality_draws(kind, label, p, weights) for p in predictions]
    return Resampled(float(np.mean(values)), over_seeds(np.stack(draws)))


def resampled_gauc(
    label: np.ndarray, predictions: Sequence[np.ndarray], user: np.ndarray, weights: np.ndarray
) -> Resampled:
    """As `resampled_quality`, for GAUC. Rows without a label are left out."""
    known = ~np.isnan(label)
    label, user, weights = label[known], user[known], weights[:, known]
    once = np.ones((1, len(label)), np.float32)
    values = [float(gauc_draws(label, p[known], user, once)[0]) for p in predictions]
    draws = [gauc_draws(label, p[known], user, weights) for p in predictions]
    return Resampled(float(np.mean(values)), over_seeds(np.stack(draws)))


def over_seeds(draws: np.ndarray, seed: int = 0) -> np.ndarray:
    """Resamples [S, R] of S trainings → [R], each the mean of S trainings drawn with replacement.

    An interval then covers the random start as well as the users; with one training only the
    users.
    """
    count, resamples = draws.shape
    chosen = np.random.default_rng(seed).integers(0, count, size=(count, resamples))
    return np.take_along_axis(draws, chosen, 0).mean(0)


def paired_difference(one: Resampled, other: Resampled, confidence: float = 0.95) -> Interval:
    """The difference of two qualities on the same rows, with its interval."""
    return (one - other).interval(confidence)


def weighted_mean(parts: Sequence[tuple[float, Resampled]]) -> Resampled:
    """The mean of several resampled values by weight; parts without a value (NaN) are left out.

    A draw that is NaN counts as 0.
    """
    known = [(weight, part) for weight, part in parts if not np.isnan(part.value)]
    total = max(sum(weight for weight, _ in known), 1e-12)
    count = len(parts[0][1].draws) if parts else 0
    draws = sum((w * np.nan_to_num(part.draws) for w, part in known), np.zeros(count))
    return Resampled(sum(w * part.value for w, part in known) / total, draws / total)
