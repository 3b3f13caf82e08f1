"""Calibration against scikit-learn, and calibration errors on new rows."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from mtl_ranker.config import Calibrating
from mtl_ranker.evaluation.metrics import auc, ece
from mtl_ranker.models.objectives import Task
from mtl_ranker.ranking.calibration import (
    Calibration,
    Map,
    fit_calibration,
    isotonic,
    platt,
    shifted,
)

CLICK, LIKE = Task("click", "binary"), Task("like", "binary", conditional_on="click")


def rows(seed: int, count: int = 6_000, slope: float = 2.0, shift: float = -1.0):
    """True probabilities, labels drawn from them, and over-confident predictions."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-1.0, 1.0, count)
    label = (rng.random(count) < 1 / (1 + np.exp(-z))).astype(np.float64)
    return label, 1 / (1 + np.exp(-(slope * z + shift)))


def test_platt_recovers_the_line_that_distorted_the_log_odds():
    label, wrong = rows(0, 60_000)
    line = platt(label, wrong)
    slope = line.y[1] - line.y[0]
    assert slope == pytest.approx(1 / 2.0, abs=0.03)
    assert line.y[0] == pytest.approx(1 / 2.0, abs=0.05)  # z = (wrong + 1) / 2


def test_isotonic_agrees_with_scikit_learn_at_its_own_thresholds():
    label, wrong = rows(1)
    fitted = isotonic(label, wrong)
    model = IsotonicRegression(y_min=0.5 / len(label), y_max=1 - 0.5 / len(label)).fit(wrong, label)
    np.testing.assert_allclose(
        fitted(model.X_thresholds_), model.predict(model.X_thresholds_), atol=1e-6
    )


def by_surface(method: str) -> Calibrating:
    return Calibrating(method=method, by="surface")


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_calibration_reduces_the_error_on_new_rows_and_keeps_the_order(method):
    label, wrong = rows(2)
    fitted = fit_calibration([CLICK], label[:, None], wrong[:, None], Calibrating(method=method))
    label, wrong = rows(3)
    right = fitted.apply(["click"], wrong[:, None], None)[:, 0]
    assert ece(label, right) < 0.02 < 0.1 < ece(label, wrong)
    assert auc(label, right) == pytest.approx(auc(label, wrong), abs=2e-3)


def test_a_surface_with_enough_rows_has_its_own_map_and_the_others_share_one():
    one, other = rows(4), rows(5, shift=2.0)
    label, wrong = np.r_[one[0], other[0]][:, None], np.r_[one[1], other[1]][:, None]
    surface = pl.Series(["home"] * 6_000 + ["search"] * 5_990 + ["rare"] * 10)
    fitted = fit_calibration([CLICK], label, wrong, by_surface("platt"), surface)
    assert sorted(fitted.surfaces["click"]) == ["home", "search"]
    right = fitted.apply(["click"], wrong, surface)
    home, search, rare = (surface == s for s in ("home", "search", "rare"))
    for part in (home.to_numpy(), search.to_numpy()):
        assert ece(label[part, 0], right[part, 0]) < 0.02
    general = fitted.everywhere["click"](wrong[rare.to_numpy(), 0])
    np.testing.assert_allclose(right[rare.to_numpy(), 0], general, rtol=1e-5)
    unknown = fitted.apply(["click"], wrong[:3], pl.Series([None, "new", None], dtype=pl.String))
    np.testing.assert_allclose(unknown[:, 0], fitted.everywhere["click"](wrong[:3, 0]), rtol=1e-5)


def test_an_objective_with_too_few_positives_or_labels_is_not_calibrated():
    label, wrong = rows(6)
    few = np.where(np.cumsum(label) > 49, np.nan, label)
    labels = np.stack([label, few], 1)
    fitted = fit_calibration(
        [CLICK, Task("rare", "binary")],
        labels,
        np.stack([wrong] * 2, 1),
        Calibrating(method="platt"),
    )
    assert list(fitted.everywhere) == ["click"]
    calibrated = fitted.apply(["click", "rare"], np.stack([wrong] * 2, 1), None)
    np.testing.assert_allclose(calibrated[:, 1], wrong, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1_000), st.sampled_from(["platt", "isotonic"]))
def test_a_chained_objective_never_exceeds_its_parent(seed, method):
    click, p = rows(seed, 800)
    like, q = rows(seed + 1, 800)
    fitted = fit_calibration(
        [CLICK, LIKE],
        np.stack([click, like * click], 1),
        np.stack([p, p * q], 1),
        Calibrating(method=method),
    )
    calibrated = fitted.apply(["click", "like"], np.stack([p, p * q], 1), None)
    assert (calibrated[:, 1] <= calibrated[:, 0]).all()
    assert ((calibrated >= 0) & (calibrated <= 1)).all()


def test_saved_and_loaded_maps_are_the_same(tmp_path):
    label, wrong = rows(7)
    surface = pl.Series([1, 2] * 3_000)
    fitted = fit_calibration(
        [CLICK], label[:, None], wrong[:, None], Calibrating(method="isotonic", by="tab"), surface
    )
    fitted.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == fitted


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_a_part_of_a_map_interpolates_log_odds_and_keeps_the_order(method):
    one, other = rows(6), rows(7, shift=2.0)
    label, wrong = np.r_[one[0], other[0]][:, None], np.r_[one[1], other[1]][:, None]
    surface = pl.Series(["home"] * 6_000 + ["search"] * 6_000)
    fitted = fit_calibration([CLICK], label, wrong, by_surface(method), surface)
    before, after = (np.log(p / (1 - p)) for p in (wrong, fitted.apply(["click"], wrong, surface)))
    inside = np.abs(before[:, 0]) < 2.0  # an isotonic map is constant beyond its ends
    for share in (0.0, 0.25, 1.0):
        part = fitted.part(share).apply(["click"], wrong, surface)
        expected = (1 - share) * before + share * after
        np.testing.assert_allclose(
            np.log(part / (1 - part))[inside], expected[inside], rtol=1e-3, atol=1e-3
        )
        home = part[:6_000, 0][np.argsort(wrong[:6_000, 0])]
        assert (np.diff(home) >= 0).all()


def test_platt_with_a_negative_slope_predicts_the_base_rate():
    """Predictions that order rows the wrong way: the slope is almost 0, the mean is kept."""
    rng = np.random.default_rng(8)
    z = rng.normal(-4.0, 1.0, 20_000)
    label = (rng.random(len(z)) < 1 / (1 + np.exp(-(-8.0 - z)))).astype(np.float64)
    wrong = 1 / (1 + np.exp(-z))
    fitted = platt(label, wrong)
    right = fitted(wrong)
    assert fitted.y[1] > fitted.y[0]
    assert right.mean() == pytest.approx(label.mean(), rel=1e-6)
    assert right.max() / right.min() < 1.02
    base = np.log(label.mean() / (1 - label.mean()))
    assert fitted(np.array([0.5]))[0] == pytest.approx(1 / (1 + np.exp(-base)), rel=0.02)


LOGS = Task("watch", "regression", transform="log1p")
WATCH = Task("watch", "watch_time")
LINEAR = Task("value", "regression")
STARS = Task("stars", "ordinal", levels=5)


def test_shifts_by_hand():
    y, p = np.array([0.0, 2.0, 7.0]), np.array([0.0, 1.0, 2.0])
    logs = shifted(LOGS, y, p)  # factor (1 + 3 + 8) / (1 + 2 + 3) = 2 of 1 + p
    assert logs(np.array([0.0, 1.0, 9.0])) == pytest.approx([1.0, 3.0, 19.0])
    watch = shifted(WATCH, y, np.array([1.0, 1.0, 4.0]))  # factor 9 / 6
    assert watch(np.array([2.0, 4.0])) == pytest.approx([3.0, 6.0])
    linear = shifted(LINEAR, -y, p)  # mean residual -3 - 1
    assert linear(np.array([0.0, -1.0])) == pytest.approx([-4.0, -5.0])
    stars = shifted(STARS, np.array([4.0, 2.0]), np.array([1.0, 1.0]))
    # Three quarters of the highest level instead of one: odds 3 instead of 1/3.
    assert stars(np.array([1.0, 2.0])) == pytest.approx([3.0, 4 * 9 / 10])


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_log1p_regression_predicts_the_mean_of_a_lognormal(method):
    """E[1 + y] = exp(m + v / 2): the prediction expm1(m) alone is too low by exp(v / 2)."""
    rng = np.random.default_rng(9)
    m = rng.normal(2.0, 0.5, 40_000)
    y, p = np.expm1(m + rng.normal(0, 0.7, len(m))), np.expm1(m)
    mean = np.exp(m + 0.7**2 / 2) - 1
    assert p.sum() / mean.sum() < 0.8
    fitted = fit_calibration([LOGS], y[:, None], p[:, None], Calibrating(method=method))
    right = fitted.apply(["watch"], p[:, None], None)[:, 0]
    assert right.sum() / mean.sum() == pytest.approx(1.0, abs=0.02)
    middle = np.abs(m - 2.0) < 0.7
    np.testing.assert_allclose(right[middle], mean[middle], rtol=0.15)


KINDS = st.sampled_from([LOGS, WATCH, LINEAR, STARS])


@settings(max_examples=40, deadline=None)
@given(KINDS, st.integers(0, 1_000), st.sampled_from(["platt", "isotonic"]))
def test_the_mean_prediction_is_the_mean_label_for_every_kind(task, seed, method):
    rng = np.random.default_rng(seed)
    top = task.levels - 1 if task.levels else np.inf
    p = np.minimum(rng.gamma(1.0, 1.5, 300) + 0.01, top - 0.1)
    y = np.minimum(np.floor(rng.gamma(2.0, 1.5, 300)), top)
    fitted = fit_calibration([task], y[:, None], p[:, None], Calibrating(method=method))
    right = fitted.apply([task.name], p[:, None], None)[:, 0]
    clipped = (right == 0).any()  # a factor below 1 would give predictions below 0
    assert right.mean() == pytest.approx(y.mean(), rel=0.05 if clipped else 1e-4)
    assert (np.diff(right[np.argsort(p)]) >= -1e-6).all()
    assert (right <= top).all()
    if task is not LINEAR:
        assert (right >= 0).all()


def test_a_number_with_too_few_labels_other_than_0_is_not_calibrated():
    y = np.r_[np.ones(49), np.zeros(951)][:, None]
    assert fit_calibration([WATCH], y, y + 1, Calibrating()).everywhere == {}
    y[49] = 1.0
    assert list(fit_calibration([WATCH], y, y + 1, Calibrating()).everywhere) == ["watch"]


def test_maps_of_earlier_versions_are_of_probabilities(tmp_path):
    """Their files name no scale, and have no maps of numbers."""
    old = {
        "by": None,
        "everywhere": {"click": {"x": [0.0, 1.0], "y": [0.5, 2.5], "straight": True}},
        "surfaces": {},
        "after": {},
    }
    (tmp_path / "calibration.json").write_text(json.dumps(old), "utf-8")
    loaded = Calibration.load(tmp_path / "calibration.json")
    assert loaded.everywhere["click"] == Map([0.0, 1.0], [0.5, 2.5], straight=True)
    values = loaded.apply(["click", "watch"], np.array([[0.5, 7.25]]), None)
    assert values[0].tolist() == pytest.approx([1 / (1 + np.exp(-0.5)), 7.25])


def test_a_part_of_a_calibration_keeps_the_maps_of_numbers():
    """Half a smearing factor would leave half of the transform's bias."""
    line = Map([0.0, 1.0], [1.0, 3.0], straight=True)
    factor = Map([0.0, 1.0], [0.5, 1.5], straight=True, scale="log1p")
    levels = Map([0.0, 1.0], [0.5, 1.5], straight=True, top=4.0)
    fitted = Calibration(everywhere={"click": line, "watch": factor, "stars": levels})
    part = fitted.part(0.5).everywhere
    assert part["click"].y == [0.5, 2.0]
    assert (part["watch"], part["stars"]) == (factor, levels)
