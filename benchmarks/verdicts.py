"""How often verdicts are wrong: coverage, A/A nights, power by planted gain, and the cost.

Two kinds of nights. Those of known truth train nothing (`known_nights.py`): each interval that a
night prints is compared with the truth of many users and seeds, and verdicts are counted without
and with a planted gain. The others train small MMoEs on a simulated feed. A/A: both sides are the
same model with other seeds, so every verdict is false and every promotion is luck. Planted gain:
one side learns from a share of the training rows only. Each is judged twice: with the bootstrap
over users (and trainings) that resamples rows of predictions, and with `evaluation/intervals.py`.
By list GAUC as well as AUC; rates have Clopper-Pearson intervals over nights. Off-policy estimates
have their own coverage test (tests/evaluation/test_off_policy.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.known_nights import known_nights, rate
from benchmarks.prepared import examples_of
from mtl_ranker.config import Project, Promotion, Training, load_project
from mtl_ranker.evaluation.influence import MEASURE_NAMES, Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import Quality, compare, judge, model_quality
from mtl_ranker.evaluation.metrics import auc_of_own_group, evaluate_all
from mtl_ranker.logs.simulate import Feed, simulate
from mtl_ranker.models.objectives import Task
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.promotion import Evidence, decide
from mtl_ranker.training.batches import take
from mtl_ranker.training.dataset import Dataset
from mtl_ranker.training.loop import Design, Execution, Rows, train_ranker
from mtl_ranker.training.network import predict

CONSOLE = Console(width=150)
MODEL = {"preset": "mmoe", "experts": 2, "expert_hidden": [8]}
TRAINING = Training(batch_size=256, learning_rate=0.01, epochs=3)
SHARES = (0.5, 0.25, 0.1, 0.05)  # of the training rows, that one side of a planted gain learns from
MOST = 3  # seeds of a side
DRAWS = 200
# The bootstrap, one interval of intervals.py by itself, and a verdict among all of the night.
HOW = ("before", "interval", "after")


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        feeds: simulated feeds, each with the same number of nights.
        nights: A/A nights over all feeds.
        planted: nights of each planted gain.
    """

    feeds: int
    nights: int
    planted: int
    impressions: int


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison: trainings with different seeds, on one night's test rows.

    Attributes:
        predictions: [N, T] of each training.
        draws: objective and measure → [S, R], its quality in resamples of users.
    """

    predictions: list[np.ndarray]
    draws: dict[tuple[int, str], np.ndarray]


@dataclass(frozen=True)
class Judging:
    """A feed's test rows, prepared for both ways of judging."""

    project: Project
    parts: Dataset
    rows: dict[str, LabelledRows]
    weights: np.ndarray  # [R, N] resamples of users

    @classmethod
    def of(cls, project: Project, parts: Dataset) -> Judging:
        held_out = parts.held_out
        clusters = Clusters.of(held_out.user, held_out.lists)
        rows = {
            task.name: LabelledRows.of(task.kind, held_out.labels[:, t], clusters)
            for t, task in enumerate(parts.tasks)
        }
        return cls(project, parts, rows, user_draws(clusters))

    @property
    def keys(self) -> list[tuple[int, str]]:
        """Objectives by number, each with the measures it is judged by."""
        measures = [(t, measures_of(task)) for t, task in enumerate(self.parts.tasks)]
        return [(t, measure) for t, own in measures for measure in own]

    def name(self, key: tuple[int, str]) -> str:
        return f"{self.parts.tasks[key[0]].name} {MEASURE_NAMES[key[1]]}"

    def side(self, predictions: list[np.ndarray]) -> Side:
        draws = {}
        for t, measure in self.keys:
            rows = self.rows[self.parts.tasks[t].name]
            draws[t, measure] = np.stack(
                [
                    resampled(rows, p[rows.known, t], self.weights[:, rows.known], measure)
                    for p in predictions
                ]
            )
        return Side(predictions=predictions, draws=draws)

    def quality(self, side: Side, key: tuple[int, str], seeds: int) -> Quality:
        columns = [p[:, key[0]] for p in side.predictions[:seeds]]
        return model_quality(self.rows[self.parts.tasks[key[0]].name], columns, key[1])

    def promoted(self, challenger: Side, champion: Side, seeds: int) -> bool:
        """Whether the first training replaces the other side's; `seeds` give the spread."""
        held_out = self.parts.held_out

        def metrics(side: Side) -> list[dict[str, dict[str, float]]]:
            if seeds < 2:
                return []
            return [
                evaluate_all(self.parts.tasks, held_out.labels, prediction, held_out.lists)
                for prediction in side.predictions[:seeds]
            ]

        evidence = Evidence(
            tasks=self.parts.tasks,
            labels=held_out.labels,
            user=held_out.user,
            lists=held_out.lists,
            challenger=challenger.predictions[0],
            champion=champion.predictions[0],
            challenger_seeds=metrics(challenger),
            champion_seeds=metrics(champion),
        )
        return decide(self.project, evidence).promoted


def measures_of(task: Task) -> list[str]:
    """The measure by which models are compared first."""
    return ["gauc", "auc"] if task.kind == "binary" else ["r2"]


def user_draws(clusters: Clusters) -> np.ndarray:
    """Weights [R, N] of rows in resamples of users."""
    rng = np.random.default_rng(0)
    users = clusters.count
    return rng.multinomial(users, np.full(users, 1 / users), size=DRAWS)[:, clusters.codes]


def resampled(
    rows: LabelledRows, prediction: np.ndarray, weights: np.ndarray, measure: str
) -> np.ndarray:
    """GAUC by list, AUC or R² [R] of labelled rows under weights [R, n]."""
    label, w = rows.label, weights.astype(np.float64)
    if measure == "r2":
        mean = (w @ label) / w.sum(1)
        return 1 - (w @ (label - prediction) ** 2) / (w @ label**2 - w.sum(1) * mean**2)
    if measure == "gauc":
        assert rows.clusters.lists is not None
        own = auc_of_own_group(label, prediction, rows.clusters.lists)
        known = ~np.isnan(own)
        return w[:, known] @ own[known] / w[:, known].sum(1)
    order = np.argsort(prediction)
    w, positive = w[:, order], label[order] > 0.5
    starts = np.flatnonzero(np.r_[True, np.diff(prediction[order]) != 0])
    positives = np.add.reduceat(w * positive, starts, 1)
    negatives = np.add.reduceat(w * ~positive, starts, 1)
    below = np.cumsum(negatives, 1) - negatives / 2
    return (positives * below).sum(1) / (positives.sum(1) * negatives.sum(1))


def bootstrap_verdict(one: np.ndarray, other: np.ndarray) -> int:
    """The verdict of a percentile bootstrap over users and trainings, of draws [S, R] each."""

    def mean(draws: np.ndarray) -> np.ndarray:
        chosen = np.random.default_rng(0).integers(0, len(draws), size=draws.shape)
        return np.take_along_axis(draws, chosen, 0).mean(0)

    low, high = np.quantile(mean(one) - mean(other), [0.025, 0.975])
    return int(low > 0) - int(high < 0)


def project_of() -> Project:
    """The simulated preset with few features, and no condition on calibration."""
    project = load_project("simulated")
    kept = [c for c in project.features.categoricals if c.column != "user_id"]
    features = project.features.model_copy(update={"windows": [3], "categoricals": kept})
    split = project.split.model_copy(update={"train_days": 3, "test_days": 2})
    rule = Promotion(max_calibration_ratio=1e6, max_calibration_shift=1e6, require_spread=False)
    return project.model_copy(update={"features": features, "split": split, "promotion": rule})


def trained(parts: Dataset, seed: int, share: float = 1.0) -> np.ndarray:
    """A training's predictions [N, T] for the test rows."""
    spec = make("mmoe", MODEL, len(parts.tasks))
    rows = parts.examples["train"]
    if share < 1:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        rows = take(rows, chosen[: int(share * len(rows))].sort().values)
    until = Execution(until=[TRAINING.epochs] * len(parts.tasks))
    design = Design(spec, parts.encoder, parts.tasks)
    model = train_ranker(design, Rows(rows), TRAINING, seed, until).model
    return predict(model, parts.examples["test"], parts.tasks)


Judge = Callable[[Judging, Side, Side], list[dict[str, Any]]]


def judged(judging: Judging, one: Side, other: Side) -> list[dict[str, Any]]:
    """The verdicts on two sides with 1, 2, … seeds, before and after, and the promotions.

    The false discovery rate is controlled over a night's objectives, by list GAUC as a night does,
    and apart from that by AUC.
    """
    found = []
    for seeds in range(1, MOST + 1):
        compared = {
            key: compare(judging.quality(one, key, seeds), judging.quality(other, key, seeds))
            for key in judging.keys
        }
        after = judge({key: each for key, each in compared.items() if key[1] != "auc"})
        by_auc = judge({key: each for key, each in compared.items() if key[1] != "gauc"})
        after |= {key: each for key, each in by_auc.items() if key[1] == "auc"}
        found.append(
            {
                "seeds": seeds,
                "promoted": judging.promoted(one, other, seeds),
                "objectives": {
                    judging.name(key): {
                        "gain": compared[key].value,
                        "before": bootstrap_verdict(
                            one.draws[key][:seeds], other.draws[key][:seeds]
                        ),
                        "interval": _sign(after[key].interval),
                        "after": after[key].verdict,
                    }
                    for key in judging.keys
                },
            }
        )
    return found


def _sign(interval: Any) -> int:
    return int(interval.low > 0) - int(interval.high < 0)


def nights(size: Size) -> dict[str, Any]:
    """Every night's verdicts: of A/A nights, and by share of training rows."""
    project = project_of()
    same: list[Any] = []
    planted: dict[str, list[Any]] = {str(share): [] for share in SHARES}
    rows: dict[str, int] = {}
    for number in range(size.feeds):
        feed = Feed(size.impressions, days=8, users=1_500, items=200, seed=number)
        parts = examples_of(project, simulate(feed, Path(mkdtemp(prefix="benchmark-"))))
        judging = Judging.of(project, parts)
        rows = {part: len(examples) for part, examples in parts.examples.items()}
        seeds = iter(range(1_000 * number, 10**9))

        def side(share: float = 1.0, of: Judging = judging, seed: Any = seeds) -> Side:
            return of.side([trained(of.parts, next(seed), share) for _ in range(MOST)])

        ours: list[Side] = []
        own = range(number, size.nights, size.feeds)
        for _ in track(own, description=f"A/A nights of feed {number}", console=CONSOLE):
            ours.append(side())
            same.append(judged(judging, ours[-1], side()))
        each = range(number, size.planted, size.feeds)
        for share in SHARES:
            for night in track(each, description=f"learning from {share:.0%}", console=CONSOLE):
                better = ours[night // size.feeds % len(ours)]
                planted[str(share)].append(judged(judging, better, side(share)))
    return {"rows": rows, "same": same, "planted": planted}


def false_positives(same: Sequence[Any]) -> list[dict[str, Any]]:
    """Rates of verdicts on A/A nights, by seeds and objective, and of promotions."""
    found = []
    for at in range(MOST):
        of_seeds = [night[at] for night in same]
        names = list(of_seeds[0]["objectives"])
        own: dict[str, Any] = {
            name: {how: rate([n["objectives"][name][how] != 0 for n in of_seeds]) for how in HOW}
            for name in names
        }
        found.append(
            {
                "seeds": at + 1,
                "objectives": own,
                "any": {
                    how: rate([any(o[how] for o in _of_a_night(n)) for n in of_seeds])
                    for how in HOW
                },
                "promoted": rate([n["promoted"] for n in of_seeds]),
            }
        )
    return found


def _of_a_night(found: Mapping[str, Any]) -> list[Any]:
    """The verdicts that a night prints: by AUC only where an objective has no other measure."""
    return [each for name, each in found["objectives"].items() if not name.endswith(" AUC")]


def power(planted: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rates at which a planted gain is found, by share of rows, objective and seeds."""
    found = []
    for share, of_share in planted.items():
        for name in of_share[0][0]["objectives"]:
            for at in range(1, MOST):
                cells = [night[at]["objectives"][name] for night in of_share]
                found.append(
                    {
                        "share": float(share),
                        "objective": name,
                        "seeds": at + 1,
                        "gain": float(np.mean([cell["gain"] for cell in cells])),
                        "before": rate([cell["before"] > 0 for cell in cells]),
                        "after": rate([cell["after"] > 0 for cell in cells]),
                        "promoted": rate([night[at]["promoted"] for night in of_share]),
                    }
                )
    return found


def cost(rows: int) -> dict[str, float]:
    """Seconds to judge one of five models on three objectives, before and after."""
    rng = np.random.default_rng(0)
    user = rng.integers(0, rows // 10, rows)
    tasks = [Task("click", "binary"), Task("like", "binary"), Task("watch", "regression")]
    taste = rng.normal(size=rows)
    labels = np.stack(
        [(rng.random(rows) < 1 / (1 + np.exp(b - taste))).astype(np.float32) for b in (1, 4)]
        + [np.exp(taste).astype(np.float32)],
        1,
    )
    models = [
        [(taste[:, None] + rng.normal(size=(rows, 3))).astype(np.float32) for _ in range(MOST)]
        for _ in range(5)
    ]
    found = {}
    for seeds in (1, MOST):
        began = time.perf_counter()
        clusters = Clusters.of(user)
        prepared = [
            LabelledRows.of(task.kind, labels[:, t], clusters) for t, task in enumerate(tasks)
        ]
        quality = {
            (m, t): model_quality(prepared[t], [p[:, t] for p in model[:seeds]])
            for m, model in enumerate(models)
            for t in range(3)
        }
        judge({key: compare(q, quality[0, key[1]]) for key, q in quality.items() if key[0]})
        found[f"after, {seeds} seeds"] = (time.perf_counter() - began) / len(models)
    began = time.perf_counter()
    weights = user_draws(clusters).astype(np.float32)
    shared = time.perf_counter() - began
    began = time.perf_counter()
    for t, measure in enumerate(("auc", "auc", "r2")):
        for first in range(0, DRAWS, 20):
            resampled(prepared[t], models[0][0][:, t], weights[first : first + 20], measure)
    found["before, 1 seeds"] = shared / len(models) + time.perf_counter() - began
    return found


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--feeds", type=int, default=4)
    options.add_argument("--known", type=int, default=1_000, help="nights of known truth")
    options.add_argument(
        "--population", type=int, default=10_000, help="users of the truth of known nights"
    )
    options.add_argument(
        "--nights", type=int, default=50, help="A/A nights with trainings, over all feeds"
    )
    options.add_argument("--planted", type=int, default=10, help="nights of each planted gain")
    options.add_argument("--impressions", type=int, default=24_000, help="of a feed")
    options.add_argument("--judged-rows", type=int, default=200_000)
    chosen: argparse.Namespace = results.parse(options)
    size = Size(chosen.feeds, chosen.nights, chosen.planted, chosen.impressions)
    known = known_nights(project_of(), chosen.known, chosen.population)
    found = nights(size)
    figures = {
        "known": known,
        "rows": found["rows"],
        "feeds": size.feeds,
        "false": false_positives(found["same"]),
        "power": power(found["planted"]),
        "judged_rows": chosen.judged_rows,
        "seconds_a_model": cost(chosen.judged_rows),
    }
    for title, (headings, rows) in _cells(figures).items():
        table = Table(title=title, title_justify="left")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        CONSOLE.print(table)
    CONSOLE.print(summary(figures))
    results.write(chosen, figures)


def _share(found: Mapping[str, Any]) -> str:
    return (
        f"{found['hits']} of {found['of']}: {found['hits'] / found['of']:.1%} "
        f"[{found['low']:.1%}, {found['high']:.1%}]"
    )


def _cells(figures: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    false = [
        [str(each["seeds"]), name, *(_share(own[how]) for how in HOW)]
        for each in figures["false"]
        for name, own in [*each["objectives"].items(), ("any", each["any"])]
    ]
    promoted = [[str(each["seeds"]), _share(each["promoted"])] for each in figures["false"]]
    gains = [
        [
            f"{each['share']:.0%}",
            each["objective"],
            f"{each['gain']:+.4f}",
            str(each["seeds"]),
            f"{each['before']['hits'] / each['before']['of']:.0%}",
            f"{each['after']['hits'] / each['after']['of']:.0%}",
        ]
        for each in figures["power"]
    ]
    known = figures.get("known")
    more = {} if known is None else _cells_of_known(known)
    seconds = [[how, f"{value:.2f}"] for how, value in figures["seconds_a_model"].items()]
    return {
        **more,
        "verdicts false": (
            ["seeds a side", "objective", "bootstrap", "interval", "verdict"],
            false,
        ),
        "verdicts promoted": (["seeds with a known spread", "promoted by luck"], promoted),
        "verdicts power": (
            ["learns from", "objective", "gain", "seeds a side", "bootstrap", "verdict"],
            gains,
        ),
        "verdicts seconds": (["judging", "seconds a model"], seconds),
    }


def _cells_of_known(known: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    coverage = [
        [each["interval"], each["of"], each["seeds"], _share(each["rate"])]
        for each in known["coverage"]
    ]
    verdicts = [
        [
            "none" if each["planted"] == "none" else f"{each['gain']:+.4f}",
            each["of"],
            str(each["seeds"]),
            _share(each["rate"]),
        ]
        for each in known["verdicts"]
    ]
    verdicts.append(["none", "promoted", "1, spread of 3", _share(known["promoted"])])
    verdicts.append(["none", "any slice of two", "one training", _share(known["sliced"])])
    return {
        "verdicts coverage": (["interval", "of", "trainings", "covers the truth"], coverage),
        "verdicts known": (
            ["planted gain", "of", "trainings a side", "called different (better, if planted)"],
            verdicts,
        ),
    }


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Coverage, false verdicts, promotions by luck, power, and seconds to judge a model."""
    return {name: markdown.table(*cells) for name, cells in _cells(figures).items()}


def summary(figures: Mapping[str, Any]) -> str:
    last = figures["false"][-1]
    before, after = (
        sum(o[how]["hits"] for o in last["objectives"].values()) for how in ("before", "after")
    )
    of = sum(o["after"]["of"] for o in last["objectives"].values())
    worst = max(figures["seconds_a_model"][k] for k in figures["seconds_a_model"] if "after" in k)
    known = ""
    if "known" in figures:
        low, high = (
            pick(each["rate"]["hits"] / each["rate"]["of"] for each in figures["known"]["coverage"])
            for pick in (min, max)
        )
        known = (
            f"the 95 % intervals of {figures['known']['nights']:,} nights of known truth cover it "
            f"in {low:.0%} to {high:.0%}; "
        )
    return known + (
        f"the same model with {last['seeds']} other seeds is called different in {after} of {of} "
        f"comparisons (bootstrap over users: {before}), promoted by luck in "
        f"{last['promoted']['hits']} of {last['promoted']['of']} nights; at most {worst:.2f} s to "
        f"judge a model on {figures['judged_rows']:,} rows"
    )


if __name__ == "__main__":
    main()
