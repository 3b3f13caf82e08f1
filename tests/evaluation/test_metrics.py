"""Metrics against scikit-learn and hand-worked values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from mtl_ranker.evaluation.metrics import (
    ListCount,
    auc,
    calibration_ratio,
    count_lists,
    ece,
    evaluate,
    gauc,
    ndcg,
)

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


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1), st.randoms())
def test_ece_does_not_depend_on_the_order_of_rows(rows, random):
    def error(rows):
        label, prediction = (np.array(column, float) for column in zip(*rows, strict=True))
        return ece(label, prediction / 4)

    before = error(rows)
    random.shuffle(rows)
    assert error(rows) == pytest.approx(before)


def test_ece_of_a_constant_is_its_distance_from_the_base_rate():
    label = np.r_[np.zeros(60), np.ones(40)]
    assert ece(label, np.full(100, 0.4)) == pytest.approx(0.0)
    assert ece(label, np.full(100, 0.1)) == pytest.approx(0.3)


def test_missing_labels_are_left_out():
    label = np.array([0, 1, np.nan, 1])
    metrics = evaluate("binary", label, np.array([0.2, 0.8, 0.9, 0.1]), np.array([1, 1, 1, 1]))
    assert metrics["auc"] == 0.5


def test_lists_without_both_labels_are_counted_not_hidden():
    """Of four lists with a label two have both, one of them beside a row without a label."""
    lists = np.array([7, 7, 7, 8, 8, 9, 3, 3, 5])
    label = np.array([1, 0, np.nan, 1, 0, 1, 0, 0, np.nan])
    found = count_lists(label, lists)
    assert found == ListCount(lists=4, both=2, rows=7, rows_of_both=4)
    assert str(found) == "2 of 4 lists have both labels, with 4 of 7 rows (57.1%)"
    nothing = count_lists(np.full(2, np.nan), lists[:2])
    assert str(nothing) == "0 of 0 lists have both labels, with 0 of 0 rows (0.0%)"
