"""A challenger must be significantly better, hurt no objective, and be calibrated."""

from __future__ import annotations

import numpy as np
import pytest

from mtl_ranker.models.objectives import Task
from mtl_ranker.nightly.promotion import Evidence, decide
from tests import projects

TASKS = [Task("click", "binary"), Task("long", "binary")]


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.05, 0.95, (3000, 2))
    labels = (rng.random((3000, 2)) < truth).astype(float)
    return truth, labels, rng.integers(0, 500, 3000), rng


def run(labels, user, challenger, champion):
    project = projects.project()
    evidence = Evidence(
        tasks=TASKS, labels=labels, user=user, challenger=challenger, champion=champion
    )
    return decide(project, evidence)


def blurred(truth, rng, amount):
    return np.clip(truth + rng.normal(0, amount, truth.shape), 0.01, 0.99)


def test_better_is_promoted_and_worse_is_not(world):
    truth, labels, user, rng = world
    weak = blurred(truth, rng, 0.4)
    assert run(labels, user, truth, weak).promoted
    decision = run(labels, user, weak, truth)
    assert not decision.promoted
    assert "significantly worse on click, long" in decision.reason


def test_equal_is_kept(world):
    truth, labels, user, _ = world
    decision = run(labels, user, truth, truth)
    assert not decision.promoted
    assert "not significant" in decision.reason


def test_one_hurt_objective_is_enough_to_refuse(world):
    truth, labels, user, rng = world
    champion = blurred(truth, rng, 0.5)
    champion[:, 1] = truth[:, 1]
    challenger = truth.copy()
    challenger[:, 1] = blurred(truth, rng, 0.2)[:, 1]
    decision = run(labels, user, challenger, champion)
    assert not decision.promoted
    assert "long" in decision.reason


def test_uncalibrated_is_refused(world):
    truth, labels, user, rng = world
    decision = run(labels, user, truth**4, blurred(truth, rng, 0.5))
    assert not decision.promoted
    assert "calibration error" in decision.reason
