"""The multi-task gain, paired, with its verdict; correlation between labels with gaps."""

from __future__ import annotations

import numpy as np
import pytest

from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import ONE_SEED, model_quality
from mtl_ranker.evaluation.sharing import label_correlation, sharing_gains, without_verdict


@pytest.fixture
def qualities():
    """Three models with `seeds` trainings each; more noise is a worse model."""
    rng = np.random.default_rng(0)
    taste = rng.normal(size=4_000)
    label = (rng.random(4_000) < 1 / (1 + np.exp(-taste))).astype(float)
    rows = LabelledRows.of("binary", label, Clusters.of(np.repeat(np.arange(400), 10)))
    noise = {
        ("alone", "click"): 2.0,
        ("alone", "like"): 0.01,
        ("mmoe", "click"): 0.01,
        ("mmoe", "like"): 2.0,
        ("omoe", "click"): 2.0,
        ("omoe", "like"): 0.01,
    }

    def of(seeds: int):
        return {
            key: model_quality(
                rows, [taste + amount * rng.normal(size=4_000) for _ in range(seeds)]
            )
            for key, amount in noise.items()
        }

    return of


def test_help_and_hurt_are_distinguished_from_noise(qualities):
    found = qualities(3)
    gains = sharing_gains(found, "alone", 0.95)
    gain_of = {(g.model, g.objective): g for g in gains}
    assert len(gains) == 4
    assert gain_of["mmoe", "click"].verdict == "helped"
    assert gain_of["mmoe", "like"].verdict == "hurt"
    assert gain_of["omoe", "click"].verdict == "undecided"
    assert gain_of["omoe", "like"].verdict == "undecided"
    assert "sharing hurt (negative transfer) like, AUC -0." in str(gain_of["mmoe", "like"])
    expected = found["mmoe", "click"].value - found["alone", "click"].value
    assert gain_of["mmoe", "click"].gain.value == pytest.approx(expected)
    assert without_verdict(gains) == []


def test_one_seed_gives_an_interval_and_no_verdict(qualities):
    gains = sharing_gains(qualities(1), "alone", 0.95)
    assert all(g.verdict == "undecided" and g.note == ONE_SEED for g in gains)
    assert gains[0].gain.low > 0  # over users the gain is certain
    assert without_verdict(gains) == [f"mmoe, omoe on click, like: {ONE_SEED}"]


def test_no_verdict_on_or_against_a_model_that_was_still_improving(qualities):
    reason = "no verdict: the best epoch of alone is its last (4); raise training.epochs"
    gains = sharing_gains(qualities(3), "alone", 0.95, {("alone", "click"): reason})
    by_key = {(g.model, g.objective): g for g in gains}
    assert by_key["mmoe", "click"].verdict == "undecided"
    assert reason in str(by_key["mmoe", "click"])
    assert by_key["mmoe", "like"].verdict == "hurt"


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
