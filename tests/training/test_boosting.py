"""Predictions of the forest equal those of scikit-learn's own trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import log_loss

from mtl_ranker.models.objectives import Task
from mtl_ranker.models.trees import Forest, averaged
from mtl_ranker.training.batches import Examples
from mtl_ranker.training.boosting import SETTINGS, fit_forest, hard_labels

TASKS = [Task("click", "binary"), Task("watch", "regression"), Task("like", "binary")]


def rows(count: int, seed: int) -> Examples:
    random = np.random.default_rng(seed)
    numeric = random.normal(size=(count, 4)).astype(np.float32)
    numeric[:, 1] = numeric[:, 1].round(1)  # ties on thresholds
    numeric[random.random(numeric.shape) < 0.2] = np.nan
    codes = random.integers(0, 6, (count, 2))
    z = np.nan_to_num(numeric[:, 0]) - np.isnan(numeric[:, 1]) + (codes[:, 0] == 3)
    click = (random.random(count) < 1 / (1 + np.exp(-z))).astype(np.float32)
    like = np.where(random.random(count) < 0.3, np.nan, click * (codes[:, 1] > 2))
    labels = np.stack([click, z.astype(np.float32), like.astype(np.float32)], 1)
    tensors = [torch.from_numpy(a) for a in (codes, np.zeros((count, 0), np.int64), numeric)]
    return Examples(*tensors, torch.from_numpy(labels))


def matrix(examples: Examples) -> np.ndarray:
    return np.concatenate([examples.numeric.numpy(), examples.categorical.numpy()], 1)


@pytest.mark.parametrize("weighted", [False, True])
def test_predictions_equal_scikit_learns(weighted: bool) -> None:
    train, other = rows(3_000, 0), rows(500, 1)
    weight = torch.rand(3_000) + 0.5 if weighted else None
    train = Examples(*train.inputs, train.labels, weight=weight)
    forest = fit_forest(TASKS, train, trees=[20, 20, 7], seed=3)
    logits = forest(torch.from_numpy(matrix(other)).float())
    for t, trees in ((0, 20), (2, 7)):
        y = train.labels[:, t].numpy()
        present = ~np.isnan(y)
        model = HistGradientBoostingClassifier(max_iter=trees, random_state=3, **SETTINGS)
        model.fit(matrix(train)[present], y[present], None if weight is None else weight[present])
        expected = model.decision_function(matrix(other))
        np.testing.assert_allclose(logits[:, t].numpy(), expected, rtol=0, atol=1e-5)
    assert logits[:, 1].isnan().all()
    assert forest.trees == [20, 0, 7]


@pytest.mark.slow
def test_keeps_the_number_of_trees_with_the_least_validation_loss() -> None:
    train, validate = rows(600, 0), rows(400, 1)
    kept = fit_forest(TASKS, train, trees=[60] * 3, seed=0, validate=validate).trees[0]
    assert 1 < kept < 60
    losses = {}
    for trees in (1, 10, 20, 30, 40, kept - 1, kept, kept + 1, 60):
        z = fit_forest(TASKS[:1], train, trees=[trees], seed=0)(
            torch.from_numpy(matrix(validate)).float()
        )[:, 0]
        losses[trees] = log_loss(validate.labels[:, 0].numpy(), torch.sigmoid(z).numpy())
    assert min(losses, key=lambda trees: losses[trees]) == kept


@pytest.mark.parametrize("label", [0.0, 1.0, float("nan")])
def test_an_objective_with_one_label_only_or_none_has_no_trees(label: float) -> None:
    train = rows(200, 0)
    train.labels[:, 2] = label
    forest = fit_forest(TASKS, train, trees=[5, 5, 5], seed=0, validate=rows(100, 1))
    assert forest.trees[1:] == [0, 0]
    assert 1 <= forest.trees[0] <= 5


def test_rows_of_weight_zero_are_no_labels() -> None:
    train = rows(200, 0)
    weight = (train.labels[:, 0] < 0.5).float()  # all clicks weigh nothing, so all likes neither
    only_negatives = Examples(*train.inputs, train.labels, weight=weight)
    forest = fit_forest(TASKS, only_negatives, trees=[5, 5, 5], seed=0)
    assert forest.trees == [0, 0, 0]
    assert forest(torch.from_numpy(matrix(rows(4, 2))).float()).isnan().all()


def test_without_validation_labels_all_trees_are_kept() -> None:
    validate = rows(100, 1)
    validate.labels[:, 2] = float("nan")
    assert fit_forest(TASKS, rows(200, 0), [5, 5, 5], 0, validate=validate).trees[2] == 5


def test_average_is_of_log_odds_and_leaves_objectives_without_trees() -> None:
    prediction = torch.tensor([[0.5, 7.0], [0.2, -3.0]])
    forest = torch.tensor([[0.0, float("nan")], [float(np.log(4)), float("nan")]])
    expected = [[0.5, 7.0], [0.5, -3.0]]
    torch.testing.assert_close(averaged(prediction, forest), torch.tensor(expected))


def test_the_forest_can_be_exported() -> None:
    forest = fit_forest(TASKS, rows(500, 0), trees=[5, 0, 3], seed=0)
    numbers = torch.from_numpy(matrix(rows(64, 2))).float()
    program = torch.export.export(forest, (numbers,)).module()
    torch.testing.assert_close(program(numbers), forest(numbers), equal_nan=True)
    assert isinstance(forest, Forest)


def test_a_column_without_values_changes_nothing() -> None:
    """scikit-learn refuses it; no tree splits on it, so its value does not matter."""
    train, other = rows(2_000, 0), rows(200, 1)
    width = train.numeric.shape[1]
    empty = Examples(
        train.categorical,
        train.bags,
        torch.cat([train.numeric, torch.full((2_000, 1), torch.nan)], 1),
        train.labels,
    )
    forest = fit_forest(TASKS, empty, trees=[5, 0, 5], seed=0)
    numbers = torch.from_numpy(matrix(other)).float()
    logits = []
    for value in (torch.nan, 3.0):
        column = torch.full((200, 1), value)
        inputs = torch.cat([numbers[:, :width], column, numbers[:, width:]], 1)
        logits.append(forest(inputs)[:, [0, 2]])
    assert torch.equal(logits[0], logits[1])
    assert logits[0].std(0).min() > 0


def test_without_validation_labels_every_tree_is_kept() -> None:
    train, validate = rows(1_000, 0), rows(100, 1)
    labels = validate.labels.clone()
    labels[:, 2] = torch.nan
    unlabelled = Examples(*validate.inputs, labels)
    forest = fit_forest(TASKS, train, trees=[4, 0, 6], seed=0, validate=unlabelled)
    assert forest.trees[2] == 6


def test_a_soft_label_is_two_weighted_rows_of_the_same_loss() -> None:
    x, y = np.arange(4.0).reshape(4, 1), np.array([0.0, 0.25, 1.0, 0.5], np.float32)
    weight = np.array([1.0, 2.0, 1.0, 4.0], np.float32)
    rows_of, labels, weights = hard_labels(x, y, weight)
    assert weights is not None
    found = sorted(zip(rows_of[:, 0], labels, weights, strict=True))
    assert found == [(0, 0, 1), (1, 0, 1.5), (1, 1, 0.5), (2, 1, 1), (3, 0, 2), (3, 1, 2)]
    assert hard_labels(x, np.round(y), None)[2] is None


@pytest.mark.slow
def test_the_number_of_trees_is_that_of_the_least_loss_on_soft_labels() -> None:
    train, validate = rows(600, 0), rows(400, 1)
    labels = validate.labels.clone()
    labels[:, 0] = 0.25 + labels[:, 0] / 2
    soft = fit_forest(TASKS, train, [60] * 3, 0, validate.with_labels(lambda _: labels))
    x = torch.from_numpy(matrix(validate)).float()
    losses = {}
    for trees in (1, 5, 20, 60, *range(max(soft.trees[0] - 2, 1), soft.trees[0] + 3)):
        z = fit_forest(TASKS[:1], train, [trees], 0)(x)[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, labels[:, 0])
        losses[trees] = loss.item()
    assert soft.trees[0] == min(losses, key=lambda trees: losses[trees])


def test_trees_learn_from_soft_labels() -> None:
    train = rows(3_000, 0)
    labels = train.labels.clone()
    labels[:, 0] = torch.where(train.categorical[:, 0] == 3, 0.9, 0.2)
    soft = fit_forest(TASKS, train.with_labels(lambda _: labels), [200, 0, 0], 0)
    probability = torch.sigmoid(soft(torch.from_numpy(matrix(train)))[:, 0])
    torch.testing.assert_close(probability, labels[:, 0], atol=0.1, rtol=0)
