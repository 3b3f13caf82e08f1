"""Simulated responses to a published ranking, as the log of the next day.

The true probabilities are those of the feed (`logs/simulate.py`), with these additions:

- **lists**: a user with a ranking is shown its list, others the logging policy's slates;
- **fatigue**: interest in an item falls with the impressions of it that the user has had on the
  last days and earlier on the day, as 1 / (1 + fatigue · impressions);
- **drift**: after the last day of the feed's own log, preference vectors turn slowly in random
  directions; the random walk of a feed with `drift` continues;
- **returns**: on the days on which users come they come more often the more they liked of what
  they were shown on the last days, and as often as before when they have been away;
- **leaving**: the odds that a user comes at all on a day grow with how much it liked of its last
  days with visits, however long ago. The days until it returns are then geometric with a parameter
  that depends on the satisfaction of its last sessions: the structure of KuaiSim's retention model
  (Zhao et al., NeurIPS 2023), with the rate of likes as satisfaction;
- **new items** and new users, up to the feed's horizon.

Random numbers come from the feed's seed and the day, so the same ranking has the same responses.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.simulate import (
    SLATE,
    SURFACES,
    TASTES,
    TOPICS,
    Feed,
    World,
    answers,
    log_and_truth,
    make_world,
    midnight_ms,
    proposed_items,
    truth,
)
from mtl_ranker.logs.simulate import world_on as feed_world_on
from mtl_ranker.workspace import Workspace

FEED = "feed.json"
RECENT = 3  # days of fatigue and returns; days with visits of leaving
MEMORY = 28  # days after which visits are forgotten
PRIOR = 20.0  # impressions at the mean rate of likes, for the rate of a user


@dataclass(frozen=True)
class Behaviour:
    """How users change with what they are shown.

    Attributes:
        fatigue: see the module.
        drift: radians a day.
        returns: exponent of a user's relative rate of likes in the number of visits; 0 for none.
        leaving: probability that a user with the mean rate of likes does not come on a day.
        retention: exponent of the relative rate of likes in the odds of coming.
    """

    fatigue: float = 0.3
    drift: float = 0.02
    returns: float = 0.5
    leaving: float = 0.3
    retention: float = 1.0


@dataclass(frozen=True)
class SimulatedFeed:
    """A feed on disk: its settings, the users' behaviour, and candidates of each user and day."""

    feed: Feed
    behaviour: Behaviour = Behaviour()
    candidates: int = 0

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, default=str)
        Workspace(folder).publish_file(FEED, text)

    @classmethod
    def load(cls, folder: Path) -> SimulatedFeed:
        """Raises ProjectError for a folder without a simulated feed."""
        file = folder / FEED
        if not file.is_file():
            raise ProjectError(f"{file}: not found; make the feed with `mtl-ranker simulate`")
        content = json.loads(file.read_text("utf-8"))
        first = date.fromisoformat(content["feed"].pop("first_day"))
        feed = Feed(**content["feed"], first_day=first)
        return cls(feed, Behaviour(**content["behaviour"]), content["candidates"])


def respond(folder: Path, rankings: Path) -> Path:
    """Answer the ranking of day D and write log/date=D, truth/date=D and candidates/date=D+1.

    Args:
        folder: of the simulated feed.
        rankings: a published ranking, `rankings/date=D` or its file.

    Returns the day's file of the log. Raises ProjectError for what is no ranking of the feed, and
    for a day whose day before is not in the log.
    """
    simulated = SimulatedFeed.load(folder)
    feed = simulated.feed
    if feed.streams:
        raise ProjectError(
            f"{folder}: a feed of streams, to which no answers can be added; allowed: a feed of "
            "joined rows (`mtl-ranker simulate --preset simulated`)"
        )
    day, ranking = _read(rankings)
    number = (day - feed.first_day).days
    before = folder / f"log/date={day - timedelta(days=1)}"
    if not before.is_dir():
        raise ProjectError(f"{before}: not found; the log must hold the day before the ranking's")
    world = world_on(simulated, number)
    users = len(world.user_taste)
    known = ranking.filter(pl.col("user").is_between(0, users - 1))
    known = known.filter(pl.col("item").is_between(0, len(world.item_taste) - 1))
    if known.height < ranking.height:
        raise ProjectError(
            f"{rankings}: {ranking.height - known.height} rows have a user or an item that the "
            f"feed in {folder} does not have"
        )
    rng = np.random.default_rng(np.random.SeedSequence([feed.seed, 7, number]))
    recent = _log_before(folder, day, RECENT)
    comes = rng.random(users) < presence(simulated, _log_before(folder, day, MEMORY))
    rates = visit_rates(simulated, world, number, recent) / (1 - simulated.behaviour.leaving)
    visits = rng.poisson(rates) * comes
    shown = _shown(simulated, (world, number), rng, (ranking, visits))
    counts = recent.group_by("user", "item").agg(pl.len().alias("impressions"))
    rows = shown.join(counts, on=["user", "item"], how="left", maintain_order="left")
    seen = rows["impressions"].fill_null(0).to_numpy() + rows["visit"].to_numpy()
    interest = 1.0 / (1.0 + simulated.behaviour.fatigue * seen)
    pairs = rows["user"].to_numpy(), rows["item"].to_numpy()
    examined = 1.0 / np.sqrt(rows["position"].to_numpy())
    given = answers(world, rng, pairs, examined, interest)
    columns = ("user", "item", "shown_at_ms", "surface", "position", "list_propensity")
    log, hidden = log_and_truth({name: rows[name].to_numpy() for name in columns}, given)
    publisher = Workspace(folder)
    for name, frame in (("truth", hidden), ("log", log)):  # the log last: the day is then whole
        target = folder / name / f"date={day}/part-0.parquet"
        with publisher.staged(target) as temporary:
            frame.cast({"position": pl.Int8} if name == "log" else {}).write_parquet(temporary)
    write_candidates(simulated, folder, number + 1)
    return folder / f"log/date={day}/part-0.parquet"


def world_on(simulated: SimulatedFeed, number: int) -> World:
    """The world on a numbered day: the feed's own, with tastes turned since its log ended."""
    feed = simulated.feed
    world = feed_world_on(feed, make_world(feed), number)
    angle = simulated.behaviour.drift * max(0, number - feed.days + 1)
    rng = np.random.default_rng(np.random.SeedSequence([feed.seed, 5]))
    topics = rng.normal(size=(TOPICS, TASTES))
    favourite = rng.integers(0, TOPICS, (feed.users, 2))
    other = topics[favourite].sum(1) * 0.6 + rng.normal(0, 0.5, (feed.users, TASTES))
    return replace(world, user_taste=np.cos(angle) * world.user_taste + np.sin(angle) * other)


def visit_rates(
    simulated: SimulatedFeed, world: World, number: int, recent: pl.DataFrame
) -> np.ndarray:
    """Expected visits of each user on a numbered day: [users].

    Args:
        recent: the log of the last days.
    """
    feed = simulated.feed
    slates = feed.impressions / SLATE / feed.days
    here = world.user_joins <= number
    rate = slates * world.user_activity * here / world.user_activity[here].sum()
    relative = relative_likes(recent, feed.users)
    return rate * np.clip(relative**simulated.behaviour.returns, 0.3, 3.0)


def presence(simulated: SimulatedFeed, past: pl.DataFrame) -> np.ndarray:
    """P(a user comes on a day) from its last days with visits: [users].

    (1 - p) / p = l / (1 - l) · r^-k, with `leaving` l, `retention` k, and the rate of likes r
    relative to the mean of all users; r = 1 of users without visits.

    Args:
        past: the log of the last `MEMORY` days.
    """
    behaviour = simulated.behaviour
    last = past.filter(pl.col("date").rank("dense", descending=True).over("user") <= RECENT)
    relative = relative_likes(last, simulated.feed.users)
    odds = behaviour.leaving / (1 - behaviour.leaving) / relative**behaviour.retention
    return 1 / (1 + odds)


def relative_likes(rows: pl.DataFrame, users: int) -> np.ndarray:
    """Each user's rate of likes relative to that of all, smoothed: [users]."""
    likes = np.bincount(rows["user"], rows["like"], minlength=users)
    impressions = np.bincount(rows["user"], minlength=users)
    mean = max(float(likes.sum() / max(impressions.sum(), 1)), 1e-3)
    return (likes + PRIOR * mean) / (impressions + PRIOR) / mean


def write_candidates(simulated: SimulatedFeed, folder: Path, number: int) -> None:
    """Write candidates/date=D of a numbered day: every user that has joined, different items each.

    They are what the logging policy would propose, so fresh items are among them. Nothing is
    written where the feed has no candidates.
    """
    if not simulated.candidates:
        return
    feed, world = simulated.feed, world_on(simulated, number)
    rng = np.random.default_rng(np.random.SeedSequence([feed.seed, 6, number]))
    user = np.flatnonzero(world.user_joins <= number).repeat(simulated.candidates)
    item = proposed_items(feed, world, rng, (number, user))
    frame = pl.DataFrame({"user": user, "item": item}).unique(maintain_order=True)
    day = feed.first_day + timedelta(days=number)
    target = folder / f"candidates/date={day}/part-0.parquet"
    with Workspace(folder).staged(target) as temporary:
        frame.write_parquet(temporary)


def _read(rankings: Path) -> tuple[date, pl.DataFrame]:
    """Day and rows of a published ranking, in the feed's names."""
    folder = rankings if rankings.is_dir() else rankings.parent
    file = folder / "part-0.parquet"
    try:
        day = date.fromisoformat(folder.name.removeprefix("date="))
    except ValueError as error:
        raise ProjectError(f"{rankings}: expected rankings/date=YYYY-MM-DD") from error
    if not file.is_file():
        raise ProjectError(f"{file}: not found; expected a published ranking")
    rows = pl.read_parquet(file)
    propensity = pl.col("propensity") if "propensity" in rows.columns else pl.lit(1.0)
    try:
        return day, rows.select(
            pl.col("user_id").cast(pl.Int64).alias("user"),
            pl.col("item_id").cast(pl.Int64).alias("item"),
            pl.col("rank").cast(pl.Int64).alias("position"),
            propensity.cast(pl.Float32).alias("list_propensity"),
        ).sort("user", "position")
    except pl.exceptions.PolarsError as error:
        raise ProjectError(f"{file}: not a ranking of a simulated feed ({error})") from error


def _log_before(folder: Path, day: date, count: int) -> pl.DataFrame:
    """Impressions of as many days before a day, as far as the log has them."""
    frames = []
    for number in range(1, count + 1):
        before = day - timedelta(days=number)
        for file in sorted((folder / f"log/date={before}").glob("*.parquet")):
            rows = pl.read_parquet(file, columns=["user", "item", "like"])
            frames.append(rows.with_columns(pl.lit(before).alias("date")))
    return pl.concat(frames)


def _shown(
    simulated: SimulatedFeed,
    at: tuple[World, int],
    rng: np.random.Generator,
    given: tuple[pl.DataFrame, np.ndarray],
) -> pl.DataFrame:
    """Every impression of the day, with the number of the user's visit from 0.

    Args:
        at: the world, and the number of the day.
        given: the ranking, and the visits of each user.
    """
    (world, number), (ranking, visits) = at, given
    visit = pl.DataFrame({"user": np.arange(len(visits)).repeat(visits)}).with_columns(
        visit=pl.int_range(pl.len()).over("user"),
        hour=pl.Series(np.clip(rng.normal(19, 4, int(visits.sum())), 0, 23.8)),
        surface=pl.Series(SURFACES[rng.choice(3, int(visits.sum()), p=[0.7, 0.2, 0.1])]),
    )
    # A later visit is later on the day.
    visit = visit.with_columns(pl.col("hour").sort().over("user"))
    rest = visit.join(ranking, on="user", how="anti")
    user = rest["user"].to_numpy().repeat(SLATE)
    slates = pl.DataFrame(
        {
            "user": user,
            "visit": rest["visit"].to_numpy().repeat(SLATE),
            "item": proposed_items(simulated.feed, world, rng, (number, user)),
            "position": np.tile(np.arange(1, SLATE + 1), rest.height),
            "list_propensity": np.full(len(user), 1.0 / SLATE, np.float32),
        }
    )
    lists = visit.select("user", "visit").join(ranking, on="user", maintain_order="left")
    lists = lists.sort("user", "visit", "position").select(slates.columns)
    rows = pl.concat([lists, slates]).join(
        visit, on=["user", "visit"], how="left", maintain_order="left"
    )
    start = midnight_ms(simulated.feed, number)
    # A second between visits keeps the positions of one apart from those of the next.
    at_ms = start + (pl.col("hour") * 3_600_000).cast(pl.Int64) + pl.col("visit") * 1_000
    return rows.with_columns((at_ms + pl.col("position")).alias("shown_at_ms"))


def true_values(world: World, pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """P(click) and P(click and like) of examined, fresh impressions: [N, 2]."""
    click, like, _ = truth(world, *pairs)
    return np.stack([click, click * like], 1)
