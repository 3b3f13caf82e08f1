"""What a ranking does to the next day's log: policies that train on what they have shown.

Every policy starts from the same simulated feed. Each night it trains on the log, ranks the next
day's candidates, and simulated users answer (`logs/respond.py`: fatigue, drift of tastes, users who
come more often if they like what they see, new items). All figures are of true probabilities.

- `item popularity`, `LightGBM` (one model per objective; left out where it is not installed),
  `boosted trees` (this project's, one per objective), `shared_bottom`, `mmoe`: a new model every
  night, without promotion;
- `mmoe, promoted`: the model changes only if a challenger is promoted. The gain of each challenger
  by the truth is that of its lists of the next day over those of the champion;
- `mmoe, exploration`: half of the users' lists are randomised, and off-policy estimates of each
  night's model are compared with the truth;
- `mmoe, engagement only`: likes have no weight in the blend.

Regret is 1 - value / value of the best list of the same candidates by the truth, with clicks and
liked clicks weighted as in the project's blend and positions by examination. Intervals are over
seeds, each with a world of its own; differences are paired by seed. Homogeneity is the mean Jaccard
index of two users' lists (Chaney et al., RecSys 2018), here beside the value of an impression.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE
from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.evaluation.intervals import Interval, mean_interval
from mtl_ranker.evaluation.off_policy import off_policy, randomised, reordered
from mtl_ranker.features.aggregates import aggregate_history
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.features.lists import list_ids
from mtl_ranker.features.point_in_time import AsOf
from mtl_ranker.features.view import examples_dataset
from mtl_ranker.logs.respond import (
    Behaviour,
    SimulatedFeed,
    respond,
    true_values,
    world_on,
    write_candidates,
)
from mtl_ranker.logs.simulate import Feed, simulate
from mtl_ranker.logs.sources import open_source
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.contenders import Contender, train_model, trees_alone, with_trees
from mtl_ranker.nightly.popularity import fit_popularity
from mtl_ranker.nightly.promotion import Decision, compare_artifacts
from mtl_ranker.nightly.results import predicted_rows
from mtl_ranker.nightly.suite import blended_score
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.candidates import prepared_candidates
from mtl_ranker.ranking.rules import DESCENDING, ORDER, PAIR
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.studies.lightgbm_baseline import tree_inputs
from mtl_ranker.training.batches import Examples, encode_examples
from mtl_ranker.training.dataset import Dataset, load_dataset
from mtl_ranker.workspace import Workspace, write_json

TOP = 10
WEIGHTS = {"click": 1.0, "like": 2.0}
EXPLORATION = {"temperature": 0.5, "share": 0.5}
SETTINGS: dict[str, Any] = {
    "name": "closed_loop",
    "log": {
        "user": "user",
        "item": "item",
        "timestamp": "shown_at_ms",
        "position": "position",
        "propensity": "list_propensity",
        "context": ["surface"],
        "items": {
            "path": "items.parquet",
            "key": "item",
            "columns": ["topic", "creator"],
            "published": "published",
        },
    },
    "objectives": [
        {"name": "click", "group": "engagement", "label": "click"},
        {"name": "like", "group": "satisfaction", "label": '"like"'},
    ],
    "features": {
        "windows": [1, 7],
        "rates": "relative",
        "entities": [["user_id"], ["item_id"], ["creator"], ["user_id", "topic"]],
        "categoricals": [
            {"column": "topic"},
            {"column": "creator", "min_count": 5},
            {"column": "item_id", "min_count": 20},
        ],
    },
    "split": {"warmup_days": 1, "train_days": 5},
    "training": {"epochs": 3, "spread_seeds": 0, "refit": False, "trees": 60},
    "off_policy": {"min_support": 50},
    "promotion": {"max_seconds_per_million": 1e6, "require_spread": False},
    "scoring": {"top_k": TOP, "candidates": "candidates", "weights": WEIGHTS},
}


@dataclass(frozen=True)
class Policy:
    """How a night makes its model.

    Attributes:
        preset: of a network; None for item popularity.
        trees: boosted trees instead of the network.
        lightgbm: LightGBM instead of it.
        promotion: only a promoted model replaces the champion.
        scoring: changes of `[scoring]`.
    """

    preset: str | None
    trees: bool = False
    lightgbm: bool = False
    promotion: bool = False
    scoring: Mapping[str, Any] | None = None

    @property
    def project(self) -> Project:
        scoring = SETTINGS["scoring"] | dict(self.scoring or {})
        models = {self.preset or "linear": {"preset": self.preset or "linear"}}
        return Project.model_validate(SETTINGS | {"scoring": scoring, "models": models})


REFERENCE, PROMOTED, EXPLORING = "mmoe", "mmoe, promoted", "mmoe, exploration"
FULL = {"nights": 60, "seeds": 5}
SHOWN = 10  # nights in a table
LIGHTGBM = {"objective": "binary", "learning_rate": 0.05, "num_leaves": 15, "verbosity": -1}
POLICIES = {
    "item popularity": Policy(None),
    "LightGBM": Policy("linear", lightgbm=True),
    "boosted trees": Policy("linear", trees=True),
    "shared_bottom": Policy("shared_bottom"),
    REFERENCE: Policy("mmoe"),
    PROMOTED: Policy("mmoe", promotion=True),
    EXPLORING: Policy("mmoe", scoring={"exploration": EXPLORATION}),
    "mmoe, engagement only": Policy("mmoe", scoring={"weights": {"click": 1.0, "like": 0.0}}),
}


@dataclass(frozen=True)
class OneByOne:
    """LightGBM, one model per objective, on the rows as they are encoded for the networks."""

    encoder: Encoder
    models: Mapping[str, Any]

    @classmethod
    def fitted(cls, dataset: Dataset, seed: int = 0) -> OneByOne:
        """With early stopping on the validation rows."""
        import lightgbm

        inputs = {part: tree_inputs(rows) for part, rows in dataset.examples.items()}
        models = {}
        for t, task in enumerate(dataset.tasks):
            labels = {
                part: np.ascontiguousarray(rows.labels[:, t].numpy())
                for part, rows in dataset.examples.items()
            }
            sets = {
                part: lightgbm.Dataset(inputs[part], labels[part]) for part in ("train", "validate")
            }
            models[task.name] = lightgbm.train(
                LIGHTGBM | {"seed": seed, "num_threads": torch.get_num_threads()},
                sets["train"],
                num_boost_round=300,
                valid_sets=[sets["validate"]],
                callbacks=[lightgbm.early_stopping(20, verbose=False)],
            )
        return cls(dataset.encoder, models)

    def predict(self, rows: Examples) -> np.ndarray:
        """Probabilities [N, T]."""
        inputs = tree_inputs(rows)
        return np.stack([model.predict(inputs) for model in self.models.values()], 1)

    def publish(self, context: Context, day: date) -> Path:
        """Rank the candidates of day D, as `score_day` does, without rules; returns the file."""
        aggregate_history(context, day)
        candidates = prepared_candidates(context, day).collect().unique(PAIR, maintain_order=True)
        as_of = AsOf.build(context, candidates.lazy(), day)
        frame = as_of.join(candidates.lazy()).collect(engine="streaming")
        prediction = self.predict(encode_examples(self.encoder, frame, []))
        scored = frame.select(PAIR).with_columns(
            pl.Series("score", blended_score(context.project, prediction))
        )
        ranked = scored.sort(ORDER, descending=DESCENDING).with_columns(
            rank=pl.int_range(1, pl.len() + 1).over("user_id")
        )
        path = context.workspace.root / f"rankings/date={day}/part-0.parquet"
        with context.workspace.staged(path) as temporary:
            ranked.filter(pl.col("rank") <= TOP).write_parquet(temporary)
        return path


Model = RankerArtifact | OneByOne


def ranked_by(context: Context, model: Model, day: date, version: str) -> tuple[Path, float]:
    """The file of a day's ranking, and what exploration changed of the score."""
    if isinstance(model, OneByOne):
        return model.publish(context, day), 0.0
    artifact = replace(model, project=context.project)
    ranked = score_day(context, RegisteredRanker(artifact, version), day)
    cost = [effect.change for effect in ranked.effects if effect.step == "exploration"]
    return Path(ranked.path), cost[0] if cost else 0.0


@dataclass(frozen=True)
class Tonight:
    """What a night made.

    Attributes:
        model: that ranks D + 1.
        new: whether it is another one than that of the night before.
        challenger: a model that was compared with the champion, if one was, and what was estimated.
        estimates: off-policy estimates beside the truth.
    """

    model: Model
    new: bool
    estimates: list[dict[str, Any]]
    challenger: tuple[Model, Decision] | None = None


def night(context: Context, policy: Policy, day: date, champion: Model | None) -> Tonight:
    split = build_split(context, day)
    if policy.preset is None:
        rows = context.workspace.scan(examples_dataset(context), split.train)
        return Tonight(fit_popularity(context.project, rows, None), True, [])
    dataset = load_dataset(context, day)
    if policy.lightgbm:
        model = OneByOne.fitted(dataset)
        return Tonight(model, True, [])
    spec = make(policy.preset, {"preset": policy.preset}, len(dataset.tasks))
    run = train_model(context.project, dataset, Contender(policy.preset, spec, 0))
    if policy.trees:
        run = trees_alone(dataset, with_trees(context.project, dataset, run))
    estimates = estimated(context, dataset, run.test_prediction, day)
    if not policy.promotion or not isinstance(champion, RankerArtifact):
        return Tonight(run.artifact, True, estimates)
    decision = compare_artifacts(context, day, run.artifact, champion)
    kept = run.artifact if decision.promoted else champion
    return Tonight(kept, decision.promoted, estimates, (run.artifact, decision))


def estimated(
    context: Context, dataset: Dataset, prediction: np.ndarray, day: date
) -> list[dict[str, Any]]:
    """Off-policy estimates of predictions [N, T] of the held-out rows, beside the truth."""
    held_out = dataset.held_out
    predicted = predicted_rows(held_out, prediction)
    score = blended_score(context.project, prediction)
    estimates = []
    for each in off_policy(context.project, held_out.frame, predicted, score):
        truth = true_reordering(context, held_out.frame, score, each.objective)
        found = {"night": day, "objective": each.objective, "truth": truth}
        found |= {"logged": each.logged, "refused": each.refused, "rows": each.rows}
        for name in ("ips", "snips", "dr"):
            value: Interval | None = getattr(each, name)
            found[name] = None if value is None else [value.value, value.low, value.high]
        estimates.append(found)
    return estimates


def true_reordering(
    context: Context, frame: pl.DataFrame, score: np.ndarray, objective: str
) -> float:
    """True mean label of the randomised lists of held-out rows, each in the order of the score.

    The probability of a row without its position's examination, times that of its new position.
    """
    files = [
        context.source.root / f"truth/date={day}" for day in frame["date"].unique().sort().to_list()
    ]
    hidden = pl.concat([pl.read_parquet(file) for file in files])
    rows = frame.select("user_id", "item_id", "position", "propensity").with_columns(
        shown_at_ms=frame["timestamp"].dt.epoch("ms")
    )
    keys = ["user_id", "item_id", "shown_at_ms"]
    hidden = hidden.rename({"user": "user_id", "item": "item_id"})
    # Two visits of a user within a millisecond are one event of the ingested log.
    rows = rows.join(hidden.unique(keys, keep="first"), on=keys, how="left", maintain_order="left")
    order = reordered(frame, score, list_ids(frame, context.project.log.list_keys))
    moved = np.sqrt(order.position / order.new_position)  # examination is 1 / √position
    value = rows["click_probability"].to_numpy() * moved
    if objective == "like":
        value = value * rows["like_given_click"].to_numpy()
    chosen = randomised(order, rows["propensity"].to_numpy())
    return float(value[chosen].mean()) if chosen.any() else float("nan")


@dataclass(frozen=True)
class Truth:
    """The true values of a day's candidates, clicks and likes weighted as in the blend.

    Attributes:
        candidates: user, item, value.
    """

    candidates: pl.DataFrame

    @classmethod
    def of(cls, simulated: SimulatedFeed, folder: Path, day: date) -> Truth:
        world = world_on(simulated, (day - simulated.feed.first_day).days)
        weights = np.array([WEIGHTS["click"], WEIGHTS["like"]])
        candidates = pl.read_parquet(folder / f"candidates/date={day}")
        pairs = candidates["user"].to_numpy(), candidates["item"].to_numpy()
        values = pl.Series("value", true_values(world, pairs) @ weights)
        return cls(candidates.select("user", "item").with_columns(values))

    def best(self) -> float:
        """The value of the best lists."""
        rank = pl.col("value").rank("ordinal", descending=True).over("user")
        return self._value(self.candidates.with_columns(rank=rank).filter(pl.col("rank") <= TOP))

    def of_lists(self, ranking: pl.DataFrame) -> float:
        """The value of a ranking, positions weighted by examination."""
        shown = ranking.select(user="user_id", item="item_id", rank="rank")
        return self._value(shown.join(self.candidates, on=["user", "item"], how="left"))

    @staticmethod
    def _value(rows: pl.DataFrame) -> float:
        return float((rows["value"].to_numpy() / np.sqrt(rows["rank"].to_numpy())).sum())


def shown_values(
    simulated: SimulatedFeed, folder: Path, day: date, ranking: pl.DataFrame
) -> dict[str, float]:
    """What day D's answers were worth, and the ranking's regret, coverage and homogeneity."""
    number = (day - simulated.feed.first_day).days
    hidden = pl.read_parquet(folder / f"truth/date={day}")
    world = world_on(simulated, number)
    users = int((world.user_joins <= number).sum())
    clicks = hidden["click_probability"].to_numpy()
    likes = clicks * hidden["like_given_click"].to_numpy()
    truth = Truth.of(simulated, folder, day)
    available = int((world.item_appears <= number).sum())
    here, before = (
        pl.read_parquet(folder / f"log/date={each}", columns=["user", "position"])
        for each in (day, day - timedelta(days=1))
    )
    came, yesterday = (set(rows["user"].unique()) for rows in (here, before))
    creators = world.item_creator
    return {
        "clicks": float(clicks.sum()) / users,
        "likes": float(likes.sum()) / users,
        "clicks_per_row": float(clicks.mean()),
        "likes_per_row": float(likes.mean()),
        "visits": float((here["position"] == 1).sum()) / users,
        "present": len(came) / users,
        "returned": len(came - yesterday) / max(users - len(yesterday), 1),
        "regret": 1 - truth.of_lists(ranking) / truth.best(),
        "items": ranking["item_id"].n_unique() / available,
        "creators": len(np.unique(creators[ranking["item_id"].to_numpy()]))
        / len(np.unique(creators[world.item_appears <= number])),
        "homogeneity": homogeneity(ranking),
    }


def homogeneity(ranking: pl.DataFrame) -> float:
    """Mean Jaccard index of the lists of pairs of users (Chaney et al., RecSys 2018)."""
    lists = ranking.group_by("user_id").agg("item_id").sort("user_id")["item_id"].to_list()
    sets = [set(items) for items in lists]
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, len(sets), (2_000, 2))
    found = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs if a != b]
    return float(np.mean(found))


def one_world(seed: int, size: Mapping[str, int], policies: Sequence[str]) -> dict[str, Any]:
    """Policies in the world of a seed: policy → nights, models, challengers and estimates."""
    root = Path(mkdtemp(prefix="closed-loop-"))
    try:
        feed = Feed(
            impressions=size["impressions"],
            days=size["days"],
            users=size["users"],
            items=size["items"],
            seed=seed,
            horizon=size["days"] + size["nights"] + 1,
        )
        simulated = SimulatedFeed(feed, Behaviour(), size["candidates"])
        base = root / "base"
        simulate(feed, base / "feed")
        simulated.save(base / "feed")
        write_candidates(simulated, base / "feed", feed.days)
        start = feed.first_day + timedelta(days=feed.days - 1)
        build_split(opened(POLICIES[REFERENCE], base), start)
        found = {}
        for name in policies:
            folder = shutil.copytree(base, root / "policy")
            found[name] = run_policy(simulated, POLICIES[name], folder, size["nights"])
            shutil.rmtree(folder)
            regret, seconds = found[name]["nights"][-1]["regret"], found[name]["seconds"]
            CONSOLE.print(
                f"[dim]seed {seed}, {name}: regret {regret:.3f} on the last night, "
                f"{seconds / size['nights']:.1f} s a night[/]",
                highlight=False,
            )
        return found
    finally:
        shutil.rmtree(root)


def opened(policy: Policy, folder: Path) -> Context:
    workspace = Workspace(folder / "ws")
    return Context(
        policy.project, open_source(policy.project, folder / "feed", workspace), workspace
    )


def run_policy(
    simulated: SimulatedFeed, policy: Policy, folder: Path, nights: int
) -> dict[str, Any]:
    context, feed = opened(policy, folder), simulated.feed
    model: Model | None = None
    values, estimates, challengers, changed = [], [], [], 0
    began = time.perf_counter()
    for number in range(nights):
        day = feed.first_day + timedelta(days=feed.days - 1 + number)
        tonight = night(context, policy, day, model)
        tomorrow = day + timedelta(days=1)
        truth = Truth.of(simulated, folder / "feed", tomorrow)
        if tonight.challenger is not None and model is not None:
            challenger, decision = tonight.challenger
            own, champion = (
                truth.of_lists(pl.read_parquet(ranked_by(context, each, tomorrow, which)[0]))
                for each, which in ((challenger, "challenger"), (model, "champion"))
            )
            estimate = decision.blended
            challengers.append(
                {
                    "night": day,
                    "promoted": decision.promoted,
                    "true_gain": own / champion - 1,
                    "estimate": None
                    if estimate is None
                    else [estimate.value, estimate.low, estimate.high],
                }
            )
        model, changed = tonight.model, changed + tonight.new
        estimates += tonight.estimates
        path, cost = ranked_by(context, model, tomorrow, "published")
        respond(folder / "feed", path.parent)
        facts = shown_values(simulated, folder / "feed", tomorrow, pl.read_parquet(path))
        values.append(facts | {"exploration": cost})
    return {
        "nights": values,
        "estimates": estimates,
        "challengers": challengers,
        "models": changed,
        "seconds": time.perf_counter() - began,
    }


MEASURES = {
    "clicks": "clicks per user and day",
    "likes": "likes per user and day",
    "likes_per_row": "likes per impression",
    "visits": "visits per user and day",
    "present": "users who come on a day",
    "returned": "absent users who return on a day",
    "regret": "regret",
    "homogeneity": "homogeneity",
    "items": "items shown",
    "creators": "creators shown",
}


COMPARED = ("clicks", "likes", "regret", "present")  # with intervals of the difference


def policies_of(figures: Mapping[str, Any]) -> list[str]:
    """The policies that were run."""
    return [policy for policy in POLICIES if policy in figures["worlds"][0]]


def measures_of(figures: Mapping[str, Any]) -> list[str]:
    """The measures that were taken."""
    return [name for name in MEASURES if name in figures["worlds"][0][REFERENCE]["nights"][0]]


def headings(figures: Mapping[str, Any]) -> list[str]:
    return ["policy", *(MEASURES[name] for name in measures_of(figures))]


def mean_of(world: Mapping[str, Any], policy: str, measure: str) -> float:
    return float(np.mean([each[measure] for each in world[policy]["nights"]]))


def table_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """A row per policy: means over nights and seeds, with intervals where there are seeds."""
    worlds, rows = figures["worlds"], []
    for policy in policies_of(figures):
        cells = [policy]
        for measure in measures_of(figures):
            values = np.array([mean_of(world, policy, measure) for world in worlds])
            text = f"{values.mean():.3f}"
            if measure in COMPARED and policy != REFERENCE and len(worlds) > 1:
                own = np.array([mean_of(world, REFERENCE, measure) for world in worlds])
                gain = mean_interval(values - own)
                text += f" ({gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}])"
            cells.append(text)
        rows.append(cells)
    return rows


def estimate_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """A row per policy and objective: how often intervals cover the truth, or were refused."""
    rows = []
    for policy in ESTIMATED:
        for objective in ("click", "like"):
            found = [
                each
                for world in figures["worlds"]
                for each in world[policy]["estimates"][
                    2:
                ]  # the first night's log is the feed's own
                if each["objective"] == objective
            ]
            given = [each for each in found if each["snips"] is not None]
            cells = [policy, objective, f"{len(found)}", f"{len(found) - len(given)}"]
            for name in ("snips", "dr"):
                hits = sum(e[name][1] <= e["truth"] <= e[name][2] for e in given)
                width = np.mean([e[name][2] - e[name][1] for e in given]) if given else 0.0
                cells.append(f"{hits} of {len(given)}, width {width:.3f}" if given else "–")
            rows.append(cells)
    return rows


def challenger_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """What promotion let through and held back, with the gain of lists by the truth."""
    found = [
        each
        for world in figures["worlds"]
        for each in world.get(PROMOTED, {}).get("challengers", [])
    ]
    rows = []
    for title, promoted in (("let through", True), ("held back", False)):
        own = [each for each in found if each["promoted"] is promoted]
        gains = np.array([each["true_gain"] for each in own])
        mean = "–"
        if len(own) > 1:
            interval = mean_interval(gains)
            mean = f"{interval.value:+.2%} [{interval.low:+.2%}, {interval.high:+.2%}]"
        agree = [
            (each["estimate"][0] > 0) == (each["true_gain"] > 0) for each in own if each["estimate"]
        ]
        rows.append(
            [
                title,
                f"{len(own)}",
                mean,
                f"{int((gains > 0).sum())}" if len(own) else "–",
                f"{sum(agree)} of {len(agree)}" if agree else "–",
            ]
        )
    return rows


def row_value(night: Mapping[str, float]) -> float:
    """The true value of an impression, clicks and likes weighted as in the blend."""
    return WEIGHTS["click"] * night["clicks_per_row"] + WEIGHTS["like"] * night["likes_per_row"]


def homogeneity_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Homogeneity beside the value of an impression, first and last third of the nights."""
    rows = []
    for policy in policies_of(figures):
        cells = [policy]
        for pick in (itemgetter("homogeneity"), row_value):
            parts = []
            for world in figures["worlds"]:
                values = [pick(each) for each in world[policy]["nights"]]
                third = -(-len(values) // 3)
                parts.append((np.mean(values[:third]), np.mean(values[-third:])))
            first, last = np.mean(parts, 0)
            change = mean_interval(np.array([b - a for a, b in parts])) if len(parts) > 1 else None
            text = "–" if change is None else f"[{change.low:+.3f}, {change.high:+.3f}]"
            cells += [f"{first:.3f}", f"{last:.3f}", f"{last - first:+.3f} {text}"]
        rows.append(cells)
    return rows


def by_night(figures: Mapping[str, Any], measure: str) -> str:
    """Means over worlds of at most ten nights, with half of the interval's width."""
    nights = len(next(iter(figures["worlds"][0].values()))["nights"])
    chosen = np.unique(np.linspace(0, nights - 1, min(nights, SHOWN)).round().astype(int))
    rows = []
    for policy in policies_of(figures):
        cells = [policy]
        for number in chosen:
            values = np.array([w[policy]["nights"][number][measure] for w in figures["worlds"]])
            text = f"{values.mean():.3f}"
            if len(values) > 1:
                interval = mean_interval(values)
                text += f" ± {(interval.high - interval.low) / 2:.3f}"
            cells.append(text)
        rows.append(cells)
    return markdown.table([measure, *(f"night {n + 1}" for n in chosen)], rows)


ESTIMATED = (REFERENCE, EXPLORING)  # policies whose estimates are kept
ESTIMATES = ["policy", "objective", "nights", "refused", "SNIPS covers", "DR covers"]
CHALLENGERS = [
    *("challengers", "number", "true gain of their lists", "better by the truth"),
    "estimate has the sign of the truth",
]
HOMOGENEITY = [
    *("policy", "homogeneity, first third", "last third", "change"),
    *("value of an impression, first third", "last third", "change"),
]


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "closed_loop": markdown.table(headings(figures), table_rows(figures)),
        "closed_loop regret": by_night(figures, "regret"),
        "closed_loop clicks": by_night(figures, "clicks"),
        "closed_loop likes": by_night(figures, "likes"),
        "closed_loop homogeneity": markdown.table(HOMOGENEITY, homogeneity_rows(figures)),
        "closed_loop estimates": markdown.table(ESTIMATES, estimate_rows(figures)),
    }
    if any(world.get(PROMOTED, {}).get("challengers") for world in figures["worlds"]):
        rows = challenger_rows(figures)
        found["closed_loop challengers"] = markdown.table(CHALLENGERS, rows)
    return found


CURVES = ("regret", "clicks", "likes")
SMOOTHED = 7  # nights of a moving mean


def picture(figures: Mapping[str, Any], path: Path) -> None:
    """A row per measure: every policy by night, and its difference to the reference by night.

    The curves are moving means over `SMOOTHED` nights (fewer of a short run) of the worlds. The
    difference is paired by world and has its 95 % interval over worlds.
    """
    figure = Figure(figsize=(12, 3 * len(CURVES)), layout="constrained")
    axes = figure.subplots(len(CURVES), 2, sharex=True)
    for (level, difference), measure in zip(axes, CURVES, strict=True):
        reference = _curves(figures, REFERENCE, measure)
        nights = np.arange(reference.shape[1]) + 1 + (_width(figures) - 1) / 2
        for number, policy in enumerate(policies_of(figures)):
            style = {"color": f"C{number}", "linewidth": 1.2}
            curves = _curves(figures, policy, measure)
            if policy == REFERENCE:
                style = {"color": "black", "linewidth": 2}
            level.plot(nights, curves.mean(0), label=policy, **style)
            if policy != REFERENCE and len(curves) > 1:
                gains = [mean_interval(column) for column in (curves - reference).T]
                difference.plot(nights, [each.value for each in gains], **style)
                low, high = [each.low for each in gains], [each.high for each in gains]
                difference.fill_between(nights, low, high, color=style["color"], alpha=0.1)
        difference.axhline(0.0, color="black", linewidth=2)
        level.set_ylabel(MEASURES[measure])
        difference.set_ylabel(f"difference to {REFERENCE}")
    for axis in axes[-1]:
        axis.set_xlabel("night")
    labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    CONSOLE.print(f"picture: {path}")


def _width(figures: Mapping[str, Any]) -> int:
    """The nights of a moving mean."""
    return max(1, min(SMOOTHED, len(figures["worlds"][0][REFERENCE]["nights"]) // 4))


def _curves(figures: Mapping[str, Any], policy: str, measure: str) -> np.ndarray:
    """Moving means of a policy's measure, [worlds, nights]."""
    kernel = np.full(_width(figures), 1 / _width(figures))
    values = [[night[measure] for night in w[policy]["nights"]] for w in figures["worlds"]]
    return np.array([np.convolve(row, kernel, "valid") for row in values])


def summary(figures: Mapping[str, Any]) -> str:
    regret = {
        policy: np.mean([mean_of(world, policy, "regret") for world in figures["worlds"]])
        for policy in policies_of(figures)
    }
    best = min(regret, key=lambda name: regret[name])
    return (
        f"least regret {regret[best]:.3f} ({best}), mmoe {regret[REFERENCE]:.3f}, "
        f"item popularity {regret['item popularity']:.3f}; {len(figures['worlds'])} worlds"
    )


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--seeds", type=int, default=4, help="worlds")
    options.add_argument("--nights", type=int, default=4)
    options.add_argument("--users", type=int, default=200)
    options.add_argument("--items", type=int, default=300)
    options.add_argument("--impressions", type=int, default=16_000, help="of the feed's own log")
    options.add_argument("--candidates", type=int, default=40, help="of each user and day")
    options.add_argument("--jobs", type=int, default=1, help="worlds at a time")
    options.add_argument("--keep", type=Path, help="folder of finished worlds, which are not rerun")
    options.add_argument("--picture", type=Path, help="write the curves by night to this file")
    options.add_argument(
        "--figures", type=Path, help="draw --picture from this results file, run nothing"
    )
    chosen = results.parse(options)
    if chosen.figures:
        if not chosen.picture:
            options.error("--figures takes --picture")
        picture(json.loads(chosen.figures.read_text("utf-8"))["figures"], chosen.picture)
        return
    size = {"days": 8, "nights": chosen.nights, "users": chosen.users, "items": chosen.items}
    size |= {"impressions": chosen.impressions, "candidates": chosen.candidates}
    policies = list(POLICIES)
    if find_spec("lightgbm") is None:
        policies.remove("LightGBM")
        CONSOLE.print("without LightGBM: not installed (pip install 'mtl_ranker[studies]')")
    began = time.perf_counter()
    figures: dict[str, Any] = {"size": size, "worlds": worlds(chosen, size, policies)}
    for world in figures["worlds"]:
        for name in set(world) - {*ESTIMATED}:
            world[name]["estimates"] = []
    for title, names, rows in (
        ("Means over nights; difference to mmoe, paired by seed", headings(figures), table_rows),
        ("Homogeneity and value", HOMOGENEITY, homogeneity_rows),
        (f"Challengers of {PROMOTED}", CHALLENGERS, challenger_rows),
        ("Off-policy estimates and the truth", ESTIMATES, estimate_rows),
    ):
        results.show(CONSOLE, names, rows(figures), title)
    found: list[dict[str, Any]] = figures["worlds"]
    each = float(np.mean([own["seconds"] for world in found for own in world.values()]))
    each /= chosen.nights
    hours = each * FULL["nights"] * FULL["seeds"] * len(policies) / chosen.jobs / 3600
    CONSOLE.print(
        f"{each:.1f} s per night and policy in one process, "
        f"{(time.perf_counter() - began) / 60:.1f} min in all. The full form is "
        f"--nights {FULL['nights']} --seeds {FULL['seeds']}: about {hours:.1f} h at these sizes "
        f"with --jobs {chosen.jobs}",
        highlight=False,
    )
    if chosen.picture:
        picture(figures, chosen.picture)
    results.write(chosen, figures)


def worlds(
    chosen: argparse.Namespace, size: Mapping[str, int], policies: Sequence[str]
) -> list[dict[str, Any]]:
    """The world of each seed, some at a time in processes with one thread each."""
    seeds = range(chosen.seeds)
    run = partial(kept_world, size=size, policies=policies, folder=chosen.keep)
    if chosen.jobs == 1:
        return [run(seed) for seed in seeds]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(chosen.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        return list(pool.map(run, seeds))


def kept_world(
    seed: int, size: Mapping[str, int], policies: Sequence[str], folder: Path | None
) -> dict[str, Any]:
    """`one_world`, or the same of an earlier run from the folder."""
    if folder is None:
        return one_world(seed, size, policies)
    made_of = {"seed": seed, "size": dict(size), "policies": list(policies)}
    path = folder / f"world-{seed}.json"
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if kept.get("made_of") != made_of:
        kept = {"made_of": made_of, "world": one_world(seed, size, policies)}
        write_json(path, kept)
    return kept["world"]


if __name__ == "__main__":
    main()
