"""Warnings about figures that are likely mistakes; none about ordinary ones."""

from __future__ import annotations

import numpy as np

from mtl_ranker.evaluation.metrics import evaluate_all
from mtl_ranker.evaluation.suspicious import suspicious
from mtl_ranker.models.objectives import Task

TASKS = [Task("click", "binary"), Task("like", "binary")]
USER = np.arange(400) % 50


def warnings(labels, prediction):
    metrics = evaluate_all(TASKS, labels, prediction, USER)
    return suspicious(TASKS, labels, {"mmoe": metrics, "ple": metrics})


def ordinary():
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 2)) < 0.4).astype(float)
    return labels, rng.random((400, 2))


def test_ordinary_figures_have_no_warning():
    assert warnings(*ordinary()) == []


def test_the_same_labels_of_two_objectives():
    labels, prediction = ordinary()
    labels[:, 1] = labels[:, 0]
    [warning] = warnings(labels, prediction)
    assert "click and like have the same label on every row" in warning


def test_a_metric_computed_on_the_first_objectives_labels_and_predictions():
    labels, prediction = ordinary()
    first = evaluate_all(TASKS[:1], labels[:, :1], prediction[:, :1], USER)["click"]
    [warning] = suspicious(TASKS, labels, {"mmoe": {"click": first, "like": dict(first)}})
    assert warning.startswith("mmoe: click and like have identical metrics")


def test_constant_predictions():
    labels, prediction = ordinary()
    prediction[:, 1] = 0.4
    [warning] = warnings(labels, prediction)
    assert warning.startswith("mmoe, ple: the AUC of like is exactly 0.5")


def test_a_label_among_the_features():
    labels, prediction = ordinary()
    prediction[:, 0] = 0.1 + 0.8 * labels[:, 0]
    [warning] = warnings(labels, prediction)
    assert "the AUC of click is at least 0.999; a feature may contain the label" in warning
