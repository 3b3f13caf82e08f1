"""The LightGBM baseline: searched, stopped early, and trained again on both parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mtl_ranker.evaluation.metrics import auc, gauc
from mtl_ranker.models.objectives import Task
from mtl_ranker.studies.lightgbm_baseline import Boosting, tree_inputs, tune_lightgbm
from mtl_ranker.studies.search import Budget, Space, Uniform, search
from mtl_ranker.training.batches import Examples

TASKS = [Task("a", "binary"), Task("b", "binary")]
SPACE = Space(
    {
        "learning_rate": Uniform(0.05, 0.2, log=True),
        "num_leaves": Uniform(4, 16),
        "categorical": ("ordinal", "categorical"),
    },
    first={"learning_rate": 0.1, "num_leaves": 8, "categorical": "ordinal"},
)


def rows(count: int, seed: int) -> Examples:
    """A code and two numbers; the first label follows a number, the second the code."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(0, 8, (count, 1), generator=generator)
    numbers = torch.randn(count, 2, generator=generator)
    chance = torch.sigmoid(torch.stack([3 * numbers[:, 0], 4.0 * (code[:, 0] % 2) - 2], 1))
    labels = (torch.rand(count, 2, generator=generator) < chance).float()
    return Examples(code, code[:, :0], numbers, labels)


@pytest.fixture
def examples() -> dict[str, Examples]:
    return {part: rows(1_500, seed) for seed, part in enumerate(("train", "validate", "test"))}


def test_search_starts_with_the_first_trial_and_keeps_to_the_space():
    pytest.importorskip("optuna")
    tried: list[dict] = []

    def objective(parameters: dict, number: int) -> float:
        assert number == len(tried)
        tried.append(parameters)
        return -abs(parameters["num_leaves"] - 12)

    best = search(SPACE, objective, trials=8)
    assert tried[0] == SPACE.first
    assert all(0.05 <= t["learning_rate"] <= 0.2 and 4 <= t["num_leaves"] <= 16 for t in tried)
    assert all(isinstance(t["num_leaves"], int) for t in tried)
    assert best.value == max(-abs(t["num_leaves"] - 12) for t in tried)
    assert best.parameters in tried


def test_baseline_learns_each_objective_and_repeats_itself(examples):
    pytest.importorskip("lightgbm")
    pytest.importorskip("optuna")
    told: list[str] = []
    boosting = Boosting(SPACE, patience=5, rounds=40, refit=True)
    budget = Budget(trials=2, seeds=range(2))
    found = tune_lightgbm(TASKS, examples, boosting, budget, told.append)
    assert len(told) == len(TASKS) * (2 + 2)
    assert set(found.settings["a"]) == set(SPACE.parameters)
    labels = examples["test"].labels.numpy()
    for prediction in (*found.predictions, *found.refit):
        assert prediction.shape == (1_500, 2)
        assert auc(labels[:, 0], prediction[:, 0]) > 0.85
        assert auc(labels[:, 1], prediction[:, 1]) > 0.8
    assert not np.array_equal(found.predictions[0], found.refit[0])
    again = tune_lightgbm(TASKS, examples, boosting, budget)
    np.testing.assert_array_equal(found.refit[1], again.refit[1])


def test_without_refit_there_is_none(examples):
    pytest.importorskip("lightgbm")
    pytest.importorskip("optuna")
    found = tune_lightgbm(TASKS, examples, Boosting(SPACE, 5, 10), Budget(1, range(1)))
    assert found.refit == []
    assert found.refit_seconds == 0.0
    assert tree_inputs(examples["test"]).shape == (1_500, 3)


def in_lists(count: int, seed: int) -> Examples:
    """Rows of shuffled lists of five; the label follows a number and the list's level, both given.

    The level tells lists apart, and nothing within one.
    """
    found = rows(count, seed)
    generator = torch.Generator().manual_seed(seed)
    lists = torch.arange(count // 5).repeat(5)[torch.randperm(count, generator=generator)]
    level = 4 * torch.randn(count // 5, generator=generator)[lists]
    chance = torch.sigmoid(3 * found.numeric[:, 0] + level)
    label = (torch.rand(count, generator=generator) < chance).float().unsqueeze(1)
    numeric = torch.stack([found.numeric[:, 0], level], 1)
    return replace(found, numeric=numeric, labels=label, lists=lists)


@pytest.mark.parametrize("objective", ["lambdarank", "rank_xendcg"])
def test_a_ranking_objective_learns_the_order_within_lists(objective):
    """The level, by which a pointwise one ranks all rows, is of no use to it."""
    pytest.importorskip("lightgbm")
    pytest.importorskip("optuna")
    parts = {part: in_lists(1_500, seed) for seed, part in enumerate(("train", "validate", "test"))}
    boosting = Boosting(SPACE, patience=5, rounds=30, refit=True, objective=objective)
    task, budget = [Task("a", "binary")], Budget(1, range(1))
    found = tune_lightgbm(task, parts, boosting, budget)
    label, lists = parts["test"].labels[:, 0].numpy(), parts["test"].lists.numpy()
    for prediction in (*found.predictions, *found.refit):
        assert gauc(label, prediction[:, 0], lists) > 0.85
    assert 0.8 < found.validate_quality[0] <= 1
    assert found.predictions[0].min() < 0  # scores, no probabilities
    pointwise = tune_lightgbm(task, parts, replace(boosting, objective="binary"), budget)
    over_rows = [auc(label, each.predictions[0][:, 0]) for each in (found, pointwise)]
    assert over_rows[0] < over_rows[1] - 0.05
    with pytest.raises(ValueError, match="needs the list of each row"):
        tune_lightgbm(task, {p: replace(r, lists=None) for p, r in parts.items()}, boosting, budget)
