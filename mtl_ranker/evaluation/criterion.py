"""The criterion by which models are compared: each objective's list quality over its standard
error, guarded by log loss.

What is served is the order within lists, so a binary objective counts with its GAUC by list, or its
AUC over rows where too few rows are in lists with both labels; others count with R². These have
other units and other noise: their plain mean is decided by the objective that varies most, whatever
its weight. Divided by its standard error, the differences of all objectives have one
unit, and the weights define how much each counts.

Orders do not need levels, but the blend does: a model whose log loss is significantly worse than
the reference's on some objective comes after every model of which that is not so. Its calibration
is kept within bounds at the refit and at promotion (docs/decisions/0011).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import (
    Estimated,
    Quality,
    compare,
    model_quality,
    weighted_mean,
)
from mtl_ranker.evaluation.metrics import PredictedRows
from mtl_ranker.models.objectives import Task

WORST = -1.0  # an R² below counts as this: a single wrong prediction can make it any number
LOSS = "log_loss"  # lower is better


@dataclass(frozen=True)
class Criterion:
    """Compares models by all objectives of the same N rows.

    Attributes:
        tasks: of the T objectives.
        rows: of each objective.
        reference: predictions [N, T] of the model whose log loss guards.
        scale: objective → standard error of the reference's quality, without objectives that have
            too few labels for an interval; 1 for all objectives if none has enough.
    """

    tasks: Sequence[Task]
    rows: Sequence[LabelledRows]
    reference: np.ndarray
    scale: Mapping[str, float]

    @classmethod
    def fit(cls, tasks: Sequence[Task], reference: PredictedRows) -> Criterion:
        """Take the standard errors from one model's predictions."""
        clusters = Clusters.of(reference.user, reference.lists)
        rows = [
            LabelledRows.of(task.kind, reference.labels[:, t], clusters)
            for t, task in enumerate(tasks)
        ]
        scale = {}
        for t, task in enumerate(tasks):
            found = model_quality(rows[t], [reference.prediction[:, t]], fixed=True).estimated()
            if found.support.enough and found.standard_error > 0:
                scale[task.name] = found.standard_error
        return cls(tasks, rows, reference.prediction, scale or {task.name: 1.0 for task in tasks})

    def value(self, prediction: np.ndarray) -> float:
        """Σ w q / s over Σ w for a model's qualities q and the reference's standard errors s.

        Its unit is a standard error; only differences between models mean anything. NaN if no
        objective has labels of both kinds, minus infinity if a prediction is not a finite number.

        Args:
            prediction: [N, T].
        """
        if not np.isfinite(prediction).all():
            return -float("inf")
        total, weights = 0.0, 0.0
        for t, task in enumerate(self.tasks):
            if task.name in self.scale:
                found = model_quality(self.rows[t], [prediction[:, t]], fixed=True)
                quality = bounded(found).value
                if not np.isnan(quality):
                    total += task.weight * quality / self.scale[task.name]
                    weights += task.weight
        return total / weights if weights else float("nan")

    def worse_loss(
        self,
        predictions: Sequence[np.ndarray],
        reference: Sequence[np.ndarray] | None = None,
    ) -> list[str]:
        """Binary objectives whose log loss is significantly worse than the reference's.

        Args:
            predictions: [N, T] of each seed of one model.
            reference: of each seed of another model; by default the reference's, as it is.
        """
        if not all(np.isfinite(prediction).all() for prediction in predictions):
            return [task.name for task in self.tasks if task.kind == "binary"]
        others = [self.reference] if reference is None else reference
        found = []
        for t, task in enumerate(self.tasks):
            if task.kind == "binary":
                own = model_quality(self.rows[t], [p[:, t] for p in predictions], LOSS)
                base = model_quality(
                    self.rows[t], [p[:, t] for p in others], LOSS, fixed=reference is None
                )
                if compare(own, base).interval().low > 0:
                    found.append(task.name)
        return found

    def gain(self, prediction: np.ndarray) -> Estimated:
        """The difference of the criterion from the reference's, with its error over users.

        Args:
            prediction: [N, T].
        """
        own = self.quality([prediction], fixed=True)
        return compare(own, self.quality([self.reference], fixed=True))

    def quality(self, predictions: Sequence[np.ndarray], fixed: bool = False) -> Quality:
        """The mean of the qualities with weights w / s, of objectives with support, in their unit.

        Args:
            predictions: [N, T] of each seed of one model.
            fixed: as in `model_quality`.
        """
        found = []
        for t, task in enumerate(self.tasks):
            if task.name in self.scale:
                own = model_quality(self.rows[t], [p[:, t] for p in predictions], fixed=fixed)
                found.append((task.weight / self.scale[task.name], bounded(own)))
        return weighted_mean(found)

    def order(self, predictions: Sequence[np.ndarray]) -> tuple[bool, float]:
        """By which models are ordered, the best last: the guard, then the mean value over seeds.

        Args:
            predictions: [N, T] of each seed of one model.
        """
        mean = float(np.mean([self.value(prediction) for prediction in predictions]))
        return not self.worse_loss(predictions), mean


def bounded(quality: Quality) -> Quality:
    """The quality with an R² below `WORST` taken as `WORST`, which no user changes.

    Without the bound a single wrong prediction widens the interval so far that the worst model is
    not significantly worse. The values of trainings are bounded in the same way.
    """
    if quality.measure != "r2":
        return quality
    trainings = None if quality.trainings is None else np.maximum(quality.trainings, WORST)
    if quality.value >= WORST or np.isnan(quality.value):
        return replace(quality, trainings=trainings)
    return replace(
        quality, value=WORST, influence=np.zeros_like(quality.influence), trainings=trainings
    )


def comparison_weights(tasks: Sequence[Task], differences: Sequence[Estimated]) -> list[float]:
    """Weights [T] with which two models' qualities are averaged: w over the difference's error.

    An objective on which both models predict the same adds nothing and gets weight 0, like one
    without enough labels; if that is so of all, each has its own weight.
    """
    errors = [each.standard_error if each.support.enough else 0.0 for each in differences]
    if not any(error > 0 for error in errors):
        return [task.weight for task in tasks]
    return [
        task.weight / error if error > 0 else 0.0 for task, error in zip(tasks, errors, strict=True)
    ]
