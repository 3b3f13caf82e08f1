"""The multi-task gain, paired, with its verdict; correlation between labels with gaps."""

from __future__ import annotations

import numpy as np

from mtl_ranker.evaluation.intervals import over_seeds, resampled_quality, user_draws
from mtl_ranker.evaluation.metrics import auc
from mtl_ranker.evaluation.sharing import label_correlation, sharing_gains


def feed():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(400), 10)
    taste = rng.normal(size=4_000)
    label = (rng.random(4_000) < 1 / (1 + np.exp(-taste))).astype(float)
    return users, label, taste, rng.normal(size=4_000)


def test_help_and_hurt_are_distinguished_from_noise():
    user, label, taste, noise = feed()
    scores = {
        ("alone", "click"): taste + 2 * noise,
        ("alone", "like"): taste,
        ("mmoe", "click"): taste,
        ("mmoe", "like"): taste + 2 * noise,
        ("omoe", "click"): taste + 2 * noise,
        ("omoe", "like"): taste + 0.001 * noise,
    }
    weights = user_draws(user, 200)
    values = {key: auc(label, score) for key, score in scores.items()}
    qualities = {k: resampled_quality("binary", label, [s], weights) for k, s in scores.items()}
    gains = sharing_gains(qualities, "alone", {"click": "auc", "like": "auc"}, 0.95)
    gain_of = {(g.model, g.objective): g for g in gains}
    assert len(gains) == 4
    assert gain_of["mmoe", "click"].verdict == "helped"
    assert gain_of["mmoe", "like"].verdict == "hurt"
    assert gain_of["omoe", "click"].verdict == "undecided"
    assert "sharing hurt (negative transfer) like, AUC -0." in str(gain_of["mmoe", "like"])
    expected = values["mmoe", "click"] - values["alone", "click"]
    assert abs(gain_of["mmoe", "click"].gain.value - expected) < 1e-12
    same = gain_of["omoe", "click"].gain
    assert same.low == same.high == 0


def test_seeds_are_resampled():
    draws = np.stack([np.full(2_000, 0.70), np.full(2_000, 0.72)])
    means = over_seeds(draws)
    np.testing.assert_allclose(np.unique(means.round(6)), [0.70, 0.71, 0.72])
    assert abs((means == 0.70).mean() - 0.25) < 0.05
    assert (over_seeds(draws[:1]) == 0.70).all()


def test_label_correlation_uses_rows_that_have_both():
    nan = np.nan
    labels = np.array([[1, 1, 0], [0, 0, 0], [1, nan, 0], [0, 1, 0], [1, 1, 0]], float)
    correlation = label_correlation(labels)
    complete = labels[[0, 1, 3, 4]]
    expected = np.corrcoef(complete[:, 0], complete[:, 1])[0, 1]
    np.testing.assert_allclose(correlation[0, 1], expected)
    assert correlation[1, 0] == correlation[0, 1]
    assert np.isnan(correlation[0, 2])
    np.testing.assert_allclose(np.diag(correlation), 1.0)
