"""The results of a night's training: runs, baselines and intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from mtl_ranker.config import Promotion
from mtl_ranker.evaluation.diagnostics import Diagnosis
from mtl_ranker.evaluation.drift import Drift
from mtl_ranker.evaluation.intervals import Interval, Resampled, resampled_quality, user_draws
from mtl_ranker.evaluation.metrics import Metrics, can_be_judged, evaluate_all
from mtl_ranker.evaluation.off_policy import Estimate
from mtl_ranker.evaluation.sharing import SharingGain
from mtl_ranker.evaluation.slices import Slice
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.days import SplitDays
from mtl_ranker.models.objectives import Task
from mtl_ranker.models.spec import RankerSpec
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.training.dataset import HeldOut
from mtl_ranker.training.loop import Trained

SMOOTHING = 20.0  # prior impressions at the mean rate in an item's popularity


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """One training of a model, with its predictions and metrics.

    Attributes:
        started, ended: when it was trained, in seconds since 1970.
        validate_quality: blended quality on the validation days, by which the winner is chosen.
        validate_prediction: [N, T] on the validation days.
        raw_prediction: [N, T] on the test days, before calibration.
        test_prediction: [N, T] on the test days.
        metrics: on the test days.
    """

    name: str
    seed: int
    trained: Trained
    started: float
    ended: float
    validate_quality: float
    validate_prediction: np.ndarray
    raw_prediction: np.ndarray
    test_prediction: np.ndarray
    metrics: Metrics
    artifact: RankerArtifact
    diagnosis: Diagnosis

    @property
    def label(self) -> str:
        return f"{self.name} seed {self.seed}"

    @property
    def spec(self) -> RankerSpec:
        return self.trained.model.spec


@dataclass(frozen=True, kw_only=True)
class Suite:
    """All trainings of a night and their results on its held-out days.

    Attributes:
        baselines: name → metrics of predictions without a model.
        intervals: (model, objective) → mean quality over seeds.
        gains: against the model that shares nothing, if there is one.
        label_correlation: [T, T] between labels of the training days.
        slices, off_policy: of the winner.
        unlabelled: what is left out of verdicts, as days lack labels (see `missing_labels`).
    """

    days: SplitDays
    tasks: list[Task]
    runs: list[ModelRun]
    baselines: dict[str, Metrics]
    intervals: dict[tuple[str, str], Interval]
    gains: list[SharingGain]
    label_correlation: np.ndarray
    slices: list[Slice]
    off_policy: list[Estimate]
    drift: Drift
    unlabelled: list[str]
    held_out: HeldOut
    train_rows: int
    winner: ModelRun


def qualities(
    settings: Promotion,
    tasks: list[Task],
    by_model: Mapping[str, list[ModelRun]],
    held_out: HeldOut,
) -> dict[tuple[str, str], Resampled]:
    """(model, objective) → mean quality over seeds on the test days.

    Users, and with several seeds the trainings, are resampled; the same users for all models. An
    objective without labels, or with one class only, has no quality and is left out.
    """
    weights = user_draws(held_out.user, settings.bootstrap)
    return {
        (name, task.name): resampled_quality(
            task.kind,
            held_out.labels[:, t],
            [run.test_prediction[:, t] for run in runs],
            weights,
        )
        for name, runs in by_model.items()
        for t, task in enumerate(tasks)
        if can_be_judged(held_out.labels[:, t])
    }


def baselines(tasks: list[Task], train: pl.DataFrame, held_out: HeldOut) -> dict[str, Metrics]:
    """Metrics of predictions without a model: the training mean, and each item's smoothed mean."""
    constant, popularity = [], []
    for task in tasks:
        label = pl.col(LABEL + task.name)
        mean = float(train.select(label.mean()).item())
        per_item = train.group_by("item_id").agg(
            ((label.sum() + SMOOTHING * mean) / (label.count() + SMOOTHING)).alias("p")
        )
        joined = held_out.frame.select("item_id").join(
            per_item, on="item_id", how="left", maintain_order="left"
        )
        popularity.append(joined["p"].fill_null(mean).to_numpy())
        constant.append(np.full(len(held_out.user), mean))
    return {
        name: evaluate_all(tasks, held_out.labels, np.stack(columns, 1), held_out.user)
        for name, columns in (("base_rate", constant), ("item_popularity", popularity))
    }
