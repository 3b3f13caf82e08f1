"""Off-policy estimates against the known values of simulated rankings, and their refusals."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from mtl_ranker.evaluation.off_policy import (
    WeightedRewards,
    estimate,
    position_weights,
    random_weights,
)


def rewards(reward: np.ndarray, weight: np.ndarray, user: np.ndarray | None = None, **more):
    """Clicks of as many users as rows, unless given otherwise."""
    user = np.arange(len(reward)) if user is None else user
    content = {"objective": "click", "how": "test", "reward": reward, "weight": weight}
    return WeightedRewards(**content | {"user": user} | more)


def test_ips_and_snips_by_hand():
    reward = np.array([1.0, 0.0, 1.0, 1.0] * 30)
    weight = np.array([2.0, 1.0, 0.5, 0.0] * 30)
    result = estimate(rewards(reward, weight), min_support=10)
    assert result.ips.value == pytest.approx(2.5 / 4)
    assert result.snips.value == pytest.approx(2.5 / 3.5)
    assert result.support == pytest.approx(30 * 3.5**2 / (4 + 1 + 0.25))
    assert result.logged == pytest.approx(0.75)
    assert result.snips.low < result.snips.value < result.snips.high


def test_thin_support_is_refused_with_a_reason():
    reward, weight = np.ones(1_000), np.full(1_000, 1e-6)
    weight[0] = 100.0
    result = estimate(rewards(reward, weight), min_support=50)
    assert result.ips is None
    assert result.snips is None
    assert "no estimate, support too thin: effective rows 1" in str(result)
    few = rewards(np.r_[np.ones(9), np.zeros(991)], np.ones(1_000), objective="like")
    assert "9 rows with a reward" in str(estimate(few, min_support=50))


def slates(lists: int, seed: int):
    """Lists of five with examination 1/position; relevance is known, clicks need examination."""
    rng = np.random.default_rng(seed)
    relevance = rng.random((lists, 5))
    examination = 1.0 / np.arange(1, 6)
    click = rng.random((lists, 5)) < relevance * examination
    frame = pl.DataFrame(
        {
            "user_id": np.arange(lists).repeat(5) // 3,
            "timestamp": np.arange(lists * 5),
            "position": np.tile(np.arange(1, 6), lists),
            "propensity": np.tile(examination, lists),
        }
    )
    return frame, relevance, click, examination


def test_position_weights_recover_the_value_of_the_order_by_relevance():
    """The estimate from logged clicks agrees with the true value of that order."""
    frame, relevance, click, examination = slates(20_000, 0)
    weight = position_weights(frame, relevance.ravel())
    clicked, user = click.ravel().astype(float), frame["user_id"].to_numpy()
    result = estimate(rewards(clicked, weight, user), 100)
    truth = (np.sort(relevance, 1)[:, ::-1] * examination).sum(1).mean() / 5
    assert truth > click.mean() + 0.02
    assert result.ips.value == pytest.approx(truth, abs=0.005)
    assert result.ips.low < truth < result.ips.high


def test_an_order_that_keeps_every_position_has_weight_one_in_any_row_order():
    frame, _, _, _ = slates(50, 1)
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=3)
    score = -shuffled["position"].to_numpy().astype(float)
    np.testing.assert_allclose(position_weights(shuffled, score), 1.0)


def test_random_exposure_estimates_the_best_share_of_random_rows_only():
    rng = np.random.default_rng(0)
    score = rng.random(20_000)
    random = rng.random(20_000) < 0.5
    reward = (rng.random(20_000) < score).astype(float)
    weight = random_weights(random, score, keep=0.2)
    assert (weight[~random] == 0).all()
    result = estimate(rewards(reward[random], weight[random]), 100)
    assert result.snips.value == pytest.approx(0.9, abs=0.02)  # mean of the best fifth
    assert (random_weights(np.zeros(10, bool), score[:10], 0.2) == 0).all()


def test_reordered_lists_have_no_snips_except_for_labels_of_clicks():
    """Weights of positions do not average 1; a label of clicks only is averaged over clicks."""
    frame, relevance, click, examination = slates(20_000, 2)
    order = relevance.ravel()
    weight = position_weights(frame, order)
    user = frame["user_id"].to_numpy()
    clicked = click.ravel().astype(float)
    whole = estimate(rewards(clicked, weight, user, self_normalising=False), 100)
    assert whole.snips is None
    assert "SNIPS" not in str(whole)
    # The label of a click is the row's relevance; rows without a click have no label.
    value = np.where(clicked == 1, order, np.nan)
    per_click = estimate(rewards(value, weight, user, self_normalising=False), 100)
    assert per_click.ips is None
    ranked = np.sort(relevance, 1)[:, ::-1]
    truth = (ranked * ranked * examination).sum() / (ranked * examination).sum()
    assert per_click.snips.value == pytest.approx(truth, abs=0.01)
    assert truth > np.nanmean(value) + 0.02
