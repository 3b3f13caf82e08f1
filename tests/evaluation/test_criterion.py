"""Objectives of different units and noise count by their weights."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import r2_score, roc_auc_score

from mtl_ranker.evaluation.criterion import WORST, Criterion, comparison_weights
from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import compare, model_quality
from mtl_ranker.evaluation.metrics import PredictedRows, gauc
from mtl_ranker.models.objectives import Task

TASKS = [Task("click", "binary"), Task("seconds", "regression", weight=0.5)]
ROWS = 2_000


@pytest.fixture
def held_out():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(ROWS, 2))
    click = rng.random(ROWS) < 1 / (1 + np.exp(-truth[:, 0]))
    labels = np.stack([click, truth[:, 1] + rng.normal(size=ROWS)], 1)
    return truth, labels, rng.integers(0, 300, ROWS), rng


def fitted(labels, user, reference, lists=None):
    """Without lists each row is its own, so that AUC over rows counts."""
    own = np.arange(len(user)) if lists is None else lists
    return Criterion.fit(TASKS, PredictedRows(labels, reference, user, own))


def probabilities(truth):
    return np.stack([1 / (1 + np.exp(-truth[:, 0])), truth[:, 1]], 1)


def test_value_is_the_weighted_mean_of_scaled_qualities(held_out):
    truth, labels, user, _ = held_out
    prediction = probabilities(truth)
    criterion = fitted(labels, user, prediction)
    auc = roc_auc_score(labels[:, 0], prediction[:, 0])
    r2 = r2_score(labels[:, 1], prediction[:, 1])
    expected = (auc / criterion.scale["click"] + 0.5 * r2 / criterion.scale["seconds"]) / 1.5
    assert criterion.value(prediction) == pytest.approx(expected, rel=1e-9)


def test_the_order_within_lists_counts_where_enough_lists_have_both_labels(held_out):
    truth, labels, user, rng = held_out
    prediction = probabilities(truth)
    criterion = fitted(labels, user, prediction, user)
    r2 = r2_score(labels[:, 1], prediction[:, 1])
    by_list = gauc(labels[:, 0], prediction[:, 0], user)
    expected = (by_list / criterion.scale["click"] + 0.5 * r2 / criterion.scale["seconds"]) / 1.5
    assert criterion.value(prediction) == pytest.approx(expected, rel=1e-9)
    levels = prediction.copy()
    levels[:, 0] *= rng.uniform(0.5, 1.0, 300)[user]
    assert criterion.value(levels) == pytest.approx(criterion.value(prediction))


def test_a_model_with_a_worse_log_loss_comes_after_all_others(held_out):
    """Wrong levels in the right order: the criterion's value is the same, its order is not."""
    truth, labels, user, rng = held_out
    reference = probabilities(truth + 0.5 * rng.normal(size=truth.shape))
    criterion = fitted(labels, user, reference, user)
    right, wrong = probabilities(truth), probabilities(truth)
    wrong[:, 0] = wrong[:, 0] ** 4
    assert criterion.value(wrong) == pytest.approx(criterion.value(right))
    assert criterion.worse_loss([wrong]) == ["click"]
    assert criterion.worse_loss([right]) == criterion.worse_loss([reference]) == []
    assert criterion.order([wrong]) < criterion.order([reference]) < criterion.order([right])
    broken = right.copy()
    broken[0, 0] = np.nan
    assert criterion.order([broken]) < criterion.order([wrong])


def test_the_gain_over_the_reference_has_the_error_of_the_paired_difference(held_out):
    truth, labels, user, rng = held_out
    reference = probabilities(truth + 0.5 * rng.normal(size=truth.shape))
    criterion = fitted(labels, user, reference, user)
    nothing = criterion.gain(reference)
    assert (nothing.value, nothing.standard_error) == (0.0, 0.0)
    better = criterion.gain(probabilities(truth))
    assert better.value > 4 * better.standard_error > 0
    weights = [task.weight / criterion.scale[task.name] for task in TASKS]
    scaled = criterion.value(probabilities(truth)) - criterion.value(reference)
    assert better.value == pytest.approx(scaled * 1.5 / sum(weights))


def test_the_unit_of_a_label_does_not_matter(held_out):
    truth, labels, user, rng = held_out
    one, other = (probabilities(truth + 0.3 * rng.normal(size=truth.shape)) for _ in range(2))
    unit = np.array([1.0, 1_000.0])
    plain = fitted(labels, user, one)
    scaled = fitted(labels * unit, user, one * unit)
    gain = plain.value(other) - plain.value(one)
    assert scaled.value(other * unit) - scaled.value(one * unit) == pytest.approx(gain, rel=1e-6)


def test_no_objective_decides_by_its_noise(held_out):
    """Of equally blurred predictions, each objective has about its weight in the variance."""
    truth, labels, user, rng = held_out
    criterion = fitted(labels, user, probabilities(truth))
    draws = []
    for _ in range(60):
        prediction = probabilities(truth + 0.5 * rng.normal(size=truth.shape))
        only_click, only_seconds = (probabilities(truth) for _ in range(2))
        only_click[:, 0], only_seconds[:, 1] = prediction[:, 0], prediction[:, 1]
        draws.append([criterion.value(only_click), criterion.value(only_seconds)])
    click, seconds = np.var(draws, axis=0)
    assert 0.3 < click / (click + seconds) < 0.97


def test_a_quality_is_bounded_below(held_out):
    truth, labels, user, _ = held_out
    prediction = probabilities(truth)
    criterion = fitted(labels, user, prediction)
    wrong = prediction.copy()
    wrong[:, 1] *= -1_000.0
    lost = criterion.value(prediction) - criterion.value(wrong)
    r2 = r2_score(labels[:, 1], prediction[:, 1])
    assert lost == pytest.approx(0.5 * (r2 - WORST) / criterion.scale["seconds"] / 1.5)
    weights = [task.weight / criterion.scale[task.name] for task in TASKS]
    gain = criterion.gain(wrong)
    assert gain.value == pytest.approx(-lost * 1.5 / sum(weights))
    assert gain.interval().high < 0


def test_an_objective_without_enough_labels_has_no_say(held_out):
    truth, labels, user, rng = held_out
    labels[:, 0] = 0.0
    labels[:3, 0] = 1.0
    one, other = probabilities(truth), probabilities(truth)
    other[:, 0] = rng.random(ROWS)
    criterion = fitted(labels, user, one)
    assert set(criterion.scale) == {"seconds"}
    assert criterion.value(one) == criterion.value(other)


def test_a_reference_without_any_error_gives_no_scale(held_out):
    truth, labels, user, _ = held_out
    constant = np.zeros_like(truth)
    constant[:, 1] = labels[:, 1].mean()
    criterion = fitted(labels, user, constant)
    assert all(np.isfinite(1 / scale) for scale in criterion.scale.values())
    assert np.isfinite(criterion.value(probabilities(truth)))


def test_predictions_that_are_no_numbers_come_last(held_out):
    truth, labels, user, _ = held_out
    prediction = probabilities(truth)
    criterion = fitted(labels, user, prediction)
    broken = prediction.copy()
    broken[3, 1] = np.nan
    assert criterion.value(broken) == -np.inf


def test_an_objective_without_support_has_no_weight_in_a_comparison(held_out):
    truth, labels, user, rng = held_out
    labels[:, 0] = 0.0
    labels[:3, 0] = 1.0
    clusters = Clusters.of(user)
    one, other = (probabilities(truth + 0.5 * rng.normal(size=truth.shape)) for _ in range(2))
    differences = []
    for t, task in enumerate(TASKS):
        rows = LabelledRows.of(task.kind, labels[:, t], clusters)
        a, b = (model_quality(rows, [p[:, t]], fixed=True) for p in (one, other))
        differences.append(compare(a, b))
    assert differences[0].standard_error > 0
    weights = comparison_weights(TASKS, differences)
    assert weights == pytest.approx([0.0, 0.5 / differences[1].standard_error])


def test_weights_of_a_comparison_are_over_the_standard_error(held_out):
    truth, labels, user, rng = held_out
    clusters = Clusters.of(user)
    one, other = (probabilities(truth + 0.5 * rng.normal(size=truth.shape)) for _ in range(2))
    other[:, 1] = one[:, 1]
    differences = []
    for t, task in enumerate(TASKS):
        rows = LabelledRows.of(task.kind, labels[:, t], clusters)
        a, b = (model_quality(rows, [p[:, t]], fixed=True) for p in (one, other))
        differences.append(compare(a, b))
    error = differences[0].standard_error
    assert comparison_weights(TASKS, differences) == pytest.approx([1 / error, 0.0])
    assert comparison_weights(TASKS, [differences[1]] * 2) == [1.0, 0.5]
