"""Blend weights: the Pareto front against brute force, and the point that a trade-off chooses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_ranker.evaluation.metrics import PredictedRows, ndcg
from mtl_ranker.evaluation.pareto import (
    Point,
    pareto,
    propose,
    quality_of,
    trial_weights,
    try_weights,
)
from mtl_ranker.ranking.blend import blended
from tests.projects import project

PROJECT = project(
    {
        "objectives": [
            {"name": "click", "group": "engagement", "label": "click"},
            {"name": "like", "group": "satisfaction", "label": "like"},
        ]
    }
)

values = st.floats(0, 1, allow_nan=False).map(lambda x: round(x, 2))


@given(st.lists(st.tuples(values, values), min_size=1, max_size=25))
def test_front_is_the_points_that_no_other_point_dominates(qualities):
    marked = pareto([Point({}, e, s) for e, s in qualities])
    for point, (e, s) in zip(marked, qualities, strict=True):
        dominated = any(a >= e and b >= s and (a > e or b > s) for a, b in qualities)
        assert point.best == (not dominated)


def conflict(rows: int = 4_000):
    """Clicks follow one score, likes its opposite, in lists of ten rows a user."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=rows)
    p = np.stack([1 / (1 + np.exp(-2 * x)), 0.1 / (1 + np.exp(2 * x))], 1)
    labels = (rng.random(p.shape) < p).astype(np.float32)
    return labels, p, np.arange(rows) // 10


def test_a_trade_off_moves_along_the_front_from_one_group_to_the_other():
    labels, p, user = conflict()
    points = try_weights(PROJECT, PredictedRows(labels, p, user), "weighted_sum", count=40)
    engaged, even, satisfied = (propose(points, s) for s in (0.0, 0.5, 1.0))
    assert engaged.engagement == max(x.engagement for x in points)
    assert satisfied.satisfaction == max(x.satisfaction for x in points)
    assert engaged.engagement >= even.engagement >= satisfied.engagement
    assert engaged.satisfaction <= even.satisfaction <= satisfied.satisfaction
    assert all(point.best for point in (engaged, even, satisfied))
    assert engaged.engagement > satisfied.engagement + 0.1


def test_quality_is_each_groups_ndcg_of_the_blended_score():
    labels, p, user = conflict()
    rows = PredictedRows(labels, p, user)
    point = quality_of(PROJECT, rows, {"click": 1.0, "like": 2.0}, "weighted_sum")
    score = p[:, 0] + 2 * p[:, 1]
    assert point.engagement == pytest.approx(ndcg(labels[:, 0], score, user))
    assert point.satisfaction == pytest.approx(ndcg(labels[:, 1], score, user))


def test_a_product_is_the_weighted_sum_of_logarithms():
    p = np.array([[0.5, 0.1], [0.2, 0.9]])
    assert np.exp(blended("weighted_product", [1.0, 2.0], p)) == pytest.approx(
        p[:, 0] * p[:, 1] ** 2
    )


def test_trial_weights_contain_each_objective_alone_and_scale_rare_ones_up():
    _, p, _ = conflict()
    choices = trial_weights(PROJECT, p, 30)
    assert {"click": 1.0, "like": 0.0} in choices
    assert {"click": 0.0, "like": 1.0} in choices
    even = choices[2 + 5]
    assert even["like"] / even["click"] == pytest.approx(p[:, 0].std() / p[:, 1].std(), rel=1e-3)
