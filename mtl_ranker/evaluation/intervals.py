"""Bootstrap intervals clustered by user: a user's rows are drawn together or not at all."""

from __future__ import annotations

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
    """One objective's quality in each resample: AUC, or R² where it is no binary one."""
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
    tail = (1 - confidence) / 2
    draws = draws[~np.isnan(draws)]
    if len(draws) == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
