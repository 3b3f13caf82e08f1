"""Figures that are more likely a mistake in the project or the program than a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from mtl_ranker.evaluation.metrics import Metrics, quality_metric
from mtl_ranker.models.objectives import Task

LEAK = 0.999  # AUC or R² from which the label is likely among the features


def suspicious(
    tasks: Sequence[Task], labels: np.ndarray, metrics: Mapping[str, Metrics]
) -> list[str]:
    """Warnings about labels and metrics of several models on the same rows.

    Args:
        labels: [N, T], NaN = missing.
        metrics: model → its metrics.
    """
    return [*_equal_labels(tasks, labels), *_figures(tasks, labels, metrics)]


def _equal_labels(tasks: Sequence[Task], labels: np.ndarray) -> list[str]:
    return [
        f"{tasks[a].name} and {tasks[b].name} have the same label on every row; "
        "one of them may be measured on the other's labels (objectives.label, objectives.where)"
        for a, b in combinations(range(len(tasks)), 2)
        if _same(labels, a, b)
    ]


def _same(labels: np.ndarray, a: int, b: int) -> bool:
    known = not np.isnan(labels[:, a]).all()
    return known and bool(np.array_equal(labels[:, a], labels[:, b], equal_nan=True))


def _figures(
    tasks: Sequence[Task], labels: np.ndarray, metrics: Mapping[str, Metrics]
) -> list[str]:
    """One line per finding, with all models that it concerns."""
    found: dict[str, list[str]] = {}
    for model, of_model in metrics.items():
        for task in tasks:
            measure = quality_metric(task.kind)
            value = of_model[task.name][measure]
            if measure == "auc" and value == 0.5:
                words = f"the AUC of {task.name} is exactly 0.5; the predictions may be constant"
                found.setdefault(words, []).append(model)
            if value >= LEAK:
                words = (
                    f"the {measure.upper()} of {task.name} is at least {LEAK}; "
                    "a feature may contain the label"
                )
                found.setdefault(words, []).append(model)
        for a, b in combinations(range(len(tasks)), 2):
            one, other = of_model[tasks[a].name], of_model[tasks[b].name]
            if _equal(one, other) and not _same(labels, a, b):
                words = (
                    f"{tasks[a].name} and {tasks[b].name} have identical metrics; "
                    "one objective's predictions or labels may be used for both"
                )
                found.setdefault(words, []).append(model)
    return [f"{', '.join(models)}: {words}" for words, models in found.items()]


def _equal(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two objectives have the same metrics, all of them; NaN ones do not count."""
    if one.keys() != other.keys():
        return False
    pairs = [(one[k], other[k]) for k in one if not (np.isnan(one[k]) and np.isnan(other[k]))]
    return bool(pairs) and all(a == b for a, b in pairs)
