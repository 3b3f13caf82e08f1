"""Explored lists against enumeration of Plackett-Luce rankings, and against simulation."""

from __future__ import annotations

from datetime import date, timedelta
from itertools import combinations, permutations
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from mtl_ranker.evaluation.off_policy import item_weights, reordered
from mtl_ranker.ranking.exploration import LEAST, day_key, item_at_position, uniform, with_ids
from mtl_ranker.ranking.rules import DayLists
from tests.projects import merged, project
from tests.ranking.test_rules import WITH_ITEMS

DAY = date(2026, 3, 9)
SCORES = np.array([1.0, 0.4, 0.9, 0.1])


def probability(order: tuple[int, ...], weight: np.ndarray) -> float:
    """Of a Plackett-Luce ranking that starts with `order`."""
    left, result = float(weight.sum()), 1.0
    for item in order:
        result *= weight[item] / left
        left -= weight[item]
    return result


def lists(users: int, **settings: Any) -> tuple[pl.DataFrame, DayLists]:
    """Users with the same four candidates, and the lists' settings."""
    exploration = {"temperature": 0.8, "share": 1.0, "seed": 7} | settings.pop("exploration", {})
    scoring = {"top_k": 3, "exploration": exploration} | settings
    pairs = pl.DataFrame({"user_id": np.arange(users)}).join(
        pl.DataFrame({"item_id": [10, 11, 12, 13], "score": SCORES}), how="cross"
    )
    return pairs, DayLists(project(merged(WITH_ITEMS, scoring=scoring)), DAY, {}, [])


@given(
    st.lists(st.floats(-6, 6), min_size=1, max_size=5),
    st.integers(0, 2),
)
def test_propensities_are_those_of_all_orders(logits, padding):
    weight = np.exp(np.array(logits))
    expected = np.zeros(len(logits))
    for order in permutations(range(len(logits))):
        for place, item in enumerate(order):
            expected[item] += probability(order, weight) * (item == place)
    table = np.array([logits + [-np.inf] * padding])
    np.testing.assert_allclose(
        item_at_position(table)[0, : len(logits)],
        np.maximum(expected, LEAST),
        rtol=1e-7,
        atol=1e-14,
    )


def test_propensities_of_lists_of_other_lengths_and_spreads_do_not_change():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(50, 12)) * rng.choice([0.1, 3.0, 30.0], (50, 1))
    alone = np.concatenate([item_at_position(row[None]) for row in table])
    np.testing.assert_allclose(item_at_position(table), alone, rtol=1e-9)


def test_lists_are_plackett_luce_and_propensities_those_of_the_order():
    """The chosen items, and the order of each set of items, as often as they must be."""
    pairs, made = lists(30_000)
    ranking, _ = made.ranked(pairs)
    weight = np.exp(SCORES / (0.8 * SCORES.std()))
    item = ranking["item_id"].to_numpy().reshape(-1, 3) - 10
    propensity = ranking["propensity"].to_numpy().reshape(-1, 3)
    sets = list(combinations(range(4), 3))
    chosen = np.array([sets.index(tuple(sorted(row))) for row in item])
    of_sets = [sum(probability(order, weight) for order in permutations(s)) for s in sets]
    found = np.bincount(chosen, minlength=len(sets))
    assert chisquare(found, np.array(of_sets) * len(item)).pvalue > 1e-3
    for number, members in enumerate(sets):
        rows = item[chosen == number]
        own = weight[list(members)]
        orders = list(permutations(range(3)))
        expected = np.array([probability(order, own) for order in orders])
        counts = [(rows == np.array(members)[list(order)]).all(1).sum() for order in orders]
        assert chisquare(counts, expected * len(rows)).pvalue > 1e-3
        for order in orders:
            of_order = (rows == np.array(members)[list(order)]).all(1)
            marginal = [
                expected[[other[place] == order[place] for other in orders]].sum()
                for place in range(3)
            ]
            np.testing.assert_allclose(
                propensity[chosen == number][of_order],
                np.tile(marginal, (of_order.sum(), 1)),
            )


def test_weights_of_another_order_average_one_with_rules():
    """Under rules the propensity is still that of the order of the list's items."""
    table = pl.DataFrame({"item_id": [10, 11, 12, 13], "creator": ["a", "b", "a", "c"]})
    rule = {"column": "creator", "count": 1, "within": 3}
    pairs, made = lists(20_000, rules={"at_most": [rule]})
    made = DayLists(made.project, DAY, {}, [(["item_id"], table)])
    ranking, effects = made.ranked(pairs)
    shown = ranking.join(table, on="item_id")
    assert shown.select(pl.struct("user_id", "creator").is_unique().all()).item()
    assert ranking.height == 3 * 20_000
    frame = ranking.select(
        "user_id", "item_id", pl.col("rank").alias("position"), timestamp=pl.int_range(pl.len())
    )
    for score in (SCORES, -SCORES, np.array([0, 3, 1, 2])):
        value = score[ranking["item_id"].to_numpy() - 10]
        weight = item_weights(
            reordered(frame, value, ranking["user_id"].to_numpy()), ranking["propensity"].to_numpy()
        )
        by_list = weight.reshape(-1, 3).mean(1)
        assert abs(by_list.mean() - 1) < 4 * by_list.std() / np.sqrt(len(by_list))
    assert [effect.step for effect in effects] == ["at_most[0]", "exploration"]


def test_a_ranking_repeats_and_does_not_depend_on_other_users_or_the_order_of_rows():
    pairs, made = lists(200, exploration={"share": 0.5})
    ranking, _ = made.ranked(pairs)
    assert made.ranked(pairs.sample(fraction=1.0, shuffle=True, seed=3))[0].equals(ranking)
    some = pairs.filter(pl.col("user_id") % 3 == 0)
    assert made.ranked(some)[0].equals(ranking.filter(pl.col("user_id") % 3 == 0))
    narrow = pairs.cast({"user_id": pl.Int32, "item_id": pl.UInt16})
    assert made.ranked(narrow)[0].equals(ranking.cast({"user_id": pl.Int32, "item_id": pl.UInt16}))
    other_seed = lists(200, exploration={"share": 0.5, "seed": 8})[1]
    other_day = DayLists(made.project, DAY + timedelta(days=1), {}, [])
    for other in (other_seed, other_day):
        users = other.ranked(pairs)[0].filter(pl.col("exploration_seed").is_not_null())["user_id"]
        assert set(users) != set(
            ranking.filter(pl.col("exploration_seed").is_not_null())["user_id"]
        )


def test_users_who_do_not_explore_have_the_best_by_score_and_propensity_one():
    pairs, made = lists(1_000, exploration={"share": 0.2})
    ranking, (effect,) = made.ranked(pairs)
    explored = ranking.filter(pl.col("exploration_seed") == 7)
    assert 120 < effect.lists == explored["user_id"].n_unique() < 280
    rest = ranking.filter(pl.col("exploration_seed").is_null())
    assert rest.height + explored.height == ranking.height == 3_000
    assert (rest["propensity"] == 1).all()
    assert rest["item_id"].to_list() == [10, 12, 11] * (rest.height // 3)
    assert (explored["propensity"] < 1).all()
    # The cost: of the explored lists only, by what their users would have been shown.
    discount = 1 / np.log2([2, 3, 4])
    best = (discount * np.sort(SCORES)[:0:-1]).sum() / discount.sum()
    shown = explored["score"].to_numpy().reshape(-1, 3) @ discount / discount.sum()
    assert effect.before.mean == pytest.approx(best)
    assert effect.after.mean == pytest.approx(shown.mean())
    assert effect.change < -0.01


def test_lists_shorter_than_top_k_and_lists_of_one():
    pairs, made = lists(300)
    short = pairs.filter((pl.col("user_id") > 5) | (pl.col("item_id") == 10))
    ranking, _ = made.ranked(short.filter((pl.col("user_id") != 6) | (pl.col("item_id") < 12)))
    one = ranking.filter(pl.col("user_id") <= 5)
    assert one["propensity"].to_list() == pytest.approx([1.0] * 6)
    two = ranking.filter(pl.col("user_id") == 6).sort("rank")
    weight = np.exp(SCORES[:2] / (0.8 * SCORES[:2].std()))
    first = weight[two["item_id"][0] - 10] / weight.sum()
    assert two["propensity"].to_list() == pytest.approx([first, first])


def test_random_numbers_of_text_ids_are_uniform_and_known():
    keys = day_key(0, DAY)
    ids = pl.Series([f"user {n}" for n in range(20_000)])
    drawn = uniform(with_ids(keys, ids), 0)
    assert chisquare(np.histogram(drawn, 20, (0, 1))[0]).pvalue > 1e-3
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(drawn, uniform(with_ids(keys, ids), 1))[0, 1]) < 0.03
    some = pl.Series(["é", "", "a long text beside short ones"])
    together = with_ids(keys, some)
    for n, text in enumerate(some):
        assert with_ids(keys, pl.Series([text]))[0] == together[n]
    # Published values: FNV-1a of "a", and SplitMix64's first output of seed 0.
    assert int(with_ids(np.zeros(1, np.uint64), pl.Series(["a"]))[0]) == splitmix(
        splitmix(0xAF63DC4C8601EC8C)
    )
    assert splitmix(0) == 0xE220A8397B1DCDAF


def splitmix(value: int) -> int:
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_users_without_candidates_have_the_same_columns():
    """As where rules drop every candidate of a block: its ranking is joined to those of others."""
    pairs, made = lists(3)
    ranking, _ = made.ranked(pairs)
    nobody, _ = made.ranked(pairs.clear())
    assert nobody.schema == ranking.schema
    assert nobody.is_empty()


def test_ids_of_64_bits_have_keys():
    seed = day_key(7, DAY)
    large = with_ids(seed, pl.Series([2**64 - 1, 2**63, 5], dtype=pl.UInt64))
    assert len(set(large.tolist())) == 3
    assert large[2] == with_ids(seed, pl.Series([5], dtype=pl.Int16))[0]
