"""A challenger must be significantly better, worse on no objective, and calibrated."""

from __future__ import annotations

import numpy as np
import pytest

from mtl_ranker.models.objectives import Task
from mtl_ranker.nightly.promotion import Evidence, decide
from tests import projects

TASKS = [Task("click", "binary"), Task("long", "binary")]


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.05, 0.95, (3000, 2))
    labels = (rng.random((3000, 2)) < truth).astype(float)
    return truth, labels, rng.integers(0, 500, 3000), rng


def decision_on(labels, user, challenger, champion):
    project = projects.project()
    evidence = Evidence(
        tasks=TASKS, labels=labels, user=user, challenger=challenger, champion=champion
    )
    return decide(project, evidence)


def blurred(truth, rng, amount):
    return np.clip(truth + rng.normal(0, amount, truth.shape), 0.01, 0.99)


def test_better_is_promoted_and_worse_is_not(rows):
    truth, labels, user, rng = rows
    weak = blurred(truth, rng, 0.4)
    assert decision_on(labels, user, truth, weak).promoted
    decision = decision_on(labels, user, weak, truth)
    assert not decision.promoted
    assert "significantly worse on click, long" in decision.reason


def test_equal_is_kept(rows):
    truth, labels, user, _ = rows
    decision = decision_on(labels, user, truth, truth)
    assert not decision.promoted
    assert "not significant" in decision.reason


def test_one_worse_objective_is_enough_to_refuse(rows):
    truth, labels, user, rng = rows
    champion = blurred(truth, rng, 0.5)
    champion[:, 1] = truth[:, 1]
    challenger = truth.copy()
    challenger[:, 1] = blurred(truth, rng, 0.2)[:, 1]
    decision = decision_on(labels, user, challenger, champion)
    assert not decision.promoted
    assert "long" in decision.reason


def test_uncalibrated_is_refused(rows):
    truth, labels, user, rng = rows
    decision = decision_on(labels, user, truth**4, blurred(truth, rng, 0.5))
    assert not decision.promoted
    assert "not calibrated on click: its predictions are 0." in decision.reason
    assert "allowed 0.67 to 1.50 (promotion.max_calibration_ratio)" in decision.reason
