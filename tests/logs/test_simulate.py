"""The simulated feed: reproducible, with labels that follow the true probabilities."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.respond import SimulatedFeed, respond
from mtl_ranker.logs.shop import Size, make_shop, write_streams
from mtl_ranker.logs.simulate import (
    CONTENT,
    EXAMINATION,
    Delay,
    Feed,
    make_world,
    simulate,
    world_on,
)
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


def test_streams_are_the_joined_log_with_delays(tmp_path):
    """Impressions, answers and truth are the same; each action lies on the day it happens."""
    feed = Feed(impressions=20_000, days=4, users=200, items=100, first_day=FIRST)
    one = simulate(feed, tmp_path / "joined")
    two = simulate(replace(feed, streams=True), tmp_path / "streams")
    log = pl.read_parquet(one / "log/**/*.parquet", hive_partitioning=True)
    shown = pl.read_parquet(two / "impressions/**/*.parquet", hive_partitioning=True)
    labels = ["click", "watch_seconds", "like"]
    assert shown.drop("impression_id").equals(log.drop(labels))
    assert shown["impression_id"].is_unique().all()
    truth = pl.read_parquet(two / "truth/**/*.parquet")
    assert truth.select("click", "like").equals(log.select("click", "like"))
    found = shown.with_columns(log.select(labels))
    for folder, label in (("clicks", "click"), ("watches", "click"), ("likes", "like")):
        assert len(list((two / folder).glob("date=*/*.parquet"))) >= 4
        acted = pl.read_parquet(two / folder / "**/*.parquet", hive_partitioning=True)
        assert (pl.from_epoch(acted["at_ms"], "ms").dt.date() == acted["date"]).all()
        rows = found.filter(pl.col(label) > 0)
        joined = rows.join(acted, on=["impression_id", "user", "item"], how="left", suffix=" own")
        end = pl.lit(FIRST + timedelta(days=4)).cast(pl.Datetime("ms")).to_physical()
        late = joined.filter(pl.col("at_ms").is_null())
        assert (late.select(end - pl.col("shown_at_ms")).to_series() < 72 * 3_600_000).all()
        known = joined.filter(pl.col("at_ms").is_not_null())
        assert (known["at_ms"] >= known["shown_at_ms"]).all()
        assert known.height == acted.height
    assert (known["date own"] > known["date"]).any()


def test_users_of_streams_are_in_the_snapshots_from_the_day_they_join(tmp_path):
    feed = Feed(impressions=200, days=4, users=400, items=20, first_day=FIRST)
    users = pl.read_parquet(simulate(feed, tmp_path / "joined") / "users.parquet")
    streams = simulate(replace(feed, streams=True), tmp_path / "streams")
    assert not (streams / "users.parquet").exists()
    joins = make_world(feed).user_joins
    for day in range(-1, 4):
        file = streams / f"users/date={FIRST + timedelta(days=day)}/part-0.parquet"
        found = dict(pl.read_parquet(file).select("user", "joined_days").rows())
        before = dict(users.select("user", "joined_days").rows())
        expected = {
            user: before[user] + day - joins[user]
            for user in range(400)
            if joins[user] <= max(day, 0)
        }
        assert found == expected
    assert len(expected) > sum(joins == 0)
    assert min(expected.values()) == 0


def test_the_shops_items_have_embeddings_of_their_category(tmp_path):
    """Vectors of one category are nearer to each other than to others; some are missing."""
    write_streams(make_shop(Size(30_000, days=2, delayed=True)), tmp_path, 0)
    items = pl.read_parquet(tmp_path / "items.parquet")
    assert 0 < items["content"].null_count() < items.height / 8
    known = items.drop_nulls("content")
    vectors = np.array(known["content"].to_list())
    assert vectors.shape == (known.height, CONTENT)
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    kinds = known["category"].to_numpy()
    same = (kinds[:, None] == kinds[None]) & ~np.eye(len(kinds), dtype=bool)
    assert distance[same].mean() < 0.95 * distance[kinds[:, None] != kinds[None]].mean()


def test_delays_follow_their_distribution():
    """Kolmogorov and Smirnov's distance to F is below its 99.9 % quantile, and F ends at 1."""
    delay = Delay(mean=24.0, most=72.0)
    hours = np.sort(delay.draw(np.random.default_rng(0), 20_000)) / 3_600_000
    expected = np.array([delay.share(h) for h in hours])
    steps = np.arange(len(hours)) / len(hours)
    assert np.abs(expected - steps).max() < 1.95 / len(hours) ** 0.5
    assert (delay.share(0.0), delay.share(72.0), delay.share(100.0)) == (0.0, 1.0, 1.0)
    assert delay.share(24.0) == pytest.approx((1 - np.exp(-1)) / (1 - np.exp(-3)))


def test_a_feed_of_streams_answers_no_ranking(tmp_path):
    SimulatedFeed(Feed(streams=True)).save(tmp_path)
    with pytest.raises(ProjectError, match="a feed of streams, to which no answers can be added"):
        respond(tmp_path, tmp_path / "rankings/date=2026-03-20")
