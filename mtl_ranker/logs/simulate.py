"""A simulated feed with known true probabilities, for demonstrations and tests.

Users and items have latent tastes. Some items are clickbait: their clicks are more likely and
their likes less likely. Items have content embeddings, noisy linear images of their tastes; some
have none. A logging policy shows items by noisy affinity and freshness at ten
positions; the probability of examination, and so of a click, falls with the position. Items appear
every day, weekends are busier, and some users are new. Tastes may drift from day to day. The true
probabilities are written beside the log, never into it.

The log is one of joined rows, or with `Feed.streams` impressions and a stream of each action, with
daily partitions by the action's own day. Both have the same impressions and the same answers.
Actions follow their impression with a delay of a known distribution (`Delay`); what happens after
the last day is in no stream. The user table of such a log has a snapshot of each day, in which
users appear on the day they join.

All random numbers come from `SeedSequence` of the seed, the day and the chunk: the same seed gives
the same bytes, and memory depends on the size of a chunk, not on the number of impressions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from mtl_ranker.workspace import Workspace

SLATE = 10
TASTES = 8
TOPICS = 12
CHUNK_SLATES = 50_000
CONTENT = 16  # numbers of a content embedding
CONTENT_NOISE = 0.5  # standard deviation, where that of a number without noise is about 1
NO_CONTENT = 0.05  # share of the items
SURFACES = np.array(["home", "following", "search"])
EXAMINATION = 1.0 / np.arange(1, SLATE + 1) ** 0.5
HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Delay:
    """The time from an impression to an action: exponential, given that it is below `most`.

    Attributes:
        mean: of the exponential distribution, in hours; that of the delay is lower.
        most: in hours.
    """

    mean: float
    most: float

    def share(self, hours: float) -> float:
        """The share F of actions that have happened after some hours."""
        whole = -np.expm1(-self.most / self.mean)
        return float(-np.expm1(-np.clip(hours, 0, self.most) / self.mean) / whole)

    def draw(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        """Delays in milliseconds, [rows] integers below `most`."""
        whole = -np.expm1(-self.most / self.mean)
        hours = -self.mean * np.log1p(-rng.random(rows) * whole)
        return np.minimum(hours * HOUR_MS, self.most * HOUR_MS - 1).astype(np.int64)


CLICK_DELAY = Delay(20 / 3600, 0.1)
LIKE_DELAY = Delay(24.0, 72.0)


@dataclass(frozen=True)
class Feed:
    """The size and the seed of a simulated feed.

    Attributes:
        horizon: days over which items appear and users join, where they are more than `days`: those
            that follow as answers to rankings (`logs/respond.py`).
        drift: standard deviation of the daily step of each user's taste, a random walk.
        streams: whether impressions and actions are streams of their own.
        like_hours: mean of the exponential delay of likes in streams (`LIKE_DELAY`).
    """

    impressions: int = 150_000
    days: int = 11
    first_day: date = date(2026, 3, 2)
    seed: int = 0
    users: int = 4_000
    items: int = 3_000
    drift: float = 0.0
    horizon: int = 0
    streams: bool = False
    like_hours: float = LIKE_DELAY.mean

    @property
    def last_day(self) -> int:
        """Number of the last day on which items appear and users join."""
        return max(self.days, self.horizon)

    def day_slates(self) -> list[int]:
        """Number of slates on each day, higher at weekends."""
        weekdays = [(self.first_day + timedelta(days=n)).weekday() for n in range(self.days)]
        rhythm = np.array([1.3 if weekday >= 5 else 1.0 for weekday in weekdays])
        share = rhythm / rhythm.sum()
        return [max(1, round(self.impressions / SLATE * s)) for s in share]


@dataclass(frozen=True, kw_only=True)
class World:
    """The latent attributes of users and items."""

    user_taste: np.ndarray  # [users, TASTES]
    user_activity: np.ndarray  # [users], relative
    user_joins: np.ndarray  # [users], day number
    item_taste: np.ndarray  # [items, TASTES]
    item_topic: np.ndarray  # [items]
    item_clickbait: np.ndarray  # [items], 0 = honest
    item_quality: np.ndarray  # [items]
    item_appears: np.ndarray  # [items], day number, ascending; negative = before the log
    item_seconds: np.ndarray  # [items]
    item_creator: np.ndarray  # [items]


@dataclass(frozen=True)
class Chunk:
    """The slates of a day that are simulated at a time.

    Attributes:
        day: number of the day, from 0.
        number: of the chunk within the day, from 0.
    """

    day: int
    number: int
    slates: int


def make_world(feed: Feed) -> World:
    """Sample the latent attributes."""
    rng = np.random.default_rng(np.random.SeedSequence([feed.seed, 1]))
    topics = rng.normal(size=(TOPICS, TASTES))
    item_topic = rng.integers(0, TOPICS, feed.items)
    creators = max(2, feed.items // 8)
    item_creator = rng.integers(0, creators, feed.items)
    creator_quality = rng.normal(0, 0.5, creators)
    favourite = rng.integers(0, TOPICS, (feed.users, 2))
    return World(
        user_taste=topics[favourite].sum(1) * 0.6 + rng.normal(0, 0.5, (feed.users, TASTES)),
        user_activity=rng.lognormal(0, 1, feed.users),
        user_joins=np.where(
            rng.random(feed.users) < 0.9, 0, rng.integers(0, max(feed.last_day, 1), feed.users)
        ),
        item_taste=topics[item_topic] + rng.normal(0, 0.7, (feed.items, TASTES)),
        item_topic=item_topic,
        item_clickbait=np.where(rng.random(feed.items) < 0.2, rng.uniform(0.8, 2.0, feed.items), 0),
        item_quality=creator_quality[item_creator] + rng.normal(0, 0.5, feed.items),
        item_appears=np.sort(rng.integers(-7, feed.last_day + 1, feed.items)),
        item_seconds=rng.lognormal(3.2, 0.7, feed.items).round(1),
        item_creator=item_creator,
    )


def world_on(feed: Feed, world: World, day: int) -> World:
    """The world with the users' tastes on a day, numbered from 0: x_d = x_0 + Σ_{k≤d} σ z_k."""
    taste = world.user_taste
    for step in range(1, day + 1) if feed.drift > 0 else ():
        rng = np.random.default_rng(np.random.SeedSequence([feed.seed, 4, step]))
        taste = taste + rng.normal(0, feed.drift, taste.shape)
    return replace(world, user_taste=taste)


def truth(
    world: World, user: np.ndarray, item: np.ndarray, examined: np.ndarray | float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True P(click), P(like | click) and E[log(1 + watch seconds) | click], each [N].

    Args:
        user, item: [N], index of each.
        examined: [N] or one, probability that the position is examined.
    """
    affinity = (world.user_taste[user] * world.item_taste[item]).sum(1) / TASTES
    bait, quality = world.item_clickbait[item], world.item_quality[item]
    click = _sigmoid(0.9 * affinity + 0.8 * quality + 0.9 * bait - 0.8) * examined
    like = _sigmoid(0.8 * affinity + 0.9 * quality - 1.2 * bait - 2.2)
    watch = np.log1p(world.item_seconds[item]) - 0.9 - 0.5 * bait + 0.3 * affinity
    return click, like, watch


def simulate(feed: Feed, folder: Path, progress: Callable[[int], None] | None = None) -> Path:
    """Write `log/date=D/`, `users.parquet`, `items.parquet` and `truth/date=D/` to `folder`.

    With `Feed.streams` in place of the log `impressions`, `clicks`, `watches` and `likes`, each
    with `date=D/`, and in place of the file of users their snapshots `users/date=D/`; `truth` then
    has the labels as well, also those that come after the last day.

    Args:
        progress: called with the number of impressions written so far.
    """
    world = make_world(feed)
    _write_tables(feed, world, folder)
    written = 0
    for day, slates in enumerate(feed.day_slates()):
        today = world_on(feed, world, day)
        date_folder = f"date={feed.first_day + timedelta(days=day)}"
        for number, start in enumerate(range(0, slates, CHUNK_SLATES)):
            chunk = Chunk(day, number, min(CHUNK_SLATES, slates - start))
            log, hidden = _impressions(feed, today, chunk)
            files = {"log": log, "truth": hidden}
            if feed.streams:
                files = _streams(feed, chunk, log) | {
                    "truth": hidden.with_columns(log[label] for label in ("click", "like"))
                }
            for name, frame in files.items():
                if name in STREAMS:
                    days = Days(feed.first_day, feed.days, (chunk.day,))
                    write_by_day(folder / name, frame, days, f"part-{chunk.day}-{chunk.number}")
                else:
                    write_part(
                        folder, folder / name / date_folder / f"part-{number}.parquet", frame
                    )
            written += chunk.slates * SLATE
            if progress is not None:
                progress(written)
    return folder


STREAMS = ("clicks", "watches", "likes")


def _streams(feed: Feed, chunk: Chunk, log: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Joined rows of a chunk as impressions and actions, each by its folder."""
    rng = np.random.default_rng(np.random.SeedSequence([feed.seed, 8, chunk.day, chunk.number]))
    first = (chunk.day * 1_000 + chunk.number) * CHUNK_SLATES * SLATE
    log = log.with_columns(pl.int_range(first, first + log.height).alias("impression_id"))
    click = CLICK_DELAY.draw(rng, log.height)
    like = replace(LIKE_DELAY, mean=feed.like_hours).draw(rng, log.height)
    keys = ["impression_id", "user", "item"]

    def stream(happened: str, after: pl.Expr, *values: str) -> pl.DataFrame:
        rows = log.filter(pl.col(happened) == 1)
        return rows.select(*keys, (pl.col("shown_at_ms") + after).alias("at_ms"), *values)

    log = log.with_columns(pl.Series("clicked after", click), pl.Series("liked after", like))
    watched = pl.col("clicked after") + (pl.col("watch_seconds") * 1_000).cast(pl.Int64)
    labels = ("click", "watch_seconds", "like", "clicked after", "liked after")
    return {
        "impressions": log.drop(labels),
        "clicks": stream("click", pl.col("clicked after")),
        "watches": stream("click", watched, "watch_seconds"),
        "likes": stream("like", pl.col("liked after")),
    }


@dataclass(frozen=True)
class Days:
    """The days of a log, and those, numbered from 0, that get a file also without a row."""

    first: date
    count: int
    present: Sequence[int]


def write_by_day(target: Path, rows: pl.DataFrame, days: Days, part: str) -> None:
    """Write rows to the days of their `at_ms`, up to the last day of the log."""
    start = (days.first - date(1970, 1, 1)).days
    number = pl.col("at_ms") // (24 * HOUR_MS) - start
    own = rows.with_columns(number.alias("number")).partition_by(
        "number", maintain_order=True, as_dict=True, include_key=False
    )
    by_day = {int(key[0]): found for key, found in own.items()}
    for day in sorted({*days.present, *by_day}):
        if day < days.count:
            folder = target / f"date={days.first + timedelta(days=day)}"
            found = by_day.get(day, rows.clear()).sort("at_ms", maintain_order=True)
            write_part(target.parent, folder / f"{part}.parquet", found)


def write_part(folder: Path, target: Path, frame: pl.DataFrame) -> None:
    """Write a Parquet file below `folder`; readers find the whole file or none."""
    with Workspace(folder).staged(target) as temporary:
        frame.write_parquet(temporary)


def _write_tables(feed: Feed, world: World, folder: Path) -> None:
    rng = np.random.default_rng(np.random.SeedSequence([feed.seed, 2]))
    folder.mkdir(parents=True, exist_ok=True)
    countries = np.array(["BR", "DE", "IN", "JP", "KE", "US"])
    ages = np.array(["13-17", "18-24", "25-34", "35-49", "50+"])
    users = pl.DataFrame(
        {
            "user": np.arange(feed.users),
            "country": countries[rng.integers(0, len(countries), feed.users)],
            "age_group": ages[rng.integers(0, len(ages), feed.users)],
            "joined_days": np.where(world.user_joins > 0, 0, rng.integers(1, 2000, feed.users)),
        }
    )
    second = rng.integers(0, TOPICS, feed.items)
    tags = [f"t{a},t{b}" for a, b in zip(world.item_topic, second, strict=True)]
    published = [feed.first_day + timedelta(days=int(n)) for n in world.item_appears]
    items = pl.DataFrame(
        {
            "item": np.arange(feed.items),
            "creator": world.item_creator,
            "topic": world.item_topic,
            "seconds": world.item_seconds,
            "tags": tags,
            "published": published,
            "content": _contents(feed, world),
        }
    )
    write_part(folder, folder / "items.parquet", items)
    if not feed.streams:
        write_part(folder, folder / "users.parquet", users)
        return
    for day in range(-1, feed.days):  # rows of the first day have the values of the day before
        target = folder / f"users/date={feed.first_day + timedelta(days=day)}/part-0.parquet"
        write_part(folder, target, _users_on(world, users, day))


def _users_on(world: World, users: pl.DataFrame, day: int) -> pl.DataFrame:
    """The snapshot of a numbered day: who has joined, and how many days ago."""
    joined = pl.Series(world.user_joins)
    days = pl.col("joined_days") + day - joined
    return users.with_columns(days).filter(joined <= max(day, 0))


def _contents(feed: Feed, world: World) -> pl.Series:
    """Content embeddings: lists of float32, null for items without one."""
    rng = np.random.default_rng(np.random.SeedSequence([feed.seed, 9]))
    return content_vectors(world.item_taste, rng)


def content_vectors(attributes: np.ndarray, rng: np.random.Generator) -> pl.Series:
    """Noisy linear images of attributes [N, A]: N lists of float32, null without an embedding."""
    count, size = attributes.shape
    image = attributes @ rng.normal(0, size**-0.5, (size, CONTENT))
    image = image + rng.normal(0, CONTENT_NOISE, image.shape)
    vectors = pl.Series(image.astype(np.float32)).cast(pl.List(pl.Float32))
    return vectors.set(pl.Series(rng.random((count,)) < NO_CONTENT), None)


def _impressions(feed: Feed, world: World, chunk: Chunk) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The log's rows of a chunk, and their true probabilities."""
    slates = chunk.slates
    rng = np.random.default_rng(np.random.SeedSequence([feed.seed, 3, chunk.day, chunk.number]))
    joined = np.flatnonzero(world.user_joins <= chunk.day)
    activity = world.user_activity[joined] / world.user_activity[joined].sum()
    slate_user = rng.choice(joined, slates, p=activity)
    user = slate_user.repeat(SLATE)
    item = proposed_items(feed, world, rng, (chunk.day, user))
    position = np.tile(np.arange(1, SLATE + 1), slates)
    given = answers(world, rng, (user, item), EXAMINATION[position - 1])
    hour = np.clip(rng.normal(19, 4, slates), 0, 23.99).repeat(SLATE)
    surface = SURFACES[rng.choice(3, slates, p=[0.7, 0.2, 0.1])].repeat(SLATE)
    shown = {
        "user": user,
        "item": item,
        "shown_at_ms": midnight_ms(feed, chunk.day)
        + (hour * 3_600_000).astype(np.int64)
        + position,
        "surface": surface,
        "position": position.astype(np.int8),
        # Every order of a slate's items is equally likely.
        "list_propensity": np.full(len(user), 1.0 / SLATE, np.float32),
    }
    return log_and_truth(shown, given)


def midnight_ms(feed: Feed, day: int) -> int:
    """The start of a numbered day, in milliseconds since 1970."""
    return (feed.first_day + timedelta(days=day) - date(1970, 1, 1)).days * 86_400_000


def proposed_items(
    feed: Feed, world: World, rng: np.random.Generator, of: tuple[int, np.ndarray]
) -> np.ndarray:
    """What the logging policy shows in each place: [N] items.

    Of two proposals, the second favouring fresh items, the one of higher noisy affinity.

    Args:
        of: the number of the day, and the user of each place [N].
    """
    day, user = of
    rows, available = len(user), int(np.searchsorted(world.item_appears, day, side="right"))
    one = rng.integers(0, available, rows)
    two = (available * rng.beta(3, 1, rows)).astype(np.int64)
    affinity = [
        (world.user_taste[user] * world.item_taste[i]).sum(1) / TASTES + rng.gumbel(size=rows)
        for i in (one, two)
    ]
    return np.where(affinity[0] > affinity[1], one, two)


@dataclass(frozen=True)
class Answers:
    """Labels of N impressions, and the true probabilities that they were drawn from."""

    click: np.ndarray
    like: np.ndarray
    watch: np.ndarray
    click_probability: np.ndarray
    like_given_click: np.ndarray
    expected_log1p_watch: np.ndarray
    examined: np.ndarray


def answers(
    world: World,
    rng: np.random.Generator,
    pairs: tuple[np.ndarray, np.ndarray],
    examined: np.ndarray,
    interest: np.ndarray | float = 1.0,
) -> Answers:
    """What users answer to items.

    Args:
        pairs: user and item of each impression [N].
        examined: [N], probability that the position is examined.
        interest: [N] or one, factor of the click probability.
    """
    click_p, like_p, watch_mean = truth(world, *pairs, examined * interest)
    rows = len(examined)
    click = rng.random(rows) < click_p
    like = click & (rng.random(rows) < like_p)
    watch = np.where(click, np.expm1(np.clip(rng.normal(watch_mean, 0.5), 0, 8)), 0.0)
    return Answers(click, like, watch, click_p, like_p, watch_mean, examined)


def log_and_truth(
    shown: dict[str, np.ndarray], given: Answers
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The log's rows and their true probabilities, of what was shown and answered."""
    log = pl.DataFrame(shown).with_columns(
        pl.Series("propensity", given.examined.astype(np.float32)),
        pl.Series("click", given.click.astype(np.int8)),
        pl.Series("watch_seconds", given.watch.astype(np.float32)),
        pl.Series("like", given.like.astype(np.int8)),
    )
    hidden = log.select("user", "item", "shown_at_ms").with_columns(
        pl.Series("click_probability", given.click_probability),
        pl.Series("like_given_click", given.like_given_click),
        pl.Series("expected_log1p_watch", given.expected_log1p_watch),
    )
    return log, hidden


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))
