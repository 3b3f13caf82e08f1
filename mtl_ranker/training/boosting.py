"""Boosted trees for the binary objectives, fitted by scikit-learn and kept as plain tensors.

A network and trees make different mistakes, so their average ranks better than either
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
from mtl_ranker.models.trees import Forest, tree_numbers
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
    most: int,
    seed: int,
    validate: Examples | None = None,
    trees: Sequence[int] | None = None,
) -> Forest:
    """Trees for each binary objective; rows without its label are left out of its own.

    Args:
        most: trees an objective at most; as many are kept as give the least log loss on
            `validate`.
        trees: of each objective, without validation rows: as many as an earlier forest kept.
    """
    numbers = tree_numbers(train.categorical, train.numeric)
    x = numbers.numpy()
    if validate is not None:
        held_out = tree_numbers(validate.categorical, validate.numeric).numpy()
        labels = validate.labels.numpy()
    fitted: list[HistGradientBoostingClassifier | None] = []
    kept: list[int] = []
    for t, task in enumerate(tasks):
        known = ~torch.isnan(train.labels[:, t]).numpy()
        y = train.labels[:, t].numpy()[known]
        wanted = most if trees is None else trees[t]
        if task.kind != "binary" or wanted == 0 or y.min(initial=1.0) == y.max(initial=0.0):
            fitted.append(None)
            kept.append(0)
            continue
        model = HistGradientBoostingClassifier(max_iter=wanted, random_state=seed, **SETTINGS)
        weight = None if train.weight is None else train.weight.numpy()[known]
        model.fit(x[known], y, weight)
        fitted.append(model)
        kept.append(wanted if validate is None else _best(model, held_out, labels[:, t]))
    forest = Forest(numbers.shape[1], kept, DEPTH)
    for t, model in enumerate(fitted):
        if model is not None:
            forest.fill(t, *_tensors(model, kept[t]))
    return forest.eval()


def _best(model: HistGradientBoostingClassifier, x: np.ndarray, label: np.ndarray) -> int:
    """With how many trees the log loss is least: x [N, F], label [N], NaN = missing."""
    known = ~np.isnan(label)
    staged = model.staged_predict_proba(x[known])
    losses = [log_loss(label[known], p, labels=[0, 1]) for p in staged]
    return int(np.argmin(losses)) + 1


def _tensors(model: HistGradientBoostingClassifier, trees: int) -> tuple[Any, ...]:
    """The arguments of `Forest.fill`: every tree as a full one of depth DEPTH."""
    inner = 2**DEPTH - 1
    feature = np.zeros((trees, inner), np.int64)
    threshold = np.full((trees, inner), np.inf, np.float32)
    right = np.zeros((trees, inner), bool)
    leaf = np.zeros((trees, inner + 1))

    def place(tree: int, nodes: np.ndarray, number: int, at: int, level: int) -> None:
        node = nodes[number]
        if node["is_leaf"]:
            width = 2 ** (DEPTH - level)
            first = (at - (2**level - 1)) * width
            leaf[tree, first : first + width] = node["value"]
            return
        # x <= threshold for float32 x is x <= the greatest float32 that is not above it.
        limit = np.float32(node["num_threshold"])
        if limit > node["num_threshold"]:
            limit = np.nextafter(limit, np.float32(-np.inf))
        # An infinite one parts what is missing from all that is not.
        feature[tree, at] = node["feature_idx"]
        threshold[tree, at] = min(limit, np.finfo(np.float32).max)
        right[tree, at] = not node["missing_go_to_left"]
        place(tree, nodes, node["left"], 2 * at + 1, level + 1)
        place(tree, nodes, node["right"], 2 * at + 2, level + 1)

    # scikit-learn has no public way to its trees; a test compares the forest's predictions to its.
    for tree, (predictor,) in enumerate(islice(model._predictors, trees)):
        place(tree, predictor.nodes, 0, 0, 0)
    return feature, threshold, right, leaf, float(model._baseline_prediction.item())
