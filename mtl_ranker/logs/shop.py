"""A simulated shop with known true probabilities.

The strongest signal is whether an item's category is among its user's favourites. It is in no
column of the log, but in two tables whose columns share a vocabulary.

A shop is one log of joined rows (`write_log`), or impressions and a stream of each action
(`write_streams`): clicks, carts, purchases with their revenue, stars some days after a purchase and
returns weeks after it. Of `Size.delayed` impressions some have a discount, which raises purchases,
and on some days an item is out of stock, so that nobody buys it. Items have content embeddings,
noisy linear images of their category, quality and price; some have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from mtl_ranker.logs.simulate import (
    HOUR_MS,
    Days,
    Delay,
    content_vectors,
    write_by_day,
    write_part,
)

FIRST = date(2026, 3, 2)
CATEGORIES = [f"category {n}" for n in range(15)]
PAGES = ["home", "search", "offers"]
DISCOUNTS = np.array([0.0, 0.1, 0.2, 0.3])
OUT_OF_STOCK = 0.05  # share of items on a day
CANDIDATES = 40  # of each user on the day after the log

CLICK = Delay(30 / 3600, 0.5)
CART = Delay(0.1, 2.0)
PURCHASE = Delay(1.0, 6.0)
STARS = Delay(36.0, 96.0)  # after the purchase, as are returns
RETURN = Delay(6 * 24.0, 20 * 24.0)


@dataclass(frozen=True)
class Size:
    """The size and the seed of a shop; users and items grow with the root of its impressions.

    Attributes:
        delayed: with discounts and stock, as `write_streams` writes them.
    """

    impressions: int
    seed: int = 0
    days: int = 11
    delayed: bool = False

    @property
    def users(self) -> int:
        return round(10 * self.impressions**0.5)

    @property
    def items(self) -> int:
        return round(3 * self.impressions**0.5)


@dataclass(frozen=True)
class Shop:
    """The tables and the log of a shop, with the probabilities that made it.

    Attributes:
        log: labels `click` and `purchase`, and `true_click` and `true_purchase`.
        quality: [items].
        stock: [days + 1, items], whether an item can be bought; the last day is that of candidates.
        discount: the same of what is taken off the price.
    """

    size: Size
    users: pl.DataFrame
    items: pl.DataFrame
    log: pl.DataFrame
    quality: np.ndarray
    stock: np.ndarray
    discount: np.ndarray


def make_shop(size: Size) -> Shop:
    """Sample a shop's tables and its log."""
    rng, impressions = np.random.default_rng(size.seed), size.impressions
    n_users, n_items = size.users, size.items
    favourites = [rng.choice(len(CATEGORIES), rng.integers(1, 4), False) for _ in range(n_users)]
    likes = np.zeros((n_users, len(CATEGORIES)), bool)
    for row, own in zip(likes, favourites, strict=True):
        row[own] = True
    budget, price = rng.normal(0, 1, n_users), rng.normal(0, 1, n_items)
    category = rng.integers(0, len(CATEGORIES), n_items)
    brand = rng.integers(0, max(3, n_items // 10), n_items)
    quality = rng.normal(0, 0.5, brand.max() + 1)[brand] + rng.normal(0, 0.4, n_items)
    eager = rng.normal(0, 0.6, n_users)
    user: np.ndarray = rng.integers(0, n_users, impressions)
    item: np.ndarray = rng.integers(0, n_items, impressions)
    page = rng.integers(0, len(PAGES), impressions)
    match = likes[user, category[item]]
    distance = np.abs(budget[user] - price[item])
    click = _expit(-2.2 + 1.8 * match + 0.6 * quality[item] + eager[user] - 0.3 * (page == 2))
    clicked = rng.random(impressions) < click
    chance = rng.random(impressions)
    day = np.sort(rng.integers(0, size.days, impressions))
    start = np.datetime64(FIRST, "ms").astype(np.int64)
    shown_at = start + day * 24 * HOUR_MS + rng.integers(0, 24 * HOUR_MS, impressions)
    stock, discount = _offers(size)
    bought = _expit(
        -1.5 + 0.8 * match + 0.6 * quality[item] - 0.5 * distance + 3.0 * discount[day, item]
    )
    bought = bought * stock[day, item]
    users = pl.DataFrame(
        {
            "user": np.arange(n_users),
            "country": rng.choice(["de", "fr", "it", "es"], n_users),
            "budget": budget,
            "favourites": [",".join(CATEGORIES[c] for c in own) for own in favourites],
        }
    )
    items = pl.DataFrame(
        {
            "item": np.arange(n_items),
            "category": [CATEGORIES[c] for c in category],
            "brand": [f"brand {b}" for b in brand],
            "price": price,
        }
    )
    log = pl.DataFrame(
        {
            "day": day,
            "user": user,
            "item": item,
            "shown_at": shown_at,
            "page": [PAGES[p] for p in page],
            "click": clicked.astype(np.int64),
            "purchase": (clicked & (chance < bought)).astype(np.int64),
            "true_click": click,
            "true_purchase": click * bought,
        }
    )
    return Shop(size, users, items, log, quality, stock, discount)


def _offers(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Stock and discount of each item on each day of the log and the day after: [days + 1, items].

    Without `delayed` everything is in stock and nothing has a discount.
    """
    shape = size.days + 1, size.items
    if not size.delayed:
        return np.ones(shape, bool), np.zeros(shape)
    rng = np.random.default_rng(np.random.SeedSequence([size.seed, 1]))
    stock = rng.random(shape) >= OUT_OF_STOCK
    return stock, DISCOUNTS[rng.choice(len(DISCOUNTS), shape, p=[0.7, 0.1, 0.1, 0.1])]


def write_log(shop: Shop, folder: Path) -> None:
    """The log of joined rows without its probabilities, and the tables."""
    shop.users.write_parquet(folder / "users.parquet")
    shop.items.write_parquet(folder / "items.parquet")
    for (number,), rows in shop.log.group_by("day"):
        target = folder / f"log/date={FIRST + timedelta(days=int(str(number)))}"
        target.mkdir(parents=True)
        rows.drop("day", "true_click", "true_purchase").write_parquet(target / "part-0.parquet")


def write_streams(shop: Shop, folder: Path, seed: int) -> None:
    """`impressions`, a stream of each action, the tables, candidates of the next day, and `truth`.

    What happens after the log's last day is in no stream, but in the labels of `truth`. Prices are
    in euros.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
    euros = [pl.col(name).mul(0.6).add(3.0).exp().round(2) for name in ("budget", "price")]
    items = shop.items.with_columns(euros[1], _contents(shop, seed))
    write_part(folder, folder / "users.parquet", shop.users.with_columns(euros[0]))
    write_part(folder, folder / "items.parquet", items)
    log, rows = shop.log, shop.log.height
    day, item = log["day"].to_numpy(), log["item"].to_numpy()
    click, purchase = log["click"].to_numpy() == 1, log["purchase"].to_numpy() == 1
    quality, discount = shop.quality[item], shop.discount[day, item]
    pieces = rng.choice([1, 2, 3], rows, p=[0.8, 0.15, 0.05])
    revenue = items["price"].to_numpy()[item] * (1 - discount) * pieces
    carted = purchase | (click & (rng.random(rows) < 0.15))
    returned_p = _expit(-2.0 - 1.5 * quality)
    returned = purchase & (rng.random(rows) < returned_p)
    rated = purchase & (rng.random(rows) < 0.6)
    stars = np.clip(np.round(3.7 + 1.2 * quality - 1.5 * returned + rng.normal(0, 0.7, rows)), 1, 5)
    bought_after = PURCHASE.draw(rng, rows)
    happened = {
        "clicks": (click, CLICK.draw(rng, rows), {}),
        "carts": (carted, np.minimum(CART.draw(rng, rows), bought_after), {}),
        "purchases": (purchase, bought_after, {"revenue": revenue.round(2)}),
        "stars": (rated, bought_after + STARS.draw(rng, rows), {"stars": stars}),
        "returns": (returned, bought_after + RETURN.draw(rng, rows), {}),
    }
    at, days = log["shown_at"].to_numpy(), Days(FIRST, shop.size.days, range(shop.size.days))
    keys = {"impression_id": np.arange(rows), "user": log["user"].to_numpy(), "item": item}
    for name, (which, after, values) in happened.items():
        columns = keys | {"at_ms": at + after} | values
        actions = pl.DataFrame({key: value[which] for key, value in columns.items()})
        write_by_day(folder / name, actions, days, "part-0")
    in_stock = shop.stock[day, item].astype(np.int8)
    context = {"page": log["page"].to_numpy(), "discount": discount, "in_stock": in_stock}
    write_by_day(
        folder / "impressions", pl.DataFrame(keys | {"at_ms": at} | context), days, "part-0"
    )
    hidden = log.select("true_click", "true_purchase", "click", "purchase").to_dict(as_series=False)
    truth = pl.DataFrame(keys | {"at_ms": at} | hidden).with_columns(
        pl.Series("true_return_given_purchase", returned_p), pl.Series("returned", returned)
    )
    write_by_day(folder / "truth", truth, days, "part-0")
    _write_candidates(shop, folder, rng)


def _contents(shop: Shop, seed: int) -> pl.Series:
    """Content embeddings, noisy linear images of category, quality and price: lists of float32."""
    price, kinds = shop.items["price"].to_numpy(), shop.items["category"].to_list()
    category = np.array([[kind == name for name in CATEGORIES] for kind in kinds])
    attributes = np.column_stack([category, shop.quality, price])
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
    return content_vectors(attributes, rng).alias("content")


def _write_candidates(shop: Shop, folder: Path, rng: np.random.Generator) -> None:
    """Different items of each user on the day after the log, with the page and the day's offer."""
    size = shop.size
    user = np.arange(size.users).repeat(CANDIDATES)
    item = rng.integers(0, size.items, len(user))
    offered = pl.DataFrame(
        {
            "user": user,
            "item": item,
            "page": np.repeat(PAGES[0], len(user)),
            "discount": shop.discount[size.days, item],
            "in_stock": shop.stock[size.days, item].astype(np.int8),
        }
    ).unique(["user", "item"], maintain_order=True)
    target = folder / f"candidates/date={FIRST + timedelta(days=size.days)}/part-0.parquet"
    write_part(folder, target, offered)


def _expit(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))
