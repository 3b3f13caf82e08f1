"""One number for all objectives: each quality over its standard error.

AUC and R² have other units and other noise: their plain mean is decided by the objective that
varies most, whatever its weight. Divided by its standard error, a difference says the same of each
objective, how clearly it is there, and the weights say how much each counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import Estimated, model_quality
from mtl_ranker.models.objectives import Task

WORST = -1.0  # an R² below counts as this: a single wrong prediction can make it any number


@dataclass(frozen=True)
class Criterion:
    """Compares models by all objectives of the same N rows.

    Attributes:
        tasks: of the T objectives.
        rows: of each objective.
        scale: objective → standard error of the reference's quality, without objectives that have
            too few labels for an interval; 1 for all objectives if none has enough.
    """

    tasks: Sequence[Task]
    rows: Sequence[LabelledRows]
    scale: Mapping[str, float]

    @classmethod
    def fit(
        cls, tasks: Sequence[Task], labels: np.ndarray, user: np.ndarray, reference: np.ndarray
    ) -> Criterion:
        """Take the standard errors from one model's predictions.

        Args:
            labels: [N, T], NaN = missing.
            user: [N].
            reference: predictions [N, T].
        """
        clusters = Clusters.of(user)
        rows = [LabelledRows.of(task.kind, labels[:, t], clusters) for t, task in enumerate(tasks)]
        scale = {}
        for t, task in enumerate(tasks):
            found = model_quality(rows[t], [reference[:, t]], fixed=True).estimated()
            if found.support.enough and found.standard_error > 0:
                scale[task.name] = found.standard_error
        return cls(tasks, rows, scale or {task.name: 1.0 for task in tasks})

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
                quality = model_quality(self.rows[t], [prediction[:, t]], fixed=True).value
                if not np.isnan(quality):
                    total += task.weight * max(quality, WORST) / self.scale[task.name]
                    weights += task.weight
        return total / weights if weights else float("nan")


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
