"""Blend weights: the Pareto front against brute force, and the point that a trade-off chooses."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.metrics import PredictedRows, ndcg
from mtl_ranker.evaluation.pareto import (
    Point,
    gains,
    keeping,
    paired_gains,
    pareto,
    propose,
    quality_of,
    trial_weights,
    try_weights,
)
from mtl_ranker.nightly.blend_search import BlendSearch, check_weights, kept_blend, trade_off
from mtl_ranker.ranking.blend import blended
from tests.projects import changed, project

PROJECT_TABLE = {
    "objectives": [
        {"name": "click", "group": "engagement", "label": "click"},
        {"name": "like", "group": "satisfaction", "label": "like"},
    ]
}
PROJECT = project(PROJECT_TABLE)

values = st.floats(0, 1, allow_nan=False).map(lambda x: round(x, 2))


@given(st.lists(st.tuples(values, values), min_size=1, max_size=25))
def test_front_is_the_points_that_no_other_point_dominates(qualities):
    marked = pareto([Point({}, e, s) for e, s in qualities])
    for point, (e, s) in zip(marked, qualities, strict=True):
        dominated = any(a >= e and b >= s and (a > e or b > s) for a, b in qualities)
        assert point.best == (not dominated)


@given(
    st.lists(st.tuples(values, values), max_size=25),
    st.tuples(values, values),
    st.floats(0.5, 1.0),
)
def test_kept_weights_are_the_best_of_those_that_keep_enough(qualities, own, share):
    points, current = [Point({}, e, s) for e, s in qualities], Point({}, *own)
    for maximise, kept in (("engagement", "satisfaction"), ("satisfaction", "engagement")):
        chosen = keeping(points, current, maximise, share)
        least = share * getattr(current, kept)
        assert getattr(chosen, kept) >= least
        for point in [*points, current]:
            fits = getattr(point, kept) >= least
            assert not fits or getattr(point, maximise) <= getattr(chosen, maximise)


def conflict(rows: int = 4_000):
    """Clicks follow one score, likes its opposite, in lists of ten rows a user."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=rows)
    p = np.stack([1 / (1 + np.exp(-2 * x)), 0.1 / (1 + np.exp(2 * x))], 1)
    labels = (rng.random(p.shape) < p).astype(np.float32)
    return labels, p, np.arange(rows) // 10


def test_a_trade_off_moves_along_the_front_from_one_group_to_the_other():
    labels, p, user = conflict()
    points = try_weights(PROJECT, PredictedRows(labels, p, user, user), "weighted_sum", count=40)
    engaged, even, satisfied = (propose(points, s) for s in (0.0, 0.5, 1.0))
    assert engaged.engagement == max(x.engagement for x in points)
    assert satisfied.satisfaction == max(x.satisfaction for x in points)
    assert engaged.engagement >= even.engagement >= satisfied.engagement
    assert engaged.satisfaction <= even.satisfaction <= satisfied.satisfaction
    assert all(point.best for point in (engaged, even, satisfied))
    assert engaged.engagement > satisfied.engagement + 0.1


def test_quality_is_each_groups_ndcg_of_the_blended_score():
    labels, p, user = conflict()
    rows = PredictedRows(labels, p, user, user)
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


def test_a_condition_and_a_negative_weight_change_the_gain_and_the_trial_weights():
    objectives = [
        {"name": "click", "group": "engagement", "label": "click"},
        {"name": "returned", "group": "satisfaction", "label": "returned", "where": "click = 1"},
    ]
    shop = project(objectives=objectives, scoring={"weights": {"returned": -2.0}})
    labels = np.array([[0, np.nan], [1, 0], [1, 1]])
    np.testing.assert_array_equal(gains(shop, labels), [[0, 1], [1, 1], [1, 0]])
    p = np.random.default_rng(0).uniform(0.1, 0.9, (500, 2))
    choices = trial_weights(shop, p, 30)
    assert all(choice["click"] >= 0 >= choice["returned"] for choice in choices)
    even = choices[2 + 5]
    spread = p[:, 0].std() / (p[:, 0] * p[:, 1]).std()
    assert -even["returned"] / even["click"] == pytest.approx(spread, rel=1e-3)


def inside(rows: int = 6_000):
    """Clicks and likes follow one score; the likes' predictions are noise."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=rows)
    truth = np.stack([1 / (1 + np.exp(-x)), 1 / (1 + np.exp(1 - x))], 1)
    labels = (rng.random(truth.shape) < truth).astype(np.float32)
    p = np.stack([truth[:, 0], rng.uniform(0, 1, rows)], 1)
    return PredictedRows(labels, p, np.arange(rows) // 10, np.arange(rows) // 5)


def test_paired_gains_are_the_differences_of_qualities_with_the_error_of_their_mean():
    rows, choices = inside(), ({"click": 1.0, "like": 0.0}, {"click": 1.0, "like": 1.0})
    found = paired_gains(PROJECT, rows, choices, "weighted_sum", 0.95)
    one, other = (quality_of(PROJECT, rows, weights, "weighted_sum") for weights in choices)
    assert found[0].value == pytest.approx(one.engagement - other.engagement)
    assert found[1].value == pytest.approx(one.satisfaction - other.satisfaction)
    scores = [blended("weighted_sum", list(w.values()), rows.prediction) for w in choices]
    of_users: dict[int, list[float]] = {}
    for one_list in np.unique(rows.lists):
        here = rows.lists == one_list
        label = rows.labels[here, 1]
        if label.any():
            a, b = (ndcg(label, score[here], rows.lists[here]) for score in scores)
            of_users.setdefault(int(rows.user[here][0]), []).append(a - b)
    lists = [difference for own in of_users.values() for difference in own]
    sums = [np.sum(np.array(own) - np.mean(lists)) for own in of_users.values()]
    users = len(of_users)
    error = np.sqrt(np.sum(np.square(sums)) * users / (users - 1)) / len(lists)
    assert len(lists) > users
    half = stats.t.ppf(0.975, users - 1) * error
    assert found[1].high - found[1].value == pytest.approx(half)
    assert found[1].value - found[1].low == pytest.approx(half)


def test_paired_gains_of_few_users_have_no_interval():
    """Nine users with likes are too few, ten are enough."""
    rows, choices = inside(), ({"click": 1.0, "like": 0.0}, {"click": 1.0, "like": 1.0})
    liking = np.unique(rows.user[rows.labels[:, 1] > 0])
    few = [rows.where(np.isin(rows.user, liking[:n])) for n in (9, 10)]
    nine, ten = (paired_gains(PROJECT, each, choices, "weighted_sum", 0.95)[1] for each in few)
    assert np.isnan(nine.low)
    assert re.fullmatch(r"\d+ lists with a gain of 9 users; it takes 10 of 10", nine.note)
    assert ten.low < ten.value < ten.high


def test_weights_that_are_better_for_both_groups_are_found_and_noise_is_not():
    worse = project(PROJECT_TABLE, scoring={"weights": {"click": 0.2, "like": 1.0}})
    better = trade_off(worse, inside(), BlendSearch(tries=30)).better
    assert better.engagement.low > 0
    assert better.satisfaction.low > 0
    assert better.point.weights["like"] < better.point.weights["click"]
    assert "better than click 0.2, like 1 for both groups" in str(better)
    best = project(PROJECT_TABLE, scoring={"weights": {"click": 1.0, "like": 0.0}})
    assert trade_off(best, inside(), BlendSearch(tries=30)).better is None


def test_weights_by_maximise_are_chosen_on_validation_and_judged_on_test_rows():
    labels, p, user = conflict(8_000)
    rows = PredictedRows(labels, p, user, user)
    validation, test = rows.where(user < 400), rows.where(user >= 400)
    scoring = {"weights": {"click": 0.01, "like": 1.0}}
    asked = {"maximise": "engagement", "keep": {"satisfaction": 0.8}}
    settings = project(PROJECT_TABLE, scoring=scoring | asked)
    found = kept_blend(settings, validation, test, 60)
    current = quality_of(settings, validation, settings.blend_weights, "weighted_sum")
    chosen = quality_of(settings, validation, found.choice.weights, "weighted_sum")
    assert chosen.engagement > current.engagement
    assert 0.8 * current.satisfaction <= chosen.satisfaction < current.satisfaction
    gain = quality_of(settings, test, found.choice.weights, "weighted_sum").engagement
    gain -= quality_of(settings, test, settings.blend_weights, "weighted_sum").engagement
    assert found.engagement.value == pytest.approx(gain)
    assert found.engagement.low < gain < found.engagement.high
    # `blend` proposes by the same rule.
    even = np.unique(test.user, return_inverse=True)[1] % 2 == 0
    proposed = trade_off(settings, test, BlendSearch(tries=60)).proposed
    own = quality_of(settings, test.where(even), settings.blend_weights, "weighted_sum")
    assert proposed.satisfaction >= 0.8 * own.satisfaction
    assert kept_blend(project(PROJECT_TABLE), validation, test, 60) is None


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ({"maximise": "engagement"}, "keep: {}; allowed: { satisfaction = 0.99 }"),
        ({"keep": {"engagement": 0.9}}, "allowed: none without maximise"),
        ({"maximise": "engagement", "keep": {"engagement": 0.9}}, "allowed: { satisfaction = 0"),
    ],
)
def test_maximise_needs_what_to_keep(scoring, message):
    with pytest.raises(ProjectError, match=re.escape(message)):
        project(PROJECT_TABLE, scoring=scoring)


def test_weights_of_bad_objectives_count_against():
    bad = project(PROJECT_TABLE, objectives=changed(PROJECT_TABLE["objectives"], 1, good=False))
    labels = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, np.nan]])
    np.testing.assert_array_equal(gains(bad, labels), [[1, 1], [0, 0], [1, np.nan]])
    unweighted = project(
        PROJECT_TABLE,
        objectives=changed(PROJECT_TABLE["objectives"], 1, good=False),
        scoring={"weights": {"like": 0.0}},
    )
    for each in (bad, unweighted):
        np.testing.assert_array_equal(gains(each, labels)[:, 1], [1, 0, np.nan])
        tried = trial_weights(each, np.random.default_rng(0).random((50, 2)), 20)
        assert all(w["click"] >= 0 >= w["like"] for w in tried)
    assert check_weights(bad, {"like": 1.5}) == {"click": 0.0, "like": -1.5}


def test_given_weights_may_be_negative_and_not_all_0():
    assert check_weights(PROJECT, {"like": -1.5}) == {"click": 0.0, "like": -1.5}
    with pytest.raises(ProjectError, match="must differ from 0"):
        check_weights(PROJECT, {"like": 0.0})
    with pytest.raises(ProjectError, match="--set like: weight nan; allowed: a number"):
        check_weights(PROJECT, {"like": float("nan")})
