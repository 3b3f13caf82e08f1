"""Bounds on calibration: hand-worked values, coverage, rare objectives and small data."""

from __future__ import annotations

import numpy as np
import pytest

from mtl_ranker.config import Promotion
from mtl_ranker.evaluation.calibration_bounds import (
    Calibrated,
    calibrated,
    out_of_bounds,
    unsupported,
)
from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.evaluation.metrics import PredictedRows
from mtl_ranker.models.objectives import Task

CLICK, WATCH = Task("click", "binary"), Task("watch", "watch_time")
RULE = Promotion()


def judged(task, label, prediction, user=None, confidence=0.95):
    user = np.arange(len(label)) if user is None else user
    rows = PredictedRows(label[:, None], np.asarray(prediction)[:, None], user, user)
    (found,) = calibrated([task], rows, confidence)
    return found


def test_ratio_and_shift_by_hand():
    """Twenty of forty labels are 1 and every prediction is 0.2: odds of 1/4 instead of 1."""
    label = np.tile([0.0, 1.0], 20)
    found = judged(CLICK, label, np.full(40, 0.2))
    assert found.ratio.value == pytest.approx(0.4)
    assert found.shift.value == pytest.approx(np.log(4))
    # Each row is its own user: the error of a mean of 40, over the slope p (1 - p) = 1/4.
    error = np.sqrt(40 / 39 * 0.25 / 40) / 0.25
    t = 2.093024  # 97.5 % of Student's distribution with 19 degrees of freedom
    assert found.shift.high - found.shift.value == pytest.approx(t * error, rel=1e-5)
    assert np.log(found.ratio.high / found.ratio.value) == pytest.approx(t * error / 2, rel=1e-5)


def test_a_users_rows_count_together():
    """Copies of every row, of the same users, add nothing to what is known."""
    rng = np.random.default_rng(0)
    label, p = (rng.random(200) < 0.3).astype(float), rng.uniform(0.1, 0.5, 200)
    user = rng.integers(0, 50, 200)
    once = judged(CLICK, label, p, user)
    thrice = judged(CLICK, np.tile(label, 3), np.tile(p, 3), np.tile(user, 3))
    for which in ("ratio", "shift"):
        one, three = getattr(once, which), getattr(thrice, which)
        assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_intervals_cover_the_truth_at_about_their_confidence():
    """The truth is the ratio, and the shift, of the expected labels of the drawn users."""
    covered = np.zeros(2)
    for trial in range(200):
        rng = np.random.default_rng(trial)
        user = np.repeat(np.arange(150), 4)
        truth = 1 / (1 + np.exp(1.5 - rng.normal(0, 1, 150)[user]))
        label, p = (rng.random(600) < truth).astype(float), np.full(600, 0.3)
        found = judged(CLICK, label, p, user)
        mean = 0.2214  # E σ(z - 1.5) over z ~ N(0, 1)
        shift = np.log(mean / (1 - mean)) - np.log(3 / 7)
        covered += [
            found.ratio.low <= 0.3 / mean <= found.ratio.high,
            found.shift.low <= shift <= found.shift.high,
        ]
    assert (covered >= 182).all()
    assert (covered <= 199).all()


def test_a_rare_objective_times_thirty_is_out_of_bounds():
    rng = np.random.default_rng(1)
    label = (rng.random(20_000) < 0.003).astype(float)
    user = rng.integers(0, 2_000, len(label))
    (problem,) = out_of_bounds([judged(CLICK, label, np.full(len(label), 0.09), user)], RULE)
    assert problem.startswith("click: its predictions are ")
    assert "allowed 0.67 to 1.50 (promotion.max_calibration_ratio)" in problem
    assert not out_of_bounds([judged(CLICK, label, np.full(len(label), 0.003), user)], RULE)


@pytest.mark.parametrize(
    ("ratio", "shift", "broken"),
    [
        (Interval(1.8, 1.4, 2.3), None, []),
        (Interval(1.8, 1.51, 2.1), None, ["max_calibration_ratio"]),
        (Interval(0.6, 0.5, 0.7), None, []),
        (Interval(0.6, 0.55, 0.66), None, ["max_calibration_ratio"]),
        (Interval(1.0, 0.9, 1.1), Interval(0.6, 0.4, 0.8), []),
        (Interval(1.0, 0.9, 1.1), Interval(0.6, 0.51, 0.7), ["max_calibration_shift"]),
        (Interval(1.0, 0.9, 1.1), Interval(-0.6, -0.8, -0.4), []),
        (Interval(1.0, 0.9, 1.1), Interval(-0.6, -0.7, -0.51), ["max_calibration_shift"]),
    ],
)
def test_only_an_interval_that_lies_outside_as_a_whole_breaks_a_bound(ratio, shift, broken):
    """The bounds are 1 / 1.5 and 1.5, and 0.5 either way; each case has an estimate outside."""
    found = out_of_bounds([Calibrated("click", 20, 20, ratio, shift)], RULE)
    assert [each.partition("(promotion.")[2].removesuffix(")") for each in found] == broken


def test_a_frequent_objective_is_judged_by_its_log_odds():
    """0.995 instead of 0.95 is a ratio of 1.05, and ten times the odds."""
    label = (np.arange(4_000) % 20 > 0).astype(float)
    (problem,) = out_of_bounds([judged(CLICK, label, np.full(4_000, 0.995))], RULE)
    assert problem.startswith("click: its log-odds are off by +2.35 [")
    assert not out_of_bounds([judged(CLICK, label, np.full(4_000, 0.96))], RULE)


def test_calibrated_predictions_on_few_rows_are_within_bounds():
    refused = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        p = rng.uniform(0.05, 0.5, 118)
        label = (rng.random(118) < p).astype(float)
        refused += bool(out_of_bounds([judged(CLICK, label, p, rng.integers(0, 40, 118))], RULE))
    assert refused <= 1


@pytest.mark.parametrize(
    ("label", "user"),
    [
        (np.r_[np.ones(9), np.zeros(100)], np.arange(109)),
        (np.r_[np.ones(100), np.zeros(9)], np.arange(109)),
        (np.r_[np.ones(40), np.zeros(60)], np.r_[np.arange(40) % 4, np.arange(60)]),
    ],
)
def test_too_few_positives_negatives_or_users_are_not_judged(label, user):
    found = judged(CLICK, label, np.full(len(label), 0.999), user)
    assert found.ratio is None
    assert not out_of_bounds([found], RULE)
    (line,) = unsupported([found])
    assert f"{int(label.sum())} positive labels" in line
    assert "needed: 10 positives" in line


def test_ten_positives_are_enough_and_numbers_above_zero_are_positive():
    label = np.r_[np.ones(10), np.zeros(90)]
    assert judged(CLICK, label, np.full(100, 0.1), np.arange(100)).positives == 10
    assert judged(CLICK, label, np.full(100, 0.1), np.arange(100)).ratio is not None
    small = np.r_[np.full(30, 0.2), np.zeros(70)]
    found = judged(WATCH, small, np.full(100, 0.06))
    assert found.positives == 30
    assert found.ratio.value == pytest.approx(1.0)


def test_numbers_have_a_ratio_and_no_shift():
    seconds = np.tile([0.0, 30.0], 40)
    found = judged(WATCH, seconds, np.full(80, 5.0))
    assert found.ratio.value == pytest.approx(1 / 3)
    assert found.shift is None
    assert len(out_of_bounds([found], RULE)) == 1
    assert judged(WATCH, seconds - 1, np.full(80, 5.0)).ratio is None
