"""What a ranking does to the next day's log: policies that train on what they have shown.

Every policy starts from the same simulated feed. Each night it trains on the log, ranks the next
day's candidates, and simulated users answer (`logs/respond.py`: fatigue, drift of tastes, users who
come more often if they like what they see, new items). All figures are of true probabilities.

- `item popularity`, `boosted trees` (one model per objective), `shared_bottom`, `mmoe`: a new model
  every night;
- `mmoe, promoted`: the model changes only if a challenger is promoted;
- `mmoe, exploration`: half of the users' lists are randomised, and off-policy estimates of each
  night's model are compared with the truth;
- `mmoe, engagement only`: likes have no weight in the blend.

Regret is 1 - value / value of the best list of the same candidates by the truth, with clicks and
liked clicks weighted as in the project's blend and positions by examination. Intervals are over
seeds, each with a world of its own; differences are paired by seed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE
from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.evaluation.intervals import Interval, mean_interval
from mtl_ranker.evaluation.off_policy import off_policy, randomised, reordered
from mtl_ranker.features.lists import list_ids
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
from mtl_ranker.nightly.promotion import compare_artifacts
from mtl_ranker.nightly.results import predicted_rows
from mtl_ranker.nightly.suite import blended_score
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.training.dataset import load_dataset
from mtl_ranker.workspace import Workspace

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
    "promotion": {"max_seconds_per_million": 1e6},
    "scoring": {"top_k": TOP, "candidates": "candidates", "weights": WEIGHTS},
}


@dataclass(frozen=True)
class Policy:
    """How a night makes its model.

    Attributes:
        preset: of a network; None for item popularity.
        trees: boosted trees instead of the network.
        promotion: only a promoted model replaces the champion.
        scoring: changes of `[scoring]`.
    """

    preset: str | None
    trees: bool = False
    promotion: bool = False
    scoring: Mapping[str, Any] | None = None

    @property
    def project(self) -> Project:
        scoring = SETTINGS["scoring"] | dict(self.scoring or {})
        models = {self.preset or "linear": {"preset": self.preset or "linear"}}
        return Project.model_validate(SETTINGS | {"scoring": scoring, "models": models})


REFERENCE = "mmoe"
POLICIES = {
    "item popularity": Policy(None),
    "boosted trees": Policy("linear", trees=True),
    "shared_bottom": Policy("shared_bottom"),
    REFERENCE: Policy("mmoe"),
    "mmoe, promoted": Policy("mmoe", promotion=True),
    "mmoe, exploration": Policy("mmoe", scoring={"exploration": EXPLORATION}),
    "mmoe, engagement only": Policy("mmoe", scoring={"weights": {"click": 1.0, "like": 0.0}}),
}


def night(
    context: Context, policy: Policy, day: date, champion: RankerArtifact | None
) -> tuple[RankerArtifact, bool, list[dict[str, Any]]]:
    """The model that ranks D + 1, whether it is new, and estimates beside the truth."""
    split = build_split(context, day)
    if policy.preset is None:
        rows = context.workspace.scan(examples_dataset(context), split.train)
        return fit_popularity(context.project, rows, None), True, []
    dataset = load_dataset(context, day)
    spec = make(policy.preset, {"preset": policy.preset}, len(dataset.tasks))
    run = train_model(context.project, dataset, Contender(policy.preset, spec, 0))
    if policy.trees:
        run = trees_alone(dataset, with_trees(context.project, dataset, run))
    held_out = dataset.held_out
    predicted = predicted_rows(held_out, run.test_prediction)
    score = blended_score(context.project, run.test_prediction)
    estimates = []
    for each in off_policy(context.project, held_out.frame, predicted, score):
        truth = true_reordering(context, held_out.frame, score, each.objective)
        found = {"night": day, "objective": each.objective, "truth": truth}
        found |= {"logged": each.logged, "refused": each.refused, "rows": each.rows}
        for name in ("ips", "snips", "dr"):
            value: Interval | None = getattr(each, name)
            found[name] = None if value is None else [value.value, value.low, value.high]
        estimates.append(found)
    if policy.promotion and champion is not None:
        decision = compare_artifacts(context, day, run.artifact, champion)
        return (
            (run.artifact, True, estimates) if decision.promoted else (champion, False, estimates)
        )
    return run.artifact, True, estimates


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
    rows = rows.join(hidden, on=keys, how="left", maintain_order="left")
    order = reordered(frame, score, list_ids(frame, context.project.log.list_keys))
    moved = np.sqrt(order.position / order.new_position)  # examination is 1 / √position
    value = rows["click_probability"].to_numpy() * moved
    if objective == "like":
        value = value * rows["like_given_click"].to_numpy()
    chosen = randomised(order, rows["propensity"].to_numpy())
    return float(value[chosen].mean()) if chosen.any() else float("nan")


def shown_values(simulated: SimulatedFeed, folder: Path, ranking: pl.DataFrame) -> dict[str, float]:
    """What day D's answers were worth, and the ranking's regret, coverage and homogeneity."""
    feed = simulated.feed
    day = max(folder.glob("log/date=*")).name.removeprefix("date=")
    number = (date.fromisoformat(day) - feed.first_day).days
    hidden = pl.read_parquet(folder / f"truth/date={day}")
    world = world_on(simulated, number)
    users = int((world.user_joins <= number).sum())
    clicks = hidden["click_probability"].to_numpy()
    likes = clicks * hidden["like_given_click"].to_numpy()
    weights = np.array([WEIGHTS["click"], WEIGHTS["like"]])
    candidates = pl.read_parquet(folder / f"candidates/date={day}")
    pairs = candidates["user"].to_numpy(), candidates["item"].to_numpy()
    candidates = candidates.with_columns(value=pl.Series(true_values(world, pairs) @ weights))
    best = candidates.with_columns(
        rank=pl.col("value").rank("ordinal", descending=True).over("user")
    ).filter(pl.col("rank") <= TOP)
    shown = ranking.select(user="user_id", item="item_id", rank="rank").join(
        candidates, on=["user", "item"], how="left"
    )

    def value(rows: pl.DataFrame) -> float:
        return float((rows["value"].to_numpy() / np.sqrt(rows["rank"].to_numpy())).sum())

    available = int((world.item_appears <= number).sum())
    first = pl.read_parquet(folder / f"log/date={day}")["position"] == 1
    creators = world.item_creator
    return {
        "clicks": float(clicks.sum()) / users,
        "likes": float(likes.sum()) / users,
        "clicks_per_row": float(clicks.mean()),
        "likes_per_row": float(likes.mean()),
        "visits": float(first.sum()) / users,
        "regret": 1 - value(shown) / value(best),
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


def one_world(seed: int, size: Mapping[str, int], on_step: Callable[[str], None]) -> dict[str, Any]:
    """Every policy in the world of a seed: policy → nights, promotions and estimates."""
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
        for name, policy in POLICIES.items():
            folder = shutil.copytree(base, root / "policy")
            found[name] = run_policy(simulated, policy, folder, size["nights"])
            shutil.rmtree(folder)
            on_step(f"seed {seed}, {name}: regret {found[name]['nights'][-1]['regret']:.3f}")
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
    champion: RankerArtifact | None = None
    values, estimates, changed = [], [], 0
    for number in range(nights):
        day = feed.first_day + timedelta(days=feed.days - 1 + number)
        champion, new, found = night(context, policy, day, champion)
        changed += new
        estimates += found
        artifact = replace(champion, project=context.project)
        ranked = score_day(context, RegisteredRanker(artifact, "1"), day + timedelta(days=1))
        respond(folder / "feed", ranked.path.parent)
        cost = [effect.change for effect in ranked.effects if effect.step == "exploration"]
        facts = shown_values(simulated, folder / "feed", pl.read_parquet(ranked.path))
        values.append(facts | {"exploration": cost[0] if cost else 0.0})
    return {"nights": values, "estimates": estimates, "models": changed}


MEASURES = {
    "clicks": "clicks per user and day",
    "likes": "likes per user and day",
    "likes_per_row": "likes per impression",
    "visits": "visits per user and day",
    "regret": "regret",
    "homogeneity": "homogeneity",
    "items": "items shown",
    "creators": "creators shown",
}


def mean_of(world: Mapping[str, Any], policy: str, measure: str) -> float:
    return float(np.mean([each[measure] for each in world[policy]["nights"]]))


def table_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """A row per policy: means over nights and seeds, with intervals where there are seeds."""
    worlds, rows = figures["worlds"], []
    for policy in POLICIES:
        cells = [policy]
        for measure in MEASURES:
            values = np.array([mean_of(world, policy, measure) for world in worlds])
            text = f"{values.mean():.3f}"
            if measure in ("clicks", "likes", "regret") and policy != REFERENCE and len(worlds) > 1:
                own = np.array([mean_of(world, REFERENCE, measure) for world in worlds])
                gain = mean_interval(values - own)
                text += f" ({gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}])"
            cells.append(text)
        rows.append(cells)
    return rows


def estimate_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """A row per policy and objective: how often intervals cover the truth, or were refused."""
    rows = []
    for policy in ("mmoe", "mmoe, exploration"):
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


HEADINGS = ["policy", *MEASURES.values()]
ESTIMATES = ["policy", "objective", "nights", "refused", "SNIPS covers", "DR covers"]


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    nights = len(next(iter(figures["worlds"][0].values()))["nights"])
    by_night = [
        [policy]
        + [
            f"{np.mean([w[policy]['nights'][n]['regret'] for w in figures['worlds']]):.3f}"
            for n in range(nights)
        ]
        for policy in POLICIES
    ]
    return {
        "closed_loop": markdown.table(HEADINGS, table_rows(figures)),
        "closed_loop regret": markdown.table(
            ["regret", *(f"night {n + 1}" for n in range(nights))], by_night
        ),
        "closed_loop estimates": markdown.table(ESTIMATES, estimate_rows(figures)),
    }


def summary(figures: Mapping[str, Any]) -> str:
    regret = {
        policy: np.mean([mean_of(world, policy, "regret") for world in figures["worlds"]])
        for policy in POLICIES
    }
    best = min(regret, key=lambda name: regret[name])
    return (
        f"least regret {regret[best]:.3f} ({best}), mmoe {regret[REFERENCE]:.3f}, "
        f"item popularity {regret['item popularity']:.3f}; {len(figures['worlds'])} worlds"
    )


def printed(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, help="worlds")
    options.add_argument("--nights", type=int, default=5)
    options.add_argument("--users", type=int, default=300)
    options.add_argument("--items", type=int, default=400)
    options.add_argument("--impressions", type=int, default=24_000, help="of the feed's own log")
    options.add_argument("--candidates", type=int, default=60, help="of each user and day")
    chosen = results.parse(options)
    size = {"days": 8, "nights": chosen.nights, "users": chosen.users, "items": chosen.items}
    size |= {"impressions": chosen.impressions, "candidates": chosen.candidates}
    torch.manual_seed(0)

    def on_step(message: str) -> None:
        CONSOLE.print(f"[dim]{message}[/]", highlight=False)

    figures = {
        "size": size,
        "worlds": [one_world(seed, size, on_step) for seed in range(chosen.seeds)],
    }
    printed("Means over nights; difference to mmoe, paired by seed", HEADINGS, table_rows(figures))
    printed("Off-policy estimates and the truth", ESTIMATES, estimate_rows(figures))
    results.write(chosen, figures)


if __name__ == "__main__":
    main()
