"""Influences against derivatives, DeLong by hand and a bootstrap; verdicts and their laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from mtl_ranker.evaluation.influence import LEAST, MEASURES, Clusters, LabelledRows, Support
from mtl_ranker.evaluation.intervals import (
    NO_VARIANCE,
    ONE_SEED,
    SMALLEST,
    Estimated,
    Part,
    compare,
    judge,
    mean_interval,
    model_quality,
    pooled_spread,
    weighted_mean,
)
from mtl_ranker.evaluation.metrics import auc_of_own_group

ENOUGH = Support(rows=1_000, users=1_001, what="positives")
ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 4)), min_size=2)


@pytest.fixture(scope="module")
def feed():
    """Labels, predictions of two models and users of 1,500 rows, correlated within users."""
    rng = np.random.default_rng(0)
    user = rng.integers(0, 150, 1_500)
    taste = rng.normal(size=150)[user] + rng.normal(size=1_500)
    label = (rng.random(1_500) < 1 / (1 + np.exp(1 - taste))).astype(float)
    one = 1 / (1 + np.exp(1 - taste - 0.3 * rng.normal(size=1_500)))
    other = 1 / (1 + np.exp(1 - taste - 1.0 * rng.normal(size=1_500)))
    return label, one.round(2), other.round(2), user


def lists_of(user):
    """Each user's rows dealt to up to three lists."""
    return 3 * user + np.arange(len(user)) % 3


def weighted_values(label, prediction, user, weight):
    """Every measure with weights [U] of users, by its definition."""
    w = weight[user]
    rate = np.average(label, weights=w)
    p = np.clip(prediction, 1e-7, 1 - 1e-7)
    loss = -np.average(np.where(label > 0.5, np.log(p), np.log(1 - p)), weights=w)
    own = auc_of_own_group(label, prediction, lists_of(user))
    known = ~np.isnan(own)
    return {
        "auc": roc_auc_score(label, prediction, sample_weight=w),
        "gauc": np.average(own[known], weights=w[known]),
        "r2": 1 - (w @ (label - prediction) ** 2) / (w @ (label - rate) ** 2),
        "log_loss": loss,
        "skill": 1 + loss / (rate * np.log(rate) + (1 - rate) * np.log(1 - rate)),
        "calibration": (w @ prediction) / (w @ label),
    }


def test_delong_by_hand():
    """Positives score 3, 5, 2 and negatives 1, 4, 2; every row is a user.

    V10 = 2/3, 1, 1/2 and V01 = 1, 1/3, 5/6 with mean 13/18 and variances 21/324 and 39/324, so the
    variance is (21 + 39) / 324 / 3.
    """
    label, score = np.array([1.0, 1, 1, 0, 0, 0]), np.array([3.0, 5, 2, 1, 4, 2])
    found = MEASURES["auc"](label, score, Clusters.of(np.arange(6)))
    assert found.value == pytest.approx(13 / 18)
    assert (found.by_user**2).sum() == pytest.approx(60 / 972)


@pytest.mark.parametrize("measure", MEASURES)
def test_influence_is_the_derivative_by_a_users_weight(feed, measure):
    label, one, _, user = feed
    found = MEASURES[measure](label, one, Clusters.of(user, lists_of(user)))
    whole = weighted_values(label, one, user, np.ones(150))[measure]
    assert found.value == pytest.approx(whole)
    step = 1e-4
    for u in (0, 7, 101):
        weight = np.ones(150)
        weight[u] += step
        slope = (weighted_values(label, one, user, weight)[measure] - whole) / step
        assert found.by_user[u] == pytest.approx(slope, rel=0.02, abs=1e-7)


def test_standard_errors_agree_with_a_bootstrap_over_users(feed):
    label, one, other, user = feed
    rows = LabelledRows.of("binary", label, Clusters.of(user, lists_of(user)))
    rng = np.random.default_rng(1)
    draws = []
    for _ in range(150):
        weight = np.bincount(rng.integers(0, 150, 150), minlength=150).astype(float)
        a = weighted_values(label, one, user, weight)
        b = weighted_values(label, other, user, weight)
        draws.append([[a[m], a[m] - b[m]] for m in MEASURES])
    expected = np.std(draws, 0)
    for m, (alone, difference) in zip(MEASURES, expected, strict=True):
        a, b = (model_quality(rows, [p], m, fixed=True) for p in (one, other))
        # 150 draws give a standard error with a standard error of 6 %.
        assert a.estimated().standard_error == pytest.approx(alone, rel=0.2)
        assert compare(a, b).standard_error == pytest.approx(difference, rel=0.2)


@given(ROWS)
def test_auc_and_its_influence_are_invariant_under_monotone_transforms(rows):
    label, score, user = (np.array(column, float) for column in zip(*rows, strict=True))
    clusters = Clusters.of(user)
    one = MEASURES["auc"](label, score, clusters)
    other = MEASURES["auc"](label, np.exp(score) - 7, clusters)
    if 0 < label.sum() < len(label):
        assert one.value == pytest.approx(roc_auc_score(label, score))
        np.testing.assert_allclose(one.by_user, other.by_user, atol=1e-15)
        assert one.by_user.sum() == pytest.approx(0, abs=1e-9) or len(set(user)) < 3
    else:
        assert np.isnan(one.value)


def test_a_model_differs_from_itself_by_nothing_and_swapping_changes_the_sign(feed):
    label, one, other, user = feed
    rows = LabelledRows.of("binary", label, Clusters.of(user))
    rng = np.random.default_rng(2)
    noisy = [[p + 0.02 * rng.normal(size=1_500) for _ in range(3)] for p in (one, other)]
    a, b = (model_quality(rows, trainings) for trainings in noisy)
    same = compare(a, model_quality(rows, noisy[0]))
    assert (same.value, same.users.variance) == (0.0, 0.0)
    assert same.p_value == 1.0
    forth, back = compare(a, b), compare(b, a)
    assert forth.value == -back.value
    assert forth.p_value == pytest.approx(back.p_value)
    there, again = forth.interval(), back.interval()
    assert (there.low, there.high) == pytest.approx((-again.high, -again.low))


def test_without_variance_over_users_it_is_welchs_test():
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.7, 0.01, 3), rng.normal(0.68, 0.03, 5)
    a, b = (_trained(values) for values in (one, other))
    expected = stats.ttest_ind(one, other, equal_var=False)
    bounds = expected.confidence_interval(0.9)
    found = compare(a, b)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.interval(0.9).low, found.interval(0.9).high) == pytest.approx(tuple(bounds))


def test_without_variance_over_seeds_it_is_students_test_over_users():
    rng = np.random.default_rng(0)
    value = rng.normal(0.4, 1.0, 40)
    rows = LabelledRows.of("regression", value, Clusters.of(np.arange(40)))
    quality = model_quality(rows, [np.zeros(40)], "log_loss", fixed=True)
    by_user = (value - value.mean()) / 40 * np.sqrt(40 / 39)
    found = replace(quality, value=float(value.mean()), influence=by_user).estimated()
    expected = stats.ttest_1samp(value, 0.0)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.interval().low == pytest.approx(expected.confidence_interval(0.95).low)


@given(
    value=st.floats(0.001, 3.0),
    users=st.floats(1e-4, 1.0),
    seeds=st.floats(1e-4, 1.0),
    df=st.integers(1, 9),
)
def test_the_interval_excludes_zero_at_the_p_value(value, users, seeds, df):
    found = Estimated(value, Part(users, 50), Part(seeds, df), ENOUGH)
    p = found.p_value
    if 1e-8 < p < 0.999:  # 1 - p is not exact for smaller ones
        assert found.interval(1 - p).low == pytest.approx(0.0, abs=1e-6 * max(1, value))


def test_a_difference_of_many_standard_errors_has_the_smallest_p_value():
    """Seeds that hardly differ have a level of their own far above that of users."""
    found = Estimated(60.0, Part(1.0, np.inf), Part(1e-200, 2), ENOUGH)
    assert found.p_value == SMALLEST
    assert replace(found, value=3.0).p_value == pytest.approx(2 * stats.norm.sf(3.0))


@pytest.fixture(scope="module")
def nights():
    """120 draws of 40 users: measure → [120, 4] of value and error, alone and of a difference."""
    found = {measure: [] for measure in MEASURES}
    for night in range(120):
        rng = np.random.default_rng(night)
        user = np.repeat(np.arange(40), 16)
        lists = np.repeat(np.arange(80), 8)
        x = rng.normal(size=(640, 2)) + 0.5 * rng.normal(size=(40, 2))[user]
        level = 0.5 * rng.normal(size=40)[user]
        label = (rng.random(640) < expit(x.sum(1) - 1 + level)).astype(float)
        rows = LabelledRows.of("binary", label, Clusters.of(user, lists))
        one, other = expit(x.sum(1) - 1), expit(1.5 * x[:, 0] - 1)
        for measure, values in found.items():
            a, b = (model_quality(rows, [p], measure, fixed=True) for p in (one, other))
            alone, difference = a.estimated(), compare(a, b)
            values.append(
                [alone.value, alone.standard_error, difference.value, difference.standard_error]
            )
    return {measure: np.array(values) for measure, values in found.items()}


@pytest.mark.parametrize("measure", MEASURES)
def test_errors_are_the_spread_over_repeated_nights(nights, measure):
    """Too narrow and too wide alike: 0.7 or 1.4 times the error is outside.

    The standard deviation of 120 values has a standard error of 6.5 %.
    """
    alone, error, difference, paired_error = nights[measure].T
    for values, errors in ((alone, error), (difference, paired_error)):
        ratio = np.sqrt((errors**2).mean()) / values.std(ddof=1)
        assert 0.83 < ratio < 1.2


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("share", [0.3, 3.0, 30.0])
def test_equal_models_are_called_different_in_at_most_five_percent(seeds, share):
    """`share`: variance over seeds by variance over users, of a difference of means."""
    rng = np.random.default_rng(0)
    spread = np.sqrt(share * seeds / 2)
    false = 0
    for _ in range(1_000):
        values = rng.normal(0, spread, (2, seeds))
        difference = values[0].mean() - values[1].mean() + rng.normal()
        trainings = compare(_trained(values[0]), _trained(values[1])).trainings
        found = Estimated(difference, Part(1.0, 1_000), trainings, ENOUGH).interval()
        false += not found.low < 0 < found.high
    assert false <= 67  # 5 % and 2.5 standard errors


def test_one_seed_has_an_interval_over_users_and_no_verdict(feed):
    label, one, other, user = feed
    rows = LabelledRows.of("binary", label, Clusters.of(user))
    a, b = (model_quality(rows, [p]) for p in (one, other))
    found = compare(a, b)
    assert found.note == ONE_SEED
    assert found.interval().low > 0
    assert judge({"click": found})["click"].verdict == 0
    known = judge({"click": compare(replace(a, trainings=None), replace(b, trainings=None))})
    assert known["click"].verdict == 1


def test_an_areas_interval_stays_within_its_range(feed):
    label, one, _, user = feed
    rows = LabelledRows.of("binary", label, Clusters.of(user))
    nearly = model_quality(rows, [label + 0.4 * one], fixed=True)
    shared = model_quality(rows, [np.where(user < 2, 1 - label, label)], fixed=True)
    assert (nearly.interval().low, nearly.interval().high) == (1.0, 1.0)
    found = shared.interval(0.999)
    assert 0.8 < found.low < shared.value < found.high < 1.0


def test_too_few_positives_have_no_interval_and_the_message_counts_them():
    rng = np.random.default_rng(0)
    user = np.arange(400)
    label = (user < LEAST - 1).astype(float)
    for labels, what in ((label, "positives"), (1 - label, "negatives")):
        rows = LabelledRows.of("binary", labels, Clusters.of(user))
        a, b = (model_quality(rows, [rng.random(400)] * 2) for _ in range(2))
        found = compare(a, b)
        assert np.isnan(found.interval().low)
        assert np.isnan(found.p_value)
        assert found.note == f"9 {what} of 9 users; it takes 10 of 10"
        assert judge({1: found})[1].verdict == 0
    enough = LabelledRows.of("binary", (user < LEAST).astype(float), Clusters.of(user))
    assert enough.support.enough


@pytest.mark.parametrize("measure", MEASURES)
def test_an_objective_without_labels_has_no_value_and_no_verdict(measure):
    users = np.arange(30)
    rows = LabelledRows.of("binary", np.full(30, np.nan), Clusters.of(users, users))
    found = compare(*(model_quality(rows, [np.full(30, p)], measure) for p in (0.1, 0.2)))
    assert np.isnan(found.value)
    where = " in lists with both labels" if measure == "gauc" else ""
    assert found.note == f"0 positives{where} of 0 users; it takes 10 of 10"
    assert judge({1: found})[1].verdict == 0


def test_models_are_compared_by_lists_where_enough_of_them_have_both_labels():
    """Ten users have a list of both labels each; the positives of 90 others are alone in a list."""
    user = np.r_[np.repeat(np.arange(10), 2), np.arange(10, 190)]
    label = np.r_[np.tile([1.0, 0.0], 10), np.arange(180) % 2.0]
    by_list = LabelledRows.of("binary", label, Clusters.of(user, user))
    assert by_list.measure == "gauc"
    assert by_list.list_support == Support(10, 10, "positives in lists with both labels")
    assert by_list.support.rows == 100
    score = np.r_[np.tile([0.9, 0.1], 9), 0.1, 0.9, np.random.default_rng(0).random(180)]
    found = model_quality(by_list, [score])
    assert (found.measure, found.value) == ("gauc", pytest.approx(0.9))
    assert found.support == by_list.list_support
    fewer = LabelledRows.of("binary", label[2:], Clusters.of(user[2:], user[2:]))
    assert fewer.measure == "auc"
    assert model_quality(fewer, [score[2:]]).value == pytest.approx(
        roc_auc_score(label[2:], score[2:])
    )
    assert LabelledRows.of("binary", label, Clusters.of(user)).measure == "auc"
    assert LabelledRows.of("regression", label, Clusters.of(user, user)).measure == "r2"
    with pytest.raises(ValueError, match="needs the list of each row"):
        model_quality(LabelledRows.of("binary", label, Clusters.of(user)), [score], "gauc")


def test_many_positives_of_one_user_are_no_support():
    label = np.r_[np.ones(100), np.zeros(100)]
    user = np.r_[np.zeros(100), np.arange(100)]
    found = LabelledRows.of("binary", label, Clusters.of(user)).support
    assert str(found) == "100 positives of 1 users; it takes 10 of 10"


def test_a_number_that_is_mostly_zero_is_supported_by_the_other_rows():
    label = np.zeros(300)
    label[:4] = [3.0, 8.0, 1.0, 2.0]
    found = LabelledRows.of("regression", label, Clusters.of(np.arange(300))).support
    assert (found.rows, found.users, found.enough) == (4, 4, False)


def test_missing_labels_are_left_out_and_users_stay_paired(feed):
    label, one, other, user = feed
    gaps = np.where(np.arange(1_500) % 3 == 0, np.nan, label)
    kept = ~np.isnan(gaps)
    clusters = Clusters.of(user)
    whole = compare(*_both(LabelledRows.of("binary", gaps, clusters), one, other))
    part = LabelledRows.of("binary", label[kept], clusters.where(kept))
    alone = compare(*_both(part, one[kept], other[kept]))
    assert (whole.value, whole.standard_error) == (alone.value, alone.standard_error)


def test_false_discoveries_are_controlled_over_a_table():
    """Benjamini & Hochberg by hand: 4 p-values, adjusted min over later of p · 4 / rank."""
    values = {"a": 0.01, "b": 0.02, "c": 0.045, "d": 0.5}
    compared = {k: _with_p(p) for k, p in values.items()}
    compared["one seed"] = replace(_with_p(1e-9), trainings=None)
    found = judge(compared)
    adjusted = [found[k].p_value for k in values]
    assert adjusted == pytest.approx([0.04, 0.04, 0.06, 0.5], rel=1e-6)
    assert [found[k].verdict for k in values] == [1, 1, 0, 0]
    assert found["c"].interval.low > 0  # alone it would be significant
    assert np.isnan(found["one seed"].p_value)


def test_a_mean_of_objectives_leaves_out_those_without_support(feed):
    label, one, _, user = feed
    clusters = Clusters.of(user)
    rng = np.random.default_rng(3)
    trainings = [one + 0.05 * rng.normal(size=1_500) for _ in range(3)]
    known = model_quality(LabelledRows.of("binary", label, clusters), trainings)
    square = model_quality(LabelledRows.of("regression", label, clusters), trainings)
    rare = LabelledRows.of("binary", (np.arange(1_500) == 3).astype(float), clusters)
    found = weighted_mean([(1.0, known), (3.0, square), (5.0, model_quality(rare, trainings))])
    assert found.value == pytest.approx(0.25 * known.value + 0.75 * square.value)
    by_seed = 0.25 * known.trainings + 0.75 * square.trainings
    assert found.spread().variance == pytest.approx(np.var(by_seed, ddof=1) / 3)
    nothing = weighted_mean([(5.0, model_quality(rare, trainings))])
    assert np.isnan(nothing.value)
    assert "1 positives of 1 users" in compare(nothing, nothing).note


def test_one_estimate_of_the_spread_counts_once():
    """Two models whose spread is taken from the same trainings have its degrees of freedom."""
    values = np.array([0.70, 0.71, 0.73])
    one, other = _trained(values, averaged=1), _trained(values, averaged=1)
    found = compare(one, other).trainings
    assert found == Part(pytest.approx(2 * np.var(values, ddof=1)), 2)


def test_the_spread_of_a_training_is_pooled_over_groups():
    """(2 · 1² + 2 · 3²) / (1 + 2); a group of one says nothing."""
    groups = [np.array([4.0, 6.0]), np.array([0.0, 3.0, 6.0]), np.array([9.0])]
    assert pooled_spread(groups) == Part(20 / 3, 3)
    assert pooled_spread(groups[2:]) is None


def test_mean_interval_is_students():
    values = np.array([0.1, 0.4, 0.3, 0.9])
    found = mean_interval(values, 0.9)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def _trained(values, averaged=None):
    """A quality that only varies with the seed."""
    rows = LabelledRows.of("binary", np.arange(40) % 2.0, Clusters.of(np.arange(40)))
    quality = model_quality(rows, [np.zeros(40)])
    return replace(
        quality,
        value=float(np.mean(values)),
        influence=np.zeros(40),
        trainings=np.asarray(values),
        averaged=averaged or len(values),
    )


def _both(rows, one, other):
    return [model_quality(rows, [p]) for p in (one, other)]


def _with_p(p):
    return Estimated(float(stats.norm.isf(p / 2)), Part(1.0, np.inf), NO_VARIANCE, ENOUGH)
