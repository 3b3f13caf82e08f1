"""Off-policy estimates against the truth of a simulated world, and their refusals."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from mtl_ranker.evaluation.off_policy import estimate, position_weights, random_weights


def test_ips_and_snips_by_hand():
    reward = np.array([1.0, 0.0, 1.0, 1.0] * 30)
    weight = np.array([2.0, 1.0, 0.5, 0.0] * 30)
    found = estimate("click", "test", reward, weight, np.arange(120), min_support=10)
    assert found.ips.value == pytest.approx(2.5 / 4)
    assert found.snips.value == pytest.approx(2.5 / 3.5)
    assert found.support == pytest.approx(30 * 3.5**2 / (4 + 1 + 0.25))
    assert found.logged == pytest.approx(0.75)
    assert found.snips.low < found.snips.value < found.snips.high


def test_thin_support_is_refused_in_words():
    reward, weight = np.ones(1_000), np.full(1_000, 1e-6)
    weight[0] = 100.0
    found = estimate("click", "test", reward, weight, np.arange(1_000), min_support=50)
    assert found.ips is None
    assert found.snips is None
    assert "no estimate, support too thin: effective rows 1" in str(found)
    few = estimate(
        "like",
        "test",
        np.r_[np.ones(9), np.zeros(991)],
        np.ones(1_000),
        np.arange(1_000),
        min_support=50,
    )
    assert "9 rows with a reward" in str(few)


def slates(lists: int, seed: int):
    """Lists of five with examination 1/position; relevance is known, clicks need examination."""
    rng = np.random.default_rng(seed)
    relevance = rng.random((lists, 5))
    look = 1.0 / np.arange(1, 6)
    click = rng.random((lists, 5)) < relevance * look
    frame = pl.DataFrame(
        {
            "user_id": np.arange(lists).repeat(5) // 3,
            "timestamp": np.arange(lists * 5),
            "position": np.tile(np.arange(1, 6), lists),
            "propensity": np.tile(look, lists),
        }
    )
    return frame, relevance, click, look


def test_position_weights_recover_the_value_of_the_order_by_relevance():
    """The estimate from logged clicks meets what that order truly gives."""
    frame, relevance, click, look = slates(20_000, 0)
    weight = position_weights(frame, relevance.ravel())
    found = estimate(
        "click", "p", click.ravel().astype(float), weight, frame["user_id"].to_numpy(), 100
    )
    truth = (np.sort(relevance, 1)[:, ::-1] * look).sum(1).mean() / 5
    assert truth > click.mean() + 0.02
    assert found.ips.value == pytest.approx(truth, abs=0.005)
    assert found.ips.low < truth < found.ips.high


def test_an_order_that_keeps_every_position_has_weight_one_in_any_row_order():
    frame, _, _, _ = slates(50, 1)
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=3)
    score = -shuffled["position"].to_numpy().astype(float)
    np.testing.assert_allclose(position_weights(shuffled, score), 1.0)


def test_random_exposure_values_the_best_share_of_random_rows_only():
    rng = np.random.default_rng(0)
    score = rng.random(20_000)
    random = rng.random(20_000) < 0.5
    reward = (rng.random(20_000) < score).astype(float)
    weight = random_weights(random, score, keep=0.2)
    assert (weight[~random] == 0).all()
    found = estimate("click", "r", reward[random], weight[random], np.arange(random.sum()), 100)
    assert found.snips.value == pytest.approx(0.9, abs=0.02)  # mean of the best fifth
    assert (random_weights(np.zeros(10, bool), score[:10], 0.2) == 0).all()


def test_reordered_lists_have_no_self_normalised_value_but_a_mean_per_click():
    """Weights of positions do not average 1; what is known only of clicks is a mean over them."""
    frame, relevance, click, look = slates(20_000, 2)
    order = relevance.ravel()
    weight = position_weights(frame, order)
    user = frame["user_id"].to_numpy()
    clicked = click.ravel().astype(float)
    whole = estimate("click", "p", clicked, weight, user, 100, shares=False)
    assert whole.snips is None
    assert "SNIPS" not in str(whole)
    # Each click is worth the row's relevance; unclicked rows have no such label.
    worth = np.where(clicked == 1, order, np.nan)
    per_click = estimate("worth", "p", worth, weight, user, 100, shares=False)
    assert per_click.ips is None
    ranked = np.sort(relevance, 1)[:, ::-1]
    truth = (ranked * ranked * look).sum() / (ranked * look).sum()
    assert per_click.snips.value == pytest.approx(truth, abs=0.01)
    assert truth > np.nanmean(worth) + 0.02
