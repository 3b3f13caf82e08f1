"""The simulated feed: reproducible, with labels that follow the true probabilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from mtl_ranker.logs.simulate import EXAMINATION, Feed, make_world, simulate, world_on
from tests.conftest import FIRST


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}


def test_same_seed_same_bytes_and_other_seed_other_bytes(tmp_path):
    feed = Feed(impressions=2_000, days=2, users=100, items=80)
    one = all_bytes(simulate(feed, tmp_path / "a"))
    two = all_bytes(simulate(feed, tmp_path / "b"))
    assert one == two
    other = Feed(impressions=2_000, days=2, users=100, items=80, seed=1)
    assert all_bytes(simulate(other, tmp_path / "c")) != one


def test_labels_follow_the_true_probabilities(feed):
    log = pl.read_parquet(feed / "log/**/*.parquet")
    truth = pl.read_parquet(feed / "truth/**/*.parquet")
    assert log.height == truth.height == 12_000
    expected = truth["click_probability"].to_numpy()
    spread = np.sqrt((expected * (1 - expected)).sum())
    assert abs(log["click"].sum() - expected.sum()) < 5 * spread
    assert log.filter(pl.col("like") == 1)["click"].min() == 1
    assert "click_probability" not in log.columns


def test_clickbait_raises_clicks_and_lowers_likes(feed):
    world = make_world(Feed(impressions=12_000, days=7, users=300, items=200, first_day=FIRST))
    log = pl.read_parquet(feed / "log/**/*.parquet")
    bait = log.with_columns(bait=pl.Series(world.item_clickbait[log["item"].to_numpy()] > 0))
    rate = (
        bait.group_by("bait")
        .agg(pl.col("click").mean(), pl.col("like").filter(pl.col("click") == 1).mean())
        .sort("bait")
    )
    assert rate["click"][1] > rate["click"][0]
    assert rate["like"][1] < rate["like"][0]


def test_position_bias_has_known_propensities(feed):
    log = pl.read_parquet(feed / "log/**/*.parquet")
    by_position = log.group_by("position").agg(pl.col("propensity").first(), pl.col("click").mean())
    by_position = by_position.sort("position")
    np.testing.assert_allclose(by_position["propensity"], EXAMINATION, rtol=1e-6)
    assert by_position["click"][0] > 1.5 * by_position["click"][9]


def test_items_appear_over_time(feed):
    items = pl.read_parquet(feed / "items.parquet")
    log = pl.read_parquet(feed / "log/**/*.parquet", hive_partitioning=True)
    joined = log.join(items, on="item")
    assert (joined["published"] <= joined["date"]).all()
    assert joined.filter(pl.col("published") == pl.col("date")).height > 0


def test_tastes_drift_by_a_random_walk():
    """Each day adds a step of the given deviation to the day before; without drift none does."""
    feed = Feed(impressions=100, days=4, users=2_000, items=50, drift=0.3)
    world = make_world(feed)
    tastes = [world_on(feed, world, day).user_taste for day in range(4)]
    assert (tastes[0] == world.user_taste).all()
    steps = np.diff(tastes, axis=0)
    np.testing.assert_allclose(steps.std((1, 2)), 0.3, rtol=0.03)
    assert abs(np.corrcoef(steps[0].ravel(), steps[1].ravel())[0, 1]) < 0.03
    assert (world_on(replace(feed, drift=0.0), world, 3).user_taste == world.user_taste).all()
