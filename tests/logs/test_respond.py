"""Simulated users answer a ranking: lists as ranked, labels by the truth, fatigue and returns."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.respond import (
    Behaviour,
    SimulatedFeed,
    presence,
    respond,
    visit_rates,
    world_on,
    write_candidates,
)
from mtl_ranker.logs.simulate import EXAMINATION, Feed, make_world, simulate, truth
from mtl_ranker.logs.simulate import world_on as feed_world_on

FIRST = date(2026, 3, 2)
FEED = Feed(impressions=9_000, days=4, users=150, items=120, first_day=FIRST, horizon=8)
DAY = FIRST + timedelta(days=4)


def made(folder: Path, behaviour: Behaviour) -> SimulatedFeed:
    simulate(FEED, folder)
    simulated = SimulatedFeed(FEED, behaviour, candidates=30)
    simulated.save(folder)
    return simulated


def ranking(folder: Path, day: date = DAY, length: int = 5, users: int = 140) -> Path:
    """The same items for every user, in an order of its own."""
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(20)[:length] for _ in range(users)])
    frame = pl.DataFrame(
        {
            "user_id": np.arange(users).repeat(length),
            "item_id": items.ravel(),
            "rank": np.tile(np.arange(1, length + 1), users),
            "propensity": np.full(users * length, 0.25),
        }
    )
    place = folder / f"rankings/date={day}"
    place.mkdir(parents=True)
    frame.sample(fraction=1.0, shuffle=True, seed=2).write_parquet(place / "part-0.parquet")
    return place


def test_lists_are_shown_as_ranked_and_labels_follow_the_truth(tmp_path):
    made(tmp_path, Behaviour(fatigue=0.0, drift=0.0))
    place = ranking(tmp_path)
    file = respond(tmp_path, place)
    log = pl.read_parquet(file)
    assert log.schema == pl.read_parquet(tmp_path / f"log/date={FIRST}/part-0.parquet").schema
    shown = log.filter(pl.col("user") < 140).sort("user", "shown_at_ms")
    expected = pl.read_parquet(place / "part-0.parquet").select(
        user=pl.col("user_id"), position=pl.col("rank").cast(pl.Int8), ranked=pl.col("item_id")
    )
    joined = shown.join(expected, on=["user", "position"])
    assert joined.height == shown.height > 500
    assert (joined["item"] == joined["ranked"]).all()
    # Visits are whole lists, one after the other.
    assert (shown["position"].to_numpy().reshape(-1, 5) == np.arange(1, 6)).all()
    assert (shown["list_propensity"] == 0.25).all()
    rest = log.filter(pl.col("user") >= 140)
    assert rest["position"].max() == 10
    assert rest["list_propensity"].to_numpy() == pytest.approx(0.1)
    hidden = pl.read_parquet(tmp_path / f"truth/date={DAY}/part-0.parquet")
    examined = EXAMINATION[log["position"].to_numpy() - 1]
    click, _, _ = truth(make_world(FEED), log["user"].to_numpy(), log["item"].to_numpy(), examined)
    np.testing.assert_allclose(hidden["click_probability"], click)
    spread = np.sqrt((click * (1 - click)).sum())
    assert abs(log["click"].sum() - click.sum()) < 4 * spread
    midnight = (DAY - date(1970, 1, 1)).days * 86_400_000
    assert log["shown_at_ms"].is_between(midnight, midnight + 86_399_999).all()
    assert log.select("user", "item", "shown_at_ms").is_duplicated().sum() == 0
    # The same ranking is answered the same.
    assert pl.read_parquet(respond(tmp_path, place / "part-0.parquet")).equals(log)


def test_repeated_items_tire_and_the_next_day_has_candidates(tmp_path):
    simulated = made(tmp_path, Behaviour(fatigue=0.5, drift=0.0))
    respond(tmp_path, ranking(tmp_path))
    log = pl.read_parquet(tmp_path / f"log/date={DAY}/part-0.parquet")
    hidden = pl.read_parquet(tmp_path / f"truth/date={DAY}/part-0.parquet")
    days = [DAY - timedelta(days=n) for n in (1, 2, 3)]
    before = pl.concat(
        [pl.read_parquet(tmp_path / f"log/date={day}/part-0.parquet") for day in days]
    )
    counts = before.group_by("user", "item").agg(pl.len().alias("seen"))
    visit = (pl.col("position") == 1).cum_sum().over("user") - 1
    rows = log.with_columns(hidden["click_probability"]).with_columns(visit=visit)
    rows = rows.join(counts, on=["user", "item"], how="left").with_columns(
        pl.col("seen").fill_null(0) + pl.col("visit")
    )
    rows = rows.filter(pl.col("user") < 140)
    examined = EXAMINATION[rows["position"].to_numpy() - 1]
    fresh, _, _ = truth(
        make_world(FEED), rows["user"].to_numpy(), rows["item"].to_numpy(), examined
    )
    expected = fresh / (1 + 0.5 * rows["seen"].to_numpy())
    np.testing.assert_allclose(rows["click_probability"], expected)
    assert rows["seen"].max() > 1
    tomorrow = pl.read_parquet(tmp_path / f"candidates/date={DAY + timedelta(days=1)}")
    world = make_world(FEED)
    assert (world.item_appears[tomorrow["item"].to_numpy()] <= 5).all()
    assert (world.item_appears[tomorrow["item"].to_numpy()] == 5).any()
    assert set(tomorrow["user"]) == set(np.flatnonzero(world.user_joins <= 5))
    assert tomorrow.is_duplicated().sum() == 0
    write_candidates(SimulatedFeed(FEED), tmp_path, 9)
    assert not (tmp_path / f"candidates/date={FIRST + timedelta(days=9)}").exists()
    assert SimulatedFeed.load(tmp_path) == simulated


def test_users_who_like_more_come_more_often():
    simulated = SimulatedFeed(FEED, Behaviour(returns=0.5))
    world = make_world(FEED)
    nothing = pl.DataFrame(schema={"user": pl.Int64, "item": pl.Int64, "like": pl.Int8})
    calm = visit_rates(simulated, world, 5, nothing)
    assert calm.sum() == pytest.approx(FEED.impressions / 10 / 4)
    assert (calm > 0).sum() == (world.user_joins <= 5).sum()
    rows = pl.DataFrame({"user": [0] * 40 + [1] * 40, "item": 0, "like": [1] * 20 + [0] * 60})
    rates = visit_rates(simulated, world, 5, rows)
    # Rates of likes (20 + 20 / 4) / 60 and (0 + 20 / 4) / 60, relative to 1 / 4.
    assert rates[0] / calm[0] == pytest.approx(np.sqrt(25 / 60 * 4))
    assert rates[1] / calm[1] == pytest.approx(np.sqrt(5 / 60 * 4))
    assert rates[2] == pytest.approx(calm[2])


def test_who_did_not_like_the_last_sessions_stays_away_longer():
    """Odds of not coming are l / (1 - l) / r^k with the last three days that had visits."""
    simulated = SimulatedFeed(FEED, Behaviour(leaving=0.2, retention=2.0))
    days = [DAY - timedelta(days=n) for n in (20, 19, 18, 4)]
    # User 0 liked everything on its first day, which three later days follow; user 1 a third.
    rows = [
        *({"user": 0, "item": 0, "like": int(n == 0), "date": day} for n, day in enumerate(days)),
        *({"user": 1, "item": 0, "like": int(n == 0), "date": days[1]} for n in range(3)),
    ]
    past = pl.DataFrame(rows * 20)
    found = presence(simulated, past)
    mean = 20 / 120  # of the rows that count: 60 of each user
    for user, likes in ((0, 0), (1, 20)):
        relative = (likes + 20 * mean) / 80 / mean
        assert found[user] == pytest.approx(1 / (1 + 0.25 / relative**2))
    assert found[2:] == pytest.approx(0.8)
    assert found[0] < 0.5 < found[1]


def test_users_come_on_the_days_that_their_satisfaction_says(tmp_path):
    """With leaving near 1 hardly anybody comes, but those who come do so more often."""
    shares = {}
    for leaving in (0.0, 0.8):
        folder = tmp_path / str(leaving)
        made(folder, Behaviour(drift=0.0, leaving=leaving, retention=0.0))
        log = pl.read_parquet(respond(folder, ranking(folder)))
        shares[leaving] = log["user"].n_unique()
        visits = log.filter(pl.col("position") == 1).height
        assert visits == pytest.approx(FEED.impressions / 40, rel=0.35)
    assert shares[0.8] < 0.5 * shares[0.0]


def test_tastes_turn_after_the_feeds_own_days_and_keep_their_spread():
    simulated = SimulatedFeed(FEED, Behaviour(drift=0.1))
    same = world_on(simulated, 3).user_taste
    np.testing.assert_array_equal(same, make_world(FEED).user_taste)
    near, far = world_on(simulated, 4).user_taste, world_on(simulated, 8).user_taste
    assert np.corrcoef(same.ravel(), near.ravel())[0, 1] > 0.98
    assert np.corrcoef(same.ravel(), far.ravel())[0, 1] < 0.95
    assert far.std() == pytest.approx(same.std(), rel=0.15)


def test_the_random_walk_of_a_drifting_feed_goes_on(tmp_path):
    feed = replace(FEED, drift=0.05)
    simulated = SimulatedFeed(feed, Behaviour(drift=0.0), candidates=30)
    for number in (2, 4, 8):
        expected = feed_world_on(feed, make_world(feed), number).user_taste
        np.testing.assert_array_equal(world_on(simulated, number).user_taste, expected)
    assert not np.array_equal(expected, make_world(feed).user_taste)
    # Answers are those of the walk: clicks without fatigue have the day's probabilities.
    simulate(feed, tmp_path)
    replace(simulated, behaviour=Behaviour(fatigue=0.0, drift=0.0)).save(tmp_path)
    log = pl.read_parquet(respond(tmp_path, ranking(tmp_path)))
    hidden = pl.read_parquet(tmp_path / f"truth/date={DAY}/part-0.parquet")
    today = feed_world_on(feed, make_world(feed), 4)
    examined = EXAMINATION[log["position"].to_numpy() - 1]
    click, _, _ = truth(today, log["user"].to_numpy(), log["item"].to_numpy(), examined)
    np.testing.assert_allclose(hidden["click_probability"], click)


def test_what_is_no_ranking_of_the_feed_is_refused(tmp_path):
    with pytest.raises(ProjectError, match=r"feed.json: not found; make the feed with"):
        respond(tmp_path, tmp_path)
    made(tmp_path, Behaviour())
    with pytest.raises(ProjectError, match=r"expected rankings/date=YYYY-MM-DD"):
        respond(tmp_path, tmp_path)
    late = ranking(tmp_path, DAY + timedelta(days=2))
    with pytest.raises(ProjectError, match=r"must hold the day before"):
        respond(tmp_path, late)
    place = ranking(tmp_path)
    file = place / "part-0.parquet"
    pl.read_parquet(file).with_columns(item_id=pl.lit(500)).write_parquet(file)
    with pytest.raises(ProjectError, match=r"700 rows have a user or an item that the feed"):
        respond(tmp_path, place)
    pl.DataFrame({"user_id": [1]}).write_parquet(file)
    with pytest.raises(ProjectError, match=r"not a ranking of a simulated feed"):
        respond(tmp_path, place)
