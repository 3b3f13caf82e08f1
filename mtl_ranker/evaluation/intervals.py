"""Bootstrap intervals clustered by user: all rows of a user are resampled together."""

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
    """Weights [R, N] of N rows in R bootstrap resamples of users; equal within a user.

    Args:
        user: [N].
    """
    _, codes = np.unique(user, return_inverse=True)
    users = int(codes.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(users, np.full(users, 1 / users), size=resamples)
    return counts.astype(np.float32)[:, codes]


def weighted_auc(label: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC [R] under weights [R, N]; ties count half. NaN with only one class."""
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
    """R² [R] under weights [R, N]."""
    w = weights.astype(np.float64)
    mean = (w @ label) / w.sum(1)
    spread = w @ label**2 - w.sum(1) * mean**2
    return 1.0 - (w @ (label - prediction) ** 2) / spread


def quality_draws(
    kind: str, label: np.ndarray, prediction: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """One objective's quality in each resample [R]: AUC, or R² if it is not binary.

    Args:
        kind: of the objective.
        label, prediction: [N]; NaN = missing label.
        weights: [R, N] of `user_draws`.
    """
    known = ~np.isnan(label)
    measure = weighted_auc if quality_metric(kind) == "auc" else weighted_r2
    return measure(
        label[known].astype(np.float64), prediction[known].astype(np.float64), weights[:, known]
    )


def gauc_draws(
    label: np.ndarray, score: np.ndarray, user: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """GAUC [R] under weights [R, N] from `user_draws` of the same users."""
    user_auc = auc_of_own_group(label, score, user)
    known = ~np.isnan(user_auc)
    w = weights[:, known].astype(np.float64)
    return (w @ user_auc[known]) / np.where(w.sum(1) > 0, w.sum(1), np.nan)


def interval(value: float, draws: np.ndarray, confidence: float = 0.95) -> Interval:
    """The percentile interval of draws [R]; NaN bounds if every draw is NaN."""
    tail = (1 - confidence) / 2
    draws = draws[~np.isnan(draws)]
    if len(draws) == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Resampled:
    """A quality, and its value in each resample of users (and of trainings).

    Two qualities resampled with the same weights can be subtracted: the difference is paired,
    resample by resample.

    Attributes:
        draws: [R].
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
        weights: [R, N] of `user_draws`.
    """
    unweighted = np.ones((1, len(label)), np.float32)
    values = [float(quality_draws(kind, label, p, unweighted)[0]) for p in predictions]
    draws = [quality_draws(kind, label, p, weights) for p in predictions]
    return Resampled(float(np.mean(values)), over_seeds(np.stack(draws)))


def resampled_gauc(
    label: np.ndarray, predictions: Sequence[np.ndarray], user: np.ndarray, weights: np.ndarray
) -> Resampled:
    """The mean GAUC of one or several trainings of a model; rows without a label are left out.

    Args:
        label, user: [N]; NaN = missing label.
        predictions: [N] of each training (seed).
        weights: [R, N] of `user_draws`.
    """
    known = ~np.isnan(label)
    label, user, weights = label[known], user[known], weights[:, known]
    unweighted = np.ones((1, len(label)), np.float32)
    values = [float(gauc_draws(label, p[known], user, unweighted)[0]) for p in predictions]
    draws = [gauc_draws(label, p[known], user, weights) for p in predictions]
    return Resampled(float(np.mean(values)), over_seeds(np.stack(draws)))


def over_seeds(draws: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draws [S, R] of S trainings → [R], each the mean of S trainings drawn with replacement.

    An interval then covers the random initialisation as well as the users; with one training only
    the users.
    """
    trainings, resamples = draws.shape
    chosen = np.random.default_rng(seed).integers(0, trainings, size=(trainings, resamples))
    return np.take_along_axis(draws, chosen, 0).mean(0)


def paired_difference(one: Resampled, other: Resampled, confidence: float = 0.95) -> Interval:
    """The difference of two qualities on the same rows, with its interval."""
    return (one - other).interval(confidence)


def weighted_mean(weighted: Sequence[tuple[float, Resampled]]) -> Resampled:
    """The mean of (weight, quality) pairs; qualities that are NaN are left out.

    A draw that is NaN counts as 0.
    """
    known = [(weight, quality) for weight, quality in weighted if not np.isnan(quality.value)]
    total = max(sum(weight for weight, _ in known), 1e-12)
    resamples = len(weighted[0][1].draws) if weighted else 0
    draws = sum((w * np.nan_to_num(quality.draws) for w, quality in known), np.zeros(resamples))
    return Resampled(sum(w * quality.value for w, quality in known) / total, draws / total)
