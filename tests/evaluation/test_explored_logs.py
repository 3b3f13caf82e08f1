"""Estimates from explored lists under rules against the true value of another order."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import numpy as np
import polars as pl
import pytest

from mtl_ranker.evaluation.metrics import PredictedRows
from mtl_ranker.evaluation.off_policy import Estimate, off_policy, randomised, reordered
from mtl_ranker.logs.simulate import EXAMINATION, truth
from mtl_ranker.ranking.rules import DayLists
from tests.evaluation.simulated_logs import WORLD, affinity, decisions, different_items, ranker
from tests.projects import TINY, merged, project

DAY = date(2026, 3, 9)
LOGS = 400  # 200 would often miss 92 to 98 in 100 by chance
CANDIDATES, TOP = 12, 5
SETTINGS = merged(
    TINY,
    log={
        "position": "position",
        "propensity": "propensity",
        "items": {"path": "items.parquet", "key": "i", "columns": ["creator"]},
    },
    off_policy={"min_support": 20},
    scoring={
        "top_k": TOP,
        "rules": {"at_most": [{"column": "creator", "count": 1, "within": TOP}]},
        "exploration": {"temperature": 1.0, "share": 0.6},
    },
)
ITEMS = pl.DataFrame({"item_id": np.arange(len(WORLD.item_taste)), "creator": WORLD.item_creator})


@dataclass(frozen=True)
class Explored:
    """A log of lists, of which 60 % were randomised, and the true value of the ranker's order.

    Attributes:
        truths: clicks per impression, and likes per click, in the order of the ranker.
    """

    estimates: list[Estimate]
    truths: np.ndarray


def explored(seed: int, users: int) -> Explored:
    """Each user has one to six lists, of the candidates of as many decisions."""
    rng = np.random.default_rng(seed)
    number, in_world = decisions(rng, users)
    lists = len(number)
    item = different_items(rng, lists, CANDIDATES)
    score = affinity(WORLD, in_world[:, None], item)
    # Decisions are ranked as if each had a user of its own.
    scored = pl.DataFrame(
        {
            "user_id": np.arange(lists).repeat(CANDIDATES),
            "item_id": item.ravel(),
            "score": score.ravel(),
        }
    )
    settings = project(SETTINGS, scoring={"exploration": {"seed": seed}})
    ranking, _ = DayLists(settings, DAY, {}, [(["item_id"], ITEMS)]).ranked(scored)
    decision = ranking["user_id"].to_numpy()
    frame = ranking.select(
        pl.Series("user_id", number[decision]),
        "item_id",
        pl.int_range(pl.len()).alias("timestamp"),
        pl.col("rank").alias("position"),
        "propensity",
    )
    user, shown = in_world[decision], ranking["item_id"].to_numpy()
    examined = EXAMINATION[frame["position"].to_numpy() - 1]
    click, like, _ = truth(WORLD, user, shown, examined)
    clicked = rng.random(len(click)) < click
    liked = np.where(clicked, rng.random(len(click)) < like, np.nan)
    new = ranker(WORLD, user, shown)
    prediction = np.stack([0.5 * click / examined + 0.1, like], 1)
    labels = np.stack([clicked.astype(float), liked], 1)
    predicted = PredictedRows(labels, prediction, frame["user_id"].to_numpy(), decision)
    order = reordered(frame, new, decision)
    chosen = randomised(order, frame["propensity"].to_numpy())
    moved = (click / examined * EXAMINATION[order.new_position - 1])[chosen]
    truths = np.array([moved.sum(), (moved * like[chosen]).sum(), len(moved)])
    return Explored(off_policy(settings, frame, predicted, new), truths)


@pytest.mark.slow
def test_estimates_of_explored_lists_recover_the_value_of_another_order():
    log = explored(1, 800)
    clicks, likes = log.estimates
    assert "that were randomised" in clicks.how
    value, rate = log.truths[0] / log.truths[2], log.truths[1] / log.truths[0]
    for interval in (clicks.ips, clicks.snips, clicks.dr):
        assert interval.low < value < interval.high
        assert interval.value == pytest.approx(value, abs=0.03)
    assert likes.snips.low < rate < likes.snips.high


@pytest.mark.slow
def test_intervals_from_explored_logs_cover_the_truth_92_to_98_times_in_100():
    """The truth is of many other users' lists, without chance in the labels."""
    clicked, _, rows = sum(explored(10_000 + n, 3_000).truths for n in range(5))
    value = clicked / rows
    clicks = [explored(seed, 250).estimates[0] for seed in range(LOGS)]
    given = [each for each in clicks if each.refused is None]
    assert len(given) > 0.98 * LOGS
    counts = {}
    for name in ("ips", "snips", "dr"):
        intervals = [getattr(each, name) for each in given]
        counts[name] = sum(i.low <= value <= i.high for i in intervals)
    low, high = 0.92 * len(given), 0.98 * len(given)
    assert all(low <= count <= high for count in counts.values()), counts
