"""Logs of a known world under known logging policies, and the true values of other rankings.

Users of a log are drawn from the simulator's world, each with one to six decisions, so that rows
of a user depend on each other. Truths are means over all users of the world, many times each.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import polars as pl

from mtl_ranker.logs.simulate import EXAMINATION, Feed, World, make_world, truth

WORLD = make_world(Feed(users=2_000, items=120, seed=5))
TIMES = 80  # that each user of the world is in a truth
EVERYONE = None


def decisions(rng: np.random.Generator, users: int | None) -> tuple[np.ndarray, np.ndarray]:
    """For each decision: the user's number in the log, and in the world.

    Of users that are drawn, or of EVERYONE equally often.
    """
    if users is EVERYONE:
        everyone = np.arange(len(WORLD.user_taste)).repeat(TIMES)
        return everyone, everyone
    in_world = rng.integers(0, len(WORLD.user_taste), users)
    number = np.arange(users).repeat(rng.integers(1, 7, users))
    return number, in_world[number]


def different_items(rng: np.random.Generator, lists: int, count: int) -> np.ndarray:
    """Items of each list, all sets and orders equally likely: [lists, count]."""
    item = rng.integers(0, len(WORLD.item_taste), (lists, count))
    while len(again := np.flatnonzero((np.diff(np.sort(item, 1)) == 0).any(1))):
        item[again] = rng.integers(0, len(WORLD.item_taste), (len(again), count))
    return item


def affinity(world: World, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    return (world.user_taste[user] * world.item_taste[item]).sum(-1) / world.user_taste.shape[1]


def ranker(world: World, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """The score of the ranking to be estimated: not what the logging policies go by."""
    return 0.5 * affinity(world, user, item) + world.item_quality[item]


def softmax(score: np.ndarray) -> np.ndarray:
    weight = np.exp(score - score.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


class SingleItems:
    """One of five candidates is shown, by a softmax of affinity; the ranker shows its best."""

    items = 5

    def __init__(self, seed: int, users: int | None) -> None:
        rng = np.random.default_rng(seed)
        self.user, in_world = decisions(rng, users)
        candidates = rng.integers(0, len(WORLD.item_taste), (len(in_world), self.items))
        logging = softmax(affinity(WORLD, in_world[:, None], candidates))
        rows = np.arange(len(in_world))
        shown = (rng.random((len(rows), 1)) > logging.cumsum(1)).sum(1).clip(max=self.items - 1)
        score = ranker(WORLD, in_world[:, None], candidates)
        click, _, _ = truth(WORLD, in_world.repeat(self.items), candidates.ravel())
        self.click = click.reshape(score.shape)
        self.best, self.shown, self.score = score.argmax(1), shown, score
        self.propensity = logging[rows, shown]
        self.reward = (rng.random(len(rows)) < self.click[rows, shown]).astype(float)

    @property
    def weight(self) -> np.ndarray:
        return (self.best == self.shown) / self.propensity

    @classmethod
    def true_value(cls) -> float:
        many = cls(10_000, EVERYONE)
        return float(many.click[np.arange(len(many.best)), many.best].mean())


class Lists:
    """Lists of three in random order, whose positions are examined ever less.

    Args:
        propensity_of: what the log's propensity is: of the item at its position, by a
            Plackett-Luce order of affinity, or of the position's examination.
    """

    items = 3

    def __init__(self, seed: int, users: int | None, propensity_of: str = "item") -> None:
        rng = np.random.default_rng(seed)
        number, in_world = decisions(rng, users)
        lists = len(number)
        item = different_items(rng, lists, self.items)
        strength = np.exp(affinity(WORLD, in_world[:, None], item))
        orders = np.array(list(permutations(range(self.items))))
        remaining = strength[:, orders][:, :, ::-1].cumsum(2)[:, :, ::-1]
        probability = (strength[:, orders] / remaining).prod(2)  # [lists, orders]
        chosen = (rng.random((lists, 1)) > probability.cumsum(1)).sum(1).clip(max=len(orders) - 1)
        order = orders[chosen]  # item at each position
        same = orders[None] == order[:, None]  # [lists, orders, positions]
        of_item = (probability[:, :, None] * same).sum(1)
        examined = EXAMINATION[: self.items]
        row, user = np.arange(lists)[:, None], in_world[:, None]
        shown = item[row, order]

        click, like = self.rates(in_world, shown)
        self.score = ranker(WORLD, user, shown).ravel()
        clicked = rng.random(click.shape) < click
        liked = (rng.random(click.shape) < like).astype(float)
        self.labels = np.stack([clicked.astype(float), np.where(clicked, liked, np.nan)], 1)
        # A prediction that is off, as those of models are.
        self.prediction = np.stack([0.5 * click / np.tile(examined, lists) + 0.1, like], 1)
        propensity = of_item if propensity_of == "item" else np.tile(examined, (lists, 1))
        self.frame = pl.DataFrame(
            {
                "user_id": number.repeat(self.items),
                "item_id": shown.ravel(),
                "timestamp": np.arange(lists * self.items),
                "position": np.tile(np.arange(1, self.items + 1), lists),
                "propensity": propensity.ravel(),
            }
        )

    @classmethod
    def true_values(cls) -> tuple[float, float]:
        """Clicks per impression, and likes per click, of the ranker's order."""
        rng = np.random.default_rng(10_000)
        _, user = decisions(rng, EVERYONE)
        item = different_items(rng, len(user), cls.items)
        best_first = np.argsort(-ranker(WORLD, user[:, None], item), 1)
        click, like = cls.rates(user, np.take_along_axis(item, best_first, 1))
        return float(click.mean()), float((click * like).sum() / click.sum())

    @staticmethod
    def rates(user: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """P(click) and P(like | click) of the rows of lists, items [lists, positions] in order."""
        lists, length = item.shape
        at = np.tile(EXAMINATION[:length], lists)
        click, like, _ = truth(WORLD, user.repeat(length), item.ravel(), at)
        return click, like


class RandomExposures:
    """Eight or more random exposures of each user; the ranker shows the best of three."""

    candidates = 3

    def __init__(self, seed: int, users: int) -> None:
        rng = np.random.default_rng(seed)
        in_world = rng.integers(0, len(WORLD.user_taste), users)
        self.user = np.arange(users).repeat(rng.integers(8, 13, users))
        item = rng.integers(0, len(WORLD.item_taste), len(self.user))
        self.click, _, _ = truth(WORLD, in_world[self.user], item)
        self.reward = (rng.random(len(item)) < self.click).astype(float)
        self.score = ranker(WORLD, in_world[self.user], item)

    @classmethod
    def true_value(cls) -> float:
        rng = np.random.default_rng(20_000)
        _, user = decisions(rng, EVERYONE)
        drawn = rng.integers(0, len(WORLD.item_taste), (len(user), cls.candidates))
        best = ranker(WORLD, user[:, None], drawn).argmax(1)
        click, _, _ = truth(WORLD, user, drawn[np.arange(len(user)), best])
        return float(click.mean())
