"""The results of a night's training: runs, baselines and intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

import numpy as np
import polars as pl

from mtl_ranker.evaluation.diagnostics import Diagnosis
from mtl_ranker.evaluation.drift import Drift
from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import Interval, Quality, model_quality
from mtl_ranker.evaluation.metrics import ListCount, Metrics, PredictedRows, can_be_judged
from mtl_ranker.evaluation.off_policy import Estimate
from mtl_ranker.evaluation.sharing import SharingGain
from mtl_ranker.evaluation.slices import Slice
from mtl_ranker.features.arrivals import Arrival
from mtl_ranker.features.audit import Audit
from mtl_ranker.features.days import SplitDays, span
from mtl_ranker.models.objectives import Task
from mtl_ranker.models.spec import RankerSpec
from mtl_ranker.nightly.blend_search import Blend, KeptBlend
from mtl_ranker.nightly.plan import FROM_SCRATCH, TrainingPlan
from mtl_ranker.nightly.popularity import NAME as POPULARITY
from mtl_ranker.nightly.popularity import smoothed_means
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.training.dataset import HeldOut
from mtl_ranker.training.loop import Trained

REFIT = ", refit"  # ends the name of a model that was trained again with the validation days


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """One training of a model, with its predictions and metrics.

    Attributes:
        started, ended: when it was trained, in seconds since 1970.
        validate_quality: weighted mean of AUC and R² over the rows of the validation days.
        validate_prediction: [N, T] on the validation days.
        raw_prediction: [N, T] on the test days, before calibration.
        test_prediction: [N, T] on the test days.
        metrics: on the test days.
        start: what its training continued from; None for a training from scratch.
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
    start: RankerArtifact | None = None

    @property
    def label(self) -> str:
        return f"{self.name} seed {self.seed}"

    @property
    def refitted(self) -> bool:
        """Whether it was trained with the validation days, too."""
        return self.name.endswith(REFIT)

    @property
    def spec(self) -> RankerSpec:
        return self.trained.model.spec


@dataclass(frozen=True, kw_only=True)
class Suite:
    """All trainings of a night and their results on its held-out days.

    Attributes:
        baselines: name → metrics of predictions without a model.
        lists: binary objective → the lists of the test days, and those with both labels.
        measures: objective → the measure by which models are compared (`LabelledRows.measure`).
        intervals: (model or baseline, objective) → that measure, the mean over seeds.
        gains: against the model that shares nothing, if there is one.
        label_correlation: [T, T] between labels of the training days.
        slices, off_policy: of the winner.
        suspicious: warnings about labels and metrics that are likely mistakes.
        blend: choices of blend weights for the winner; None if they cannot be compared.
        kept_blend: the winner's weights by `[scoring] maximise`, or None.
        notes: what was decided on the held-out days, beside the winner, in words.
        unlabelled: what is left out of verdicts, as days lack labels (see `missing_labels`).
        audit: of features of the last test day; None without one.
        arrivals: how late the labels of actions arrive.
        plan: what was trained, and from where.
        night: D, the last day of the log that it knew. It is later than the last test day where
            labels of later days are not final.
        behind: model → how far its seeds' mean is behind the best on validation, in standard
            errors (`Criterion`).
    """

    night: date
    days: SplitDays
    tasks: list[Task]
    runs: list[ModelRun]
    baselines: dict[str, Metrics]
    lists: dict[str, ListCount]
    measures: dict[str, str]
    intervals: dict[tuple[str, str], Interval]
    gains: list[SharingGain]
    label_correlation: np.ndarray
    slices: list[Slice]
    off_policy: list[Estimate]
    drift: Drift
    suspicious: list[str]
    unlabelled: list[str]
    held_out: HeldOut
    train_rows: int
    winner: ModelRun
    blend: Blend | None = None
    kept_blend: KeptBlend | None = None
    notes: list[str] = field(default_factory=list)
    audit: Audit | None = None
    arrivals: list[Arrival] = field(default_factory=list)
    plan: TrainingPlan = FROM_SCRATCH
    behind: Mapping[str, float] = field(default_factory=dict)

    @property
    def report(self) -> str:
        """The place of its report in the workspace."""
        return report_place(self.night)

    @property
    def trainings(self) -> list[ModelRun]:
        """The runs with a network of their own; `mmoe, trees` has that of `mmoe`."""
        first: dict[int, ModelRun] = {}
        for run in self.runs:
            first.setdefault(id(run.trained), run)
        return list(first.values())

    @property
    def trained_on(self) -> str:
        """The training rows of the models, in words."""
        rows, start = f"{self.train_rows:,} rows", self.plan.start
        if start is None:
            return f"{rows} of {span(self.days.train)}"
        new = span(start.new_days(self.days))
        replayed = self.winner.artifact.project.training.replay > 0
        older = " and a replay of earlier days" if replayed else ""
        return f"{rows} of {new}{older}, from version {start.version}"


def report_place(day: date) -> str:
    """The place in the workspace of the report of night D."""
    return f"reports/{day}.html"


def qualities(
    tasks: list[Task],
    by_model: Mapping[str, list[ModelRun]],
    held_out: HeldOut,
) -> dict[tuple[str, str], Quality]:
    """(model, objective) → mean quality over seeds on the test days (`LabelledRows.measure`)."""
    predictions = {name: [run.test_prediction for run in runs] for name, runs in by_model.items()}
    return qualities_of(tasks, predictions, held_out)


def qualities_of(
    tasks: list[Task],
    predictions: Mapping[str, Sequence[np.ndarray]],
    held_out: HeldOut,
    fixed: bool = False,
) -> dict[tuple[str, str], Quality]:
    """(model, objective) → mean quality of predictions [N, T] of each seed on the test rows.

    Args:
        fixed: the predictors have no seed.
    """
    clusters = Clusters.of(held_out.user, held_out.lists)
    rows = [
        LabelledRows.of(task.kind, held_out.labels[:, t], clusters) for t, task in enumerate(tasks)
    ]
    return {
        (name, task.name): model_quality(rows[t], [p[:, t] for p in by_seed], fixed=fixed)
        for name, by_seed in predictions.items()
        for t, task in enumerate(tasks)
        if can_be_judged(held_out.labels[:, t])
    }


def predicted_rows(held_out: HeldOut, prediction: np.ndarray) -> PredictedRows:
    """Held-out rows with a model's predictions [N, T]."""
    return PredictedRows(held_out.labels, prediction, held_out.user, held_out.lists)


def still_improving(by_model: Mapping[str, list[ModelRun]]) -> dict[tuple[str, str], str]:
    """(model, objective) → that a training's best epoch is its last allowed one, in words.

    Such a model has not been trained to its end, and a comparison with it shows which model learns
    faster. A training without validation (a refit) has no best epoch of its own.
    """
    found = {}
    for name, runs in by_model.items():
        for run in runs:
            for objective in at_the_cap(run):
                found[name, objective] = (
                    f"no verdict: the best epoch of {name} is its last "
                    f"({run.artifact.project.training.epochs}); raise training.epochs"
                )
    return found


def at_the_cap(run: ModelRun) -> list[str]:
    """Objectives whose best epoch is the last one that `training.epochs` allows.

    None of a refit, whose epochs are those of an earlier training, nor of a continued training,
    which has had more in the nights before.
    """
    allowed = run.artifact.project.training.epochs
    if run.refitted or run.start is not None or len(run.trained.epochs) < allowed:
        return []
    best_epochs = zip(run.artifact.tasks, run.trained.best_epochs, strict=True)
    return [task.name for task, best in best_epochs if best == allowed]


def baselines(tasks: list[Task], train: pl.DataFrame, held_out: HeldOut) -> dict[str, np.ndarray]:
    """Predictions [N, T] without a model: the training mean, and each item's smoothed mean."""
    means = smoothed_means(tasks, train.lazy())
    names = [task.name for task in tasks]
    overall = dict(zip(names, means.select(names).row(0), strict=True))
    popularity = (
        held_out.frame.select("item_id")
        .join(means[1:], on="item_id", how="left", maintain_order="left")
        .select(pl.col(name).fill_null(mean) for name, mean in overall.items())
        .to_numpy()
    )
    constant = np.broadcast_to(list(overall.values()), popularity.shape)
    return {"base_rate": constant, POPULARITY: popularity}
