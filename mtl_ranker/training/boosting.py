"""Boosted trees for the binary objectives, fitted by scikit-learn and stored as tensors.

Errors of a network and of trees are different, so that their average ranks better than either
(docs/decisions/0005).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import log_loss

from mtl_ranker.models.objectives import Task
from mtl_ranker.models.trees import Forest, TreeArrays, tree_numbers
from mtl_ranker.training.batches import Examples

DEPTH = 4
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.1,
    "max_depth": DEPTH,
    "max_leaf_nodes": 2**DEPTH,
    "min_samples_leaf": 50,
    "l2_regularization": 10.0,
    "max_features": 0.5,
    "early_stopping": False,
}


def fit_forest(
    tasks: Sequence[Task],
    train: Examples,
    trees: Sequence[int],
    seed: int,
    validate: Examples | None = None,
) -> Forest:
    """Fit trees for each binary objective on the rows that have its label.

    Args:
        trees: [T], number of trees of each objective; 0 for none.
        validate: if given, only the first trees of each objective are kept, as many as have the
            least log loss on these rows.

    Objectives that are not binary, or have only one label among the rows of `train` with a positive
    weight, get no trees. Without a label in `validate` all trees are kept.
    """
    numbers = tree_numbers(train.categorical, train.numeric)
    x = numbers.numpy()
    if validate is not None:
        held_out = tree_numbers(validate.categorical, validate.numeric).numpy()
        labels = validate.labels.numpy()
    fitted: list[HistGradientBoostingClassifier | None] = []
    kept: list[int] = []
    for t, task in enumerate(tasks):
        present = ~torch.isnan(train.labels[:, t]).numpy()
        if train.weight is not None:
            present &= train.weight.numpy() > 0
        y = train.labels[:, t].numpy()[present]
        one_class = not ((y > 0).any() and (y < 1).any())
        if task.kind != "binary" or trees[t] == 0 or one_class:
            fitted.append(None)
            kept.append(0)
            continue
        model = HistGradientBoostingClassifier(max_iter=trees[t], random_state=seed, **SETTINGS)
        weight = None if train.weight is None else train.weight.numpy()[present]
        rows = x[present]
        rows[:, np.isnan(rows).all(0)] = 0.0  # scikit-learn cannot bin a column without values
        rows, y, weight = hard_labels(rows, y, weight)
        model.fit(rows, y, weight)
        fitted.append(model)
        kept.append(trees[t] if validate is None else _best_number(model, held_out, labels[:, t]))
    forest = Forest(numbers.shape[1], kept, DEPTH)
    for t, model in enumerate(fitted):
        if model is not None:
            forest.fill(t, _tree_arrays(model, kept[t]))
    return forest.eval()


def hard_labels(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows with labels 0 and 1, which have the same weighted log loss as those with soft labels.

    A label y between is a positive of weight y and a negative of weight 1 − y.

    Args:
        x: [N, F].
        y: [N], in [0, 1].
        weight: [N], or None for 1.
    """
    soft = (y > 0) & (y < 1)
    if not soft.any():
        return x, y, weight
    weight = np.ones(len(y), np.float32) if weight is None else weight
    first = np.where(soft, weight * y, weight)
    return (
        np.concatenate([x, x[soft]]),
        np.concatenate([np.where(soft, 1.0, y), np.zeros(soft.sum(), y.dtype)]),
        np.concatenate([first, weight[soft] * (1 - y[soft])]),
    )


def _best_number(model: HistGradientBoostingClassifier, x: np.ndarray, label: np.ndarray) -> int:
    """Number of trees with the least log loss on rows x [N, F], label [N]; NaN = missing.

    All of them without a label.
    """
    present = ~np.isnan(label)
    if not present.any():
        return int(model.n_iter_)
    rows, y, weight = hard_labels(x[present], label[present], None)
    staged = model.staged_predict_proba(rows)
    losses = [log_loss(y, p, sample_weight=weight, labels=[0, 1]) for p in staged]
    return int(np.argmin(losses)) + 1


def _tree_arrays(model: HistGradientBoostingClassifier, trees: int) -> TreeArrays:
    """The model's first trees, each as a complete tree of depth DEPTH."""
    inner = 2**DEPTH - 1
    feature = np.zeros((trees, inner), np.int64)
    threshold = np.full((trees, inner), np.inf, np.float32)
    missing_right = np.zeros((trees, inner), bool)
    leaf = np.zeros((trees, inner + 1))

    def place(tree: int, nodes: np.ndarray, number: int, at: int, level: int) -> None:
        node = nodes[number]
        if node["is_leaf"]:
            width = 2 ** (DEPTH - level)
            first = (at - (2**level - 1)) * width
            leaf[tree, first : first + width] = node["value"]
            return
        # For float32 x, x <= threshold is x <= the greatest float32 not above the threshold.
        limit = np.float32(node["num_threshold"])
        if limit > node["num_threshold"]:
            limit = np.nextafter(limit, np.float32(-np.inf))
        # An infinite threshold separates missing numbers from all others.
        feature[tree, at] = node["feature_idx"]
        threshold[tree, at] = min(limit, np.finfo(np.float32).max)
        missing_right[tree, at] = not node["missing_go_to_left"]
        place(tree, nodes, node["left"], 2 * at + 1, level + 1)
        place(tree, nodes, node["right"], 2 * at + 2, level + 1)

    # scikit-learn has no public access to its trees; a test compares predictions with its own.
    for tree, (predictor,) in enumerate(islice(model._predictors, trees)):
        place(tree, predictor.nodes, 0, 0, 0)
    return TreeArrays(
        feature=torch.from_numpy(feature),
        threshold=torch.from_numpy(threshold),
        missing_right=torch.from_numpy(missing_right),
        leaf=torch.from_numpy(leaf),
        start=float(model._baseline_prediction.item()),
    )
