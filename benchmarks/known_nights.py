"""Nights of a world with known truth: coverage of the intervals that a night prints, and verdicts.

Nothing is trained: a training is the world's own weights, changed by a flaw of its model and by its
seed, so that a thousand nights take minutes. Each night has other users and other seeds. The truth
of a quality is its mean over seeds, or the value of one fixed predictor, on users so many that
their sampling hardly counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import track
from scipy.special import expit
from scipy.stats import binomtest

from mtl_ranker.config import Project
from mtl_ranker.evaluation.calibration_bounds import calibrated
from mtl_ranker.evaluation.influence import MEASURE_NAMES, MEASURES, Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import Interval, Quality, compare, judge, model_quality
from mtl_ranker.evaluation.metrics import PredictedRows
from mtl_ranker.evaluation.pareto import paired_gains
from mtl_ranker.evaluation.slices import slice_metrics
from mtl_ranker.models.objectives import Task
from mtl_ranker.nightly.promotion import Evidence, compare_models, decide

# As in the simulated preset, whose project blends them.
TASKS = [Task("click", "binary"), Task("watch", "regression"), Task("like", "binary")]
FEATURES = 4
ROWS_OF_LIST = 8
TRUE = np.array([[0.8, 0.5, 0.0, 0.3], [0.6, 0.0, 0.4, 0.0], [0.3, 0.0, 0.7, 0.4]])
FLAW = np.array([[-0.4, 0.3, 0.5, -0.2], [0.3, 0.5, -0.3, 0.4], [0.4, 0.5, -0.5, -0.2]])
LEVEL = np.array([-1.0, 1.0, -2.5])
SPREAD = 0.12  # standard deviation of a weight over seeds
FLAWS = (0.6, 1.2)  # of the models over which a gain is planted
SEEDS = (2, 3)
PRINTED = {"gauc": "list GAUC", "auc": "AUC"}
WEIGHTS = {"click": 1.0, "watch": 0.0, "like": 0.0}  # against those of the project
GROUPS = ("engagement", "satisfaction")
NAMES = {**MEASURE_NAMES, "log_loss": "log loss", "calibration": "predictions / labels"}


def rate(hits: Sequence[bool]) -> dict[str, Any]:
    """A share of nights with its Clopper-Pearson interval."""
    found = binomtest(sum(hits), len(hits)).proportion_ci(0.95)
    return {"hits": int(sum(hits)), "of": len(hits), "low": found.low, "high": found.high}


@dataclass(frozen=True)
class Drawn:
    """N impressions of drawn users.

    Attributes:
        features: [N, FEATURES].
        labels: [N, T], of the order of `TASKS`.
        user, lists: [N].
    """

    features: np.ndarray
    labels: np.ndarray
    user: np.ndarray
    lists: np.ndarray

    @property
    def rows(self) -> list[LabelledRows]:
        clusters = Clusters.of(self.user, self.lists)
        return [
            LabelledRows.of(task.kind, self.labels[:, t], clusters) for t, task in enumerate(TASKS)
        ]

    def predicted(self, weights: np.ndarray) -> np.ndarray:
        """A training's predictions [N, T], of its weights [T, FEATURES]."""
        linear = LEVEL + self.features @ weights.T
        linear[:, [0, 2]] = expit(linear[:, [0, 2]])
        linear[:, 1] = np.exp(LEVEL[1] + 0.4 * (linear[:, 1] - LEVEL[1]) + 0.2)
        return linear

    def with_predictions(self, prediction: np.ndarray) -> PredictedRows:
        return PredictedRows(self.labels, prediction, self.user, self.lists)


def draw(rng: np.random.Generator, users: int) -> Drawn:
    """Users with one to three lists each; their own level makes their rows dependent."""
    of_list = np.repeat(np.arange(users), rng.integers(1, 4, users))
    user = np.repeat(of_list, ROWS_OF_LIST)
    n = len(user)
    # Bounded, so that a wrong weight does not make a few predictions astronomical.
    tastes = rng.normal(size=(users, FEATURES))
    features = 1.6 * np.tanh(tastes[user] * rng.normal(size=(n, FEATURES)))
    level = 0.5 * rng.normal(size=users)[user]
    linear = LEVEL + features @ TRUE.T + level[:, None]
    labels = (rng.random((n, 3)) < expit(linear)).astype(np.float64)
    seconds = np.exp(LEVEL[1] + 0.4 * (linear[:, 1] - LEVEL[1]) + 0.5 * rng.normal(size=n))
    labels[:, 1] = np.where(labels[:, 0] > 0, seconds, np.nan)
    return Drawn(features, labels, user, np.repeat(np.arange(len(of_list)), ROWS_OF_LIST))


def trainings(rng: np.random.Generator, count: int, flaw: float = 0.0) -> list[np.ndarray]:
    """Weights [T, FEATURES] of trainings with different seeds."""
    model = TRUE + flaw * FLAW
    return [model + SPREAD * rng.normal(size=model.shape) for _ in range(count)]


def measures_of(task: Task) -> list[str]:
    return ["gauc", "auc", "log_loss"] if task.kind == "binary" else ["r2"]


KEYS = [(t, measure) for t, task in enumerate(TASKS) for measure in measures_of(task)]


def label_of(key: tuple[int, str]) -> str:
    return f"{TASKS[key[0]].name} {NAMES[key[1]]}"


@dataclass(frozen=True)
class Truth:
    """Values on very many users.

    Attributes:
        fixed: (objective, measure) → of the predictor with the world's own weights.
        flawed: the same of the fixed predictor with the smallest flaw.
        seeds: flaw → (objective, measure) → mean over seeds.
        calibration: name → ratio and shift of the fixed predictor.
        blend: NDCG@10 of the project's weights minus that of `WEIGHTS`, of both groups.
    """

    fixed: dict[tuple[int, str], float]
    flawed: dict[tuple[int, str], float]
    seeds: dict[float, dict[tuple[int, str], float]]
    calibration: dict[str, float]
    blend: tuple[float, float]

    @classmethod
    def of(cls, project: Project, users: int, pairs: int) -> Truth:
        """From `users` users, and pairs of seeds that differ by the sign of what they change."""
        rng = np.random.default_rng(12_345)
        everyone = draw(rng, users)
        rows = everyone.rows

        def values(weights: np.ndarray) -> dict[tuple[int, str], float]:
            prediction = everyone.predicted(weights)
            return {
                (t, m): MEASURES[m](
                    rows[t].label, prediction[rows[t].known, t], rows[t].clusters
                ).value
                for t, m in KEYS
            }

        changes = [SPREAD * rng.normal(size=TRUE.shape) for _ in range(pairs)]
        seeds = {}
        for flaw in (0.0, *FLAWS):
            found = [
                values(TRUE + flaw * FLAW + sign * change) for change in changes for sign in (1, -1)
            ]
            seeds[flaw] = {key: float(np.mean([each[key] for each in found])) for key in KEYS}
        predicted = everyone.with_predictions(everyone.predicted(TRUE))
        blend = paired_gains(project, predicted, choices(project), project.scoring.blend, 0.95)
        return cls(
            fixed=values(TRUE),
            flawed=values(TRUE + FLAWS[0] * FLAW),
            seeds=seeds,
            calibration={name: each.value for name, each in calibration(predicted).items()},
            blend=(blend[0].value, blend[1].value),
        )


def choices(project: Project) -> tuple[Mapping[str, float], Mapping[str, float]]:
    return project.blend_weights, WEIGHTS


def calibration(predicted: PredictedRows) -> dict[str, Interval]:
    """The intervals of ratio and shift, by name."""
    found = {}
    for each in calibrated(TASKS, predicted):
        for name, interval in (("predictions / labels", each.ratio), ("shift", each.shift)):
            if interval is not None:
                found[f"{each.objective} {name}"] = interval
    return found


def one_night(project: Project, truth: Truth, rng: np.random.Generator, users: int) -> Any:
    """Which intervals cover the truth, and the verdicts by planted flaw and seeds."""
    drawn = draw(rng, users)
    rows, covers = drawn.rows, {}

    def check(kind: str, name: str, seeds: str, interval: Interval, value: float) -> None:
        covers[kind, name, seeds] = bool(interval.low <= value <= interval.high)

    most = max(SEEDS)
    predictions = {
        flaw: [drawn.predicted(w) for w in trainings(rng, most, flaw)] for flaw in (0.0, *FLAWS)
    }
    same = [drawn.predicted(w) for w in trainings(rng, most)]

    def quality(key: tuple[int, str], given: Sequence[np.ndarray], fixed: bool = False) -> Quality:
        return model_quality(rows[key[0]], [p[:, key[0]] for p in given], key[1], fixed)

    fixed = drawn.predicted(TRUE)
    for key in KEYS:
        interval = quality(key, [fixed], fixed=True).interval()
        check("quality", label_of(key), "one training", interval, truth.fixed[key])
        for seeds in SEEDS:
            interval = quality(key, predictions[0.0][:seeds]).interval()
            check("quality", label_of(key), str(seeds), interval, truth.seeds[0.0][key])
    verdicts: dict[tuple[str, str, int], int] = {}
    for seeds in SEEDS:
        ours = {key: quality(key, predictions[0.0][:seeds]) for key in KEYS}
        others = {"none": same, **{f"{flaw:g}": predictions[flaw] for flaw in FLAWS}}
        for planted, given in others.items():
            compared = {key: compare(ours[key], quality(key, given[:seeds])) for key in KEYS}
            for key, each in compared.items():
                flaw = 0.0 if planted == "none" else float(planted)
                gain = truth.seeds[0.0][key] - truth.seeds[flaw][key]
                what = "gain, none planted" if flaw == 0 else f"gain, flaw {planted}"
                check(what, label_of(key), str(seeds), each.interval(), gain)
            for measure in PRINTED:
                table = {k: each for k, each in compared.items() if k[1] in (measure, "r2")}
                for key, found in judge(table).items():
                    if key[1] == measure:
                        verdicts[planted, label_of(key), seeds] = found.verdict
    seeds_of = [
        [
            {
                task.name: {m: quality((t, m), [p]).value for m in measures_of(task)}
                for t, task in enumerate(TASKS)
            }
            for p in given
        ]
        for given in (predictions[0.0], same)
    ]
    evidence = Evidence(
        tasks=TASKS,
        labels=drawn.labels,
        user=drawn.user,
        lists=drawn.lists,
        challenger=predictions[0.0][0],
        champion=same[0],
        challenger_seeds=seeds_of[0],
        champion_seeds=seeds_of[1],
    )
    decision = decide(project, evidence)
    assert decision.blended is not None
    assert decision.differences is not None
    check("promotion", "blended quality", f"1, spread of {most}", decision.blended, 0.0)
    for name, difference in decision.differences.items():
        check("promotion", name, f"1, spread of {most}", difference, 0.0)
    refit = compare_models(
        Evidence(
            tasks=TASKS[:1],
            labels=drawn.labels[:, :1],
            user=drawn.user,
            lists=drawn.lists,
            challenger=drawn.predicted(TRUE + FLAWS[0] * FLAW)[:, :1],
            champion=fixed[:, :1],
        ),
        0.95,
    )
    loss = truth.flawed[0, "gauc"] - truth.fixed[0, "gauc"]
    covers["refit, one-sided bound", label_of((0, "gauc")), "one training"] = refit.lower <= loss
    predicted = drawn.with_predictions(fixed)
    for name, interval in calibration(predicted).items():
        check("calibration", name, "one training", interval, truth.calibration[name])
    gains = paired_gains(project, predicted, choices(project), project.scoring.blend, 0.95)
    for group, of_group, value in zip(GROUPS, gains, truth.blend, strict=True):
        check("blend weights", f"{group} NDCG@10", "one training", of_group, value)
    surface = pl.Series("surface", np.array(["a", "b"])[drawn.lists % 2])
    sliced = slice_metrics(TASKS, predicted, {"surface": surface})
    for part in sliced:
        if part.value == "a":
            key = next(k for k in KEYS if TASKS[k[0]].name == part.objective)
            check("slice", label_of(key), "one training", part.quality, truth.fixed[key])
    return {
        "covers": covers,
        "verdicts": verdicts,
        "promoted": decision.promoted,
        "sliced": any(each.verdict for each in sliced),
    }


def known_nights(project: Project, nights: int, population: int, users: int = 250) -> Any:
    """Rates over simulated nights: coverage, verdicts by planted flaw, promotions by luck.

    Args:
        population: users of the truth.
        users: of a night.
    """
    truth = Truth.of(project, population, pairs=8)
    console = Console(width=150)
    found = [
        one_night(project, truth, np.random.default_rng([1, number]), users)
        for number in track(range(nights), description="nights of known truth", console=console)
    ]
    coverage = [
        {
            "interval": key[0],
            "of": key[1],
            "seeds": key[2],
            "rate": rate([night["covers"][key] for night in found]),
        }
        for key in found[0]["covers"]
    ]
    verdicts = []
    for planted, name, seeds in found[0]["verdicts"]:
        given = [night["verdicts"][planted, name, seeds] for night in found]
        key = next(k for k in KEYS if label_of(k) == name)
        gain = 0.0
        if planted != "none":
            gain = truth.seeds[0.0][key] - truth.seeds[float(planted)][key]
        hits = [v != 0 for v in given] if planted == "none" else [v > 0 for v in given]
        verdicts.append(
            {"planted": planted, "of": name, "gain": gain, "seeds": seeds, "rate": rate(hits)}
        )
    return {
        "nights": nights,
        "coverage": coverage,
        "verdicts": verdicts,
        "promoted": rate([night["promoted"] for night in found]),
        "sliced": rate([night["sliced"] for night in found]),
    }
