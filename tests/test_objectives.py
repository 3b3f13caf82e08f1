"""Losses: masked, weighted, equal to scikit-learn's."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import log_loss

from mtl_ranker.objectives import Task, losses, predictions, transform_labels

TASKS = [Task("click", "binary"), Task("watch", "regression", transform="log1p")]
NAN = float("nan")


def test_binary_loss_is_scikit_learns_on_labelled_rows():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(50, 1)))
    label = (rng.random((50, 1)) < 0.3).astype(float)
    label[::7] = NAN
    weight = torch.tensor(rng.random(50))
    known = ~np.isnan(label[:, 0])
    expected = log_loss(
        label[known, 0], torch.sigmoid(logits)[known, 0].numpy(), sample_weight=weight[known]
    )
    found = losses(logits, torch.tensor(label), TASKS[:1], weight)
    assert abs(float(found[0]) - expected) < 1e-9


def test_regression_on_log1p_scale_by_hand():
    labels = transform_labels(torch.tensor([[1.0, np.e - 1], [0.0, NAN]]), TASKS)
    found = losses(torch.tensor([[0.0, 3.0], [0.0, 99.0]]), labels, TASKS)
    np.testing.assert_allclose(found.numpy(), [np.log(2), 4.0], rtol=1e-6)


def test_missing_labels_send_no_gradient():
    logits = torch.zeros(2, 2, requires_grad=True)
    losses(logits, torch.tensor([[1.0, NAN], [NAN, NAN]]), TASKS).sum().backward()
    assert logits.grad[0, 0] != 0
    assert logits.grad.count_nonzero() == 1


def test_predictions_are_in_the_labels_unit():
    found = predictions(torch.tensor([[0.0, np.log(8.0)]]), TASKS)
    np.testing.assert_allclose(found.numpy(), [[0.5, 7.0]], rtol=1e-5)
