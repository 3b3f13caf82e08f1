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


def decision_on(labels, user, challenger, champion, seeds=((), ()), **rule):
    project = projects.project(promotion=rule)
    evidence = Evidence(
        tasks=TASKS,
        labels=labels,
        user=user,
        challenger=challenger,
        champion=champion,
        challenger_seeds=seeds[0],
        champion_seeds=seeds[1],
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
    assert "calibration error" in decision.reason


def spread(*values):
    """Metrics of trainings with other seeds, equal for both objectives."""
    return [{task.name: {"auc": value} for task in TASKS} for value in values]


def test_a_gain_within_the_spread_of_seeds_is_luck(rows):
    truth, labels, user, rng = rows
    weak = blurred(truth, rng, 0.2)
    alone = decision_on(labels, user, truth, weak)
    assert alone.promoted  # over users the gain of about 0.03 is certain
    assert "one seed: no verdict on the model" in alone.reason
    strict = decision_on(labels, user, truth, weak, require_spread=True)
    assert not strict.promoted
    assert "promotion.require_spread" in strict.reason
    narrow, wide = spread(0.80, 0.801, 0.802), spread(0.74, 0.80, 0.86)
    for known in ((narrow, narrow), (narrow, ()), ((), narrow)):
        decision = decision_on(labels, user, truth, weak, known, require_spread=True)
        assert decision.promoted
        assert "one seed" not in decision.reason
    for known in ((wide, wide), (wide, ()), ((), wide), (narrow, wide)):
        assert not decision_on(labels, user, truth, weak, known).promoted


def test_an_objective_with_few_positives_neither_vetoes_nor_supports(rows):
    truth, labels, user, rng = rows
    labels[:, 1] = 0
    labels[[3, 50, 700], 1] = 1
    weak = blurred(truth, rng, 0.3)
    worst = np.where(labels[:, 1] == 1, 0.01, truth[:, 1])  # its three positives come last
    promoted = decision_on(labels, user, np.c_[truth[:, 0], worst], weak, max_calibration_error=1.0)
    assert promoted.promoted
    assert "without a say: long (3 positives of 3 users; it takes 10 of 10)" in promoted.reason
    best = np.where(labels[:, 1] == 1, 0.99, weak[:, 1])
    same = np.c_[weak[:, 0], best]
    assert not decision_on(labels, user, same, weak, max_calibration_error=1.0).promoted


@pytest.mark.parametrize("significance", [True, False])
def test_without_any_objective_to_compare_the_champion_stays(rows, significance):
    truth, labels, user, rng = rows
    labels[:] = 0
    decision = decision_on(
        labels,
        user,
        truth,
        blurred(truth, rng, 0.3),
        require_significance=significance,
        max_calibration_error=1.0,
    )
    assert not decision.promoted
    assert "no objective can be compared" in decision.reason
    assert "0 positives of 0 users" in decision.reason
