"""The trade-off between engagement and satisfaction over blend weights, and its Pareto front.

Ranking by Σ w·p or Π p^w of calibrated predictions (Zhao et al., RecSys 2019, section 4.4) trades
engagement for satisfaction. Each choice of weights is one point: NDCG@10 of the engagement
objectives and NDCG@10 of the satisfaction objectives on held-out days.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_ranker.config import Project
from mtl_ranker.evaluation.metrics import PredictedRows, ndcg
from mtl_ranker.ranking.blend import blended


@dataclass(frozen=True)
class Point:
    """One choice of weights and the quality of ranking by it.

    Attributes:
        weights: objective → weight.
        engagement, satisfaction: NDCG@10, the weighted mean over the group's objectives; NaN if the
            group has no objective or no user with a positive label.
        best: on the Pareto front: no other point is better in one and at least as good in the
            other.
    """

    weights: dict[str, float]
    engagement: float
    satisfaction: float
    best: bool = False


def quality_of(
    project: Project, rows: PredictedRows, weights: Mapping[str, float], how: str
) -> Point:
    """The quality of ranking each user's rows by these weights.

    Args:
        weights: objective → weight.
        how: weighted_sum or weighted_product.
    """
    names = [o.name for o in project.objectives]
    score = blended(how, [weights[n] for n in names], rows.prediction)
    groups: dict[str, list[tuple[float, float]]] = {"engagement": [], "satisfaction": []}
    for t, objective in enumerate(project.objectives):
        label = rows.labels[:, t]
        known = ~np.isnan(label)
        value = ndcg(label[known].astype(np.float64), score[known], rows.user[known])
        if not np.isnan(value):
            groups[objective.group].append((value, objective.weight))
    means = {
        group: float(np.average([v for v, _ in values], weights=[w for _, w in values]))
        if values
        else float("nan")
        for group, values in groups.items()
    }
    return Point(dict(weights), means["engagement"], means["satisfaction"])


def trial_weights(
    project: Project, prediction: np.ndarray, count: int, seed: int = 0
) -> list[dict[str, float]]:
    """Weights to try: each objective alone, the two groups against each other, and random mixes.

    Weights are per standard deviation of an objective's predictions, so that a rare objective,
    whose probabilities are small, is also tried with weights that change the order.

    Args:
        prediction: [N, T].
        count: choices of weights.
    """
    names = [o.name for o in project.objectives]
    spread = np.maximum(prediction.astype(np.float64).std(0), 1e-9)
    shares = list(np.eye(len(names)))
    satisfied = np.array([o.group == "satisfaction" for o in project.objectives])
    if satisfied.any() and not satisfied.all():
        for share in np.linspace(0.0, 1.0, 11):
            shares.append(
                share * satisfied / satisfied.sum() + (1 - share) * ~satisfied / (~satisfied).sum()
            )
    rng = np.random.default_rng(seed)
    while len(shares) < count:
        shares.append(rng.dirichlet(np.full(len(names), 0.6)))
    choices = []
    for share in shares[:count]:
        weights = share / spread
        weights = weights / weights.max()
        choices.append({n: float(f"{w:.4g}") for n, w in zip(names, weights, strict=True)})
    return choices


def pareto(points: Sequence[Point]) -> list[Point]:
    """The same points, with those that no other point dominates marked `best`."""
    values = np.array([[_or_zero(p.engagement), _or_zero(p.satisfaction)] for p in points])
    marked = []
    for point, value in zip(points, values, strict=True):
        dominated = ((values >= value).all(1) & (values > value).any(1)).any()
        marked.append(
            Point(point.weights, point.engagement, point.satisfaction, best=not bool(dominated))
        )
    return marked


def try_weights(
    project: Project,
    rows: PredictedRows,
    how: str,
    count: int = 200,
    on_point: Callable[[], None] | None = None,
) -> list[Point]:
    """Evaluate `count` choices of weights on held-out rows and mark the Pareto front.

    `on_point` is called after each choice.
    """
    points = []
    for weights in trial_weights(project, rows.prediction, count):
        points.append(quality_of(project, rows, weights, how))
        if on_point is not None:
            on_point()
    return pareto(points)


def propose(points: Sequence[Point], satisfaction_share: float) -> Point:
    """The point of the front with the largest (1 - s) · engagement + s · satisfaction, each scaled
    to its range over the front, for a trade-off s = `satisfaction_share` in [0, 1].
    """
    front = [p for p in points if p.best]
    values = {
        group: [_or_zero(getattr(p, group)) for p in front]
        for group in ("engagement", "satisfaction")
    }

    def scaled(point: Point, group: str) -> float:
        low, high = min(values[group]), max(values[group])
        return (_or_zero(getattr(point, group)) - low) / max(high - low, 1e-12)

    s = satisfaction_share
    return max(
        front, key=lambda p: (1 - s) * scaled(p, "engagement") + s * scaled(p, "satisfaction")
    )


def _or_zero(value: float) -> float:
    return 0.0 if np.isnan(value) else value
