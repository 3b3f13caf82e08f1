"""The trade-off between engagement and satisfaction over blend weights, and its Pareto front.

Ranking by Σ w·v or Π v^w of calibrated predictions (Zhao et al., RecSys 2019, section 4.4) trades
engagement for satisfaction. Each choice of weights is one point: NDCG@10 of the engagement
objectives and NDCG@10 of the satisfaction objectives on held-out days.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_ranker.config import Project
from mtl_ranker.evaluation.influence import Clusters, Influenced, Support, ratio_influence
from mtl_ranker.evaluation.intervals import NO_VARIANCE, Estimated, Interval, over_users
from mtl_ranker.evaluation.metrics import PredictedRows, grouped_ndcg, ndcg
from mtl_ranker.ranking.blend import blended, label_matrix_of_values, value_matrix

RANKS = 10  # of NDCG


@dataclass(frozen=True)
class Point:
    """One choice of weights and the quality of ranking by it.

    Attributes:
        weights: objective → weight.
        engagement, satisfaction: NDCG@10, the weighted mean over the group's objectives that
            count (`counted_objectives`); NaN if none has a list with a positive label.
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
    """The quality of ranking each list by these weights, measured by `gains`.

    Args:
        weights: objective → weight.
        how: weighted_sum or weighted_product.
    """
    names = [o.name for o in project.objectives]
    score = blended(how, [weights[n] for n in names], value_matrix(project, rows.prediction))
    labels = gains(project, rows.labels)
    groups: dict[str, list[tuple[float, float]]] = {"engagement": [], "satisfaction": []}
    counted = counted_objectives(project)
    for t, objective in enumerate(project.objectives):
        if objective.name not in counted:
            continue
        label = labels[:, t]
        known = ~np.isnan(label)
        value = ndcg(label[known], score[known], rows.lists[known], RANKS)
        if not np.isnan(value):
            groups[objective.group].append((value, objective.weight))
    means = {
        group: float(np.average([v for v, _ in values], weights=[w for _, w in values]))
        if values
        else float("nan")
        for group, values in groups.items()
    }
    return Point(dict(weights), means["engagement"], means["satisfaction"])


def counted_objectives(project: Project) -> set[str]:
    """The objectives by which a choice of weights is judged.

    Of each group those with a blend weight in the project, which defines what the ranking is for;
    all of a group without any.
    """
    weights, found = project.blend_weights, set()
    for group in ("engagement", "satisfaction"):
        names = [o.name for o in project.objectives if o.group == group]
        found |= {name for name in names if weights[name] != 0} or set(names)
    return found


def gains(project: Project, labels: np.ndarray) -> np.ndarray:
    """The gain of each impression for each objective [N, T], from labels [N, T].

    The label, or 0 where the objective's condition does not hold and it enters the blend times the
    probability of that (ranking/blend.py). For a bad objective it is the largest label minus the
    label.
    """
    found, bad = label_matrix_of_values(project, labels), project.bad
    for t, objective in enumerate(project.objectives):
        if objective.name in bad and not np.isnan(found[:, t]).all():
            found[:, t] = np.nanmax(found[:, t]) - found[:, t]
    return found


def trial_weights(
    project: Project, prediction: np.ndarray, count: int, seed: int = 0
) -> list[dict[str, float]]:
    """Weights to try: each objective alone, the two groups against each other, and random mixes.

    Weights are per standard deviation of an objective's values in the blend, so that a rare
    objective, whose probabilities are small, is also tried with weights that change the order. They
    have the signs of the project's weights.

    Args:
        prediction: [N, T].
        count: choices of weights.
    """
    names = [o.name for o in project.objectives]
    spread = np.maximum(value_matrix(project, prediction).std(0), 1e-9)
    bad = project.bad
    sign = np.array([-1.0 if name in bad else 1.0 for name in names])
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
        weights = sign * weights / weights.max()
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


def best_on_both(points: Sequence[Point], current: Point) -> Point | None:
    """The point that is better than `current` for both groups, by the larger smaller gain."""

    def smaller_gain(point: Point) -> float:
        gains = point.engagement - current.engagement, point.satisfaction - current.satisfaction
        return float(np.nan_to_num(gains, nan=-1.0).min())

    best = max(points, key=smaller_gain)
    return best if smaller_gain(best) > 0 else None


def paired_gains(
    project: Project,
    rows: PredictedRows,
    choices: tuple[Mapping[str, float], Mapping[str, float]],
    how: str,
    confidence: float,
) -> tuple[Interval, Interval]:
    """How much better the first choice of weights is for engagement and for satisfaction.

    The weighted mean over objectives of the mean difference of lists' NDCG@10, with an interval
    over users (`Estimated`); the model is the same, so there is no variance over seeds. Its support
    is the lists in which the rarest objective has a gain: NaN bounds if they are too few.
    """
    names, values = [o.name for o in project.objectives], value_matrix(project, rows.prediction)
    scores = [blended(how, [weights[n] for n in names], values) for weights in choices]
    labels, counted = gains(project, rows.labels), counted_objectives(project)
    codes = np.unique(rows.lists, return_inverse=True)[1]
    lists = int(codes.max(initial=-1)) + 1
    owner = np.zeros(lists, np.int64)  # the user of each list
    owner[codes] = np.unique(rows.user, return_inverse=True)[1]
    users = int(owner.max(initial=-1)) + 1
    intervals = []
    for group in ("engagement", "satisfaction"):
        parts: list[tuple[float, Influenced, Support]] = []
        for t, objective in enumerate(project.objectives):
            known = ~np.isnan(labels[:, t])
            label, own = labels[known, t], codes[known]
            one, other = (grouped_ndcg(label, score[known], own, RANKS) for score in scores)
            if objective.group == group and len(one) and objective.name in counted:
                rows_of = np.bincount(own, minlength=lists)
                gaining = np.bincount(own, weights=label > 0, minlength=lists)
                judged = Clusters(owner[(rows_of > 1) & (gaining > 0)], users)
                mean = ratio_influence(judged.sums(one - other), judged.sums(np.ones(len(one))))
                support = Support(len(one), judged.present(), "lists with a gain")
                parts.append((objective.weight, mean, support))
        intervals.append(_weighted(parts).interval(confidence))
    return intervals[0], intervals[1]


def _weighted(parts: Sequence[tuple[float, Influenced, Support]]) -> Estimated:
    """The weighted mean of means over lists, with the least support."""
    if not parts:
        return Estimated(float("nan"), NO_VARIANCE, NO_VARIANCE, Support(0, 0, "lists with a gain"))
    total = sum(weight for weight, _, _ in parts)
    by_user = sum(weight / total * mean.by_user for weight, mean, _ in parts)
    support = min((own for _, _, own in parts), key=lambda own: (own.users, own.rows))
    return Estimated(
        value=sum(weight / total * mean.value for weight, mean, _ in parts),
        users=over_users(np.asarray(by_user), support),
        trainings=NO_VARIANCE,
        support=support,
    )


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


def keeping(points: Sequence[Point], current: Point, maximise: str, share: float) -> Point:
    """The point with the best value of one group whose other group keeps a share of `current`'s.

    Args:
        maximise: engagement or satisfaction.
        share: of the other group's NDCG@10.

    Returns `current` if no point is better.
    """
    other = "satisfaction" if maximise == "engagement" else "engagement"
    least = share * _or_zero(getattr(current, other))
    allowed = [p for p in points if _or_zero(getattr(p, other)) >= least]
    return max([current, *allowed], key=lambda p: _or_zero(getattr(p, maximise)))


def _or_zero(value: float) -> float:
    return 0.0 if np.isnan(value) else value
