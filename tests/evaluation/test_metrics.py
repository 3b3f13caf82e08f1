"""Metrics against scikit-learn and hand-worked values; intervals against resampling in a loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import ndcg_score, r2_score, roc_auc_score

from mtl_ranker.evaluation.intervals import (
    gauc_draws,
    interval,
    user_draws,
    weighted_auc,
    weighted_r2,
)
from mtl_ranker.evaluation.metrics import auc, calibration_ratio, ece, evaluate, gauc, ndcg

ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 4)), min_size=2)


@given(ROWS)
def test_auc_and_gauc_equal_scikit_learn(rows):
    label, score, user = (np.array(column, float) for column in zip(*rows, strict=True))
    if 0 < label.sum() < len(label):
        assert auc(label, score) == pytest.approx(roc_auc_score(label, score))
    total, weight = 0.0, 0
    for u in np.unique(user):
        here = user == u
        if 0 < label[here].sum() < here.sum():
            total += here.sum() * roc_auc_score(label[here], score[here])
            weight += here.sum()
    if weight:
        assert gauc(label, score, user) == pytest.approx(total / weight)
    else:
        assert np.isnan(gauc(label, score, user))


@given(ROWS)
def test_ndcg_equals_scikit_learn(rows):
    label, score, user = (np.array(column, float) for column in zip(*rows, strict=True))
    values = [
        ndcg_score([label[user == u]], [score[user == u]], k=10)
        for u in np.unique(user)
        if (user == u).sum() > 1 and label[user == u].sum() > 0
    ]
    mean = ndcg(label, score, user, 10)
    assert mean == pytest.approx(np.mean(values)) if values else np.isnan(mean)


def test_calibration_by_hand():
    label, predicted = np.array([0.0, 1, 1, 1]), np.array([0.1, 0.1, 0.9, 0.9])
    assert calibration_ratio(label, predicted) == pytest.approx(2 / 3)
    assert ece(label, predicted, bins=2) == pytest.approx((0.4 + 0.1) / 2)


def test_missing_labels_are_left_out():
    label = np.array([0, 1, np.nan, 1])
    metrics = evaluate("binary", label, np.array([0.2, 0.8, 0.9, 0.1]), np.array([1, 1, 1, 1]))
    assert metrics["auc"] == 0.5


def test_weighted_auc_is_scikit_learns_with_repeated_rows():
    rng = np.random.default_rng(0)
    label, score = (rng.random(60) < 0.4).astype(float), rng.integers(0, 9, 60) / 9
    weights = user_draws(rng.integers(0, 15, 60), 20)
    for draw, value in zip(weights, weighted_auc(label, score, weights), strict=True):
        assert value == pytest.approx(roc_auc_score(label, score, sample_weight=draw))
    for draw, value in zip(weights, weighted_r2(label, score, weights), strict=True):
        assert value == pytest.approx(r2_score(label, score, sample_weight=draw))


def test_draws_keep_a_users_rows_together():
    user = np.array([3, 1, 3, 2])
    draws = user_draws(user, 50)
    assert (draws[:, 0] == draws[:, 2]).all()
    assert (draws[:, [0, 1, 3]].sum(1) == 3).all()


def test_interval_covers_the_true_value_at_about_its_confidence():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        label = (rng.random(400) < 0.5).astype(float)
        score = label + rng.normal(0, 1.0, 400)
        draws = weighted_auc(label, score, user_draws(np.arange(400), 100, trial))
        bounds = interval(auc(label, score), draws, 0.9)
        hits += bounds.low < 0.7602 < bounds.high  # Φ(1/√2): two unit normals one apart
    # Exact bounds of a binomial count: far too wide intervals cover nearly always.
    assert binom.ppf(0.001, 200, 0.9) <= hits <= binom.ppf(0.99, 200, 0.9)


def test_gauc_of_a_resample_is_gauc_of_the_repeated_users():
    """Drawing a user twice means that there are two such users."""
    rng = np.random.default_rng(3)
    user = rng.integers(0, 12, 90)
    label, score = (rng.random(90) < 0.4).astype(float), rng.random(90).round(1)
    weights = user_draws(user, 15)
    values = gauc_draws(label, score, user, weights)
    for value, weight in zip(values, weights, strict=True):
        copies = [np.flatnonzero(weight > c) for c in range(int(weight.max()))]
        rows = np.concatenate(copies)
        users = np.concatenate([user[part] + 100 * c for c, part in enumerate(copies)])
        assert value == pytest.approx(gauc(label[rows], score[rows], users))
