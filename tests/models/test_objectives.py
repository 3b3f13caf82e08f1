"""Losses and predictions against scikit-learn, loops and values worked out by hand."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import log_loss

from mtl_ranker.models.objectives import (
    Task,
    base_cutpoints,
    base_logits,
    ensemble_losses,
    losses,
    predictions,
    transform_labels,
)

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
    loss = losses(logits, torch.tensor(label), TASKS[:1], weight)
    assert abs(float(loss[0]) - expected) < 1e-9


def test_regression_on_log1p_scale_by_hand():
    labels = transform_labels(torch.tensor([[1.0, np.e - 1], [0.0, NAN]]), TASKS)
    loss = losses(torch.tensor([[0.0, 3.0], [0.0, 99.0]]), labels, TASKS)
    np.testing.assert_allclose(loss.numpy(), [np.log(2), 4.0], rtol=1e-6)


def test_missing_labels_send_no_gradient():
    logits = torch.zeros(2, 2, requires_grad=True)
    losses(logits, torch.tensor([[1.0, NAN], [NAN, NAN]]), TASKS).sum().backward()
    assert logits.grad[0, 0] != 0
    assert logits.grad.count_nonzero() == 1


def test_predictions_are_in_the_labels_unit():
    prediction = predictions(torch.tensor([[0.0, np.log(8.0)]]), TASKS)
    np.testing.assert_allclose(prediction.numpy(), [[0.5, 7.0]], rtol=1e-5)


def test_watch_time_odds_are_the_mean_watch_time():
    """At the best constant logit the prediction is the labels' mean (Covington et al. 2016)."""
    task = [Task("watch", "watch_time")]
    seconds = torch.tensor([[0.0], [3.0], [10.0], [NAN], [0.0]])
    best = base_logits(seconds, task).requires_grad_()
    loss = losses(best.expand(5, 1), seconds, task)
    loss.sum().backward()
    assert abs(float(best.grad)) < 1e-6
    np.testing.assert_allclose(predictions(best.detach()[None], task).numpy(), [[13 / 4]])
    by_hand, weights = 0.0, 0.0
    for y in (0.0, 3.0, 10.0, 0.0):
        p = torch.sigmoid(best.detach()[0])
        by_hand += -y * torch.log(p) - torch.log(1 - p)
        weights += 1 + y
    np.testing.assert_allclose(loss.detach().numpy(), [by_hand / weights], rtol=1e-6)


def test_chain_is_the_product_of_its_probabilities():
    tasks = [
        Task("like", "binary", conditional_on="click"),
        Task("click", "binary"),
        Task("share", "binary", conditional_on="like"),
    ]
    rng = np.random.default_rng(1)
    z = torch.tensor(rng.normal(size=(20, 3)), dtype=torch.float64)
    p = torch.sigmoid(z).numpy()
    expected = np.stack([p[:, 0] * p[:, 1], p[:, 1], p[:, 0] * p[:, 1] * p[:, 2]], 1)
    np.testing.assert_allclose(predictions(z, tasks).numpy(), expected, rtol=1e-6)
    labels = (rng.random((20, 3)) < 0.4).astype(float)
    loss = losses(z, torch.tensor(labels), tasks).numpy()
    for t in range(3):
        np.testing.assert_allclose(loss[t], log_loss(labels[:, t], expected[:, t]), rtol=1e-6)


def test_chained_gradient_reaches_the_parent():
    tasks = [Task("click", "binary"), Task("like", "binary", conditional_on="click")]
    z = torch.zeros(1, 2, requires_grad=True)
    losses(z, torch.tensor([[NAN, 1.0]]), tasks).sum().backward()
    np.testing.assert_allclose(z.grad.numpy(), [[-0.5, -0.5]], rtol=1e-5)


def test_ordinal_loss_and_expected_level_by_a_loop():
    task = [Task("stars", "ordinal", levels=4)]
    cuts = torch.tensor([[-1.0, 0.5, 2.0]])
    z = torch.tensor([[0.3], [-0.7], [1.9]])
    level = torch.tensor([[2.0], [0.0], [3.0]])
    loss, expected = [], []
    for row in range(3):
        above = [1 / (1 + np.exp(-(float(z[row]) - float(c)))) for c in cuts[0]]
        expected.append(sum(above))
        loss.append(
            -sum(np.log(p if float(level[row]) > c else 1 - p) for c, p in enumerate(above))
        )
    np.testing.assert_allclose(losses(z, level, task, None, cuts), [np.mean(loss)], rtol=1e-5)
    np.testing.assert_allclose(predictions(z, task, cuts)[:, 0], expected, rtol=1e-5)


def test_ordinal_cut_points_start_at_the_training_shares():
    task = [Task("stars", "ordinal", levels=3)]
    labels = torch.tensor([[0.0]] * 5 + [[1.0]] * 3 + [[2.0]] * 2)
    cuts = base_cutpoints(labels, task)
    above = torch.sigmoid(-cuts[0])
    np.testing.assert_allclose(above, [0.5, 0.2], rtol=1e-4)
    np.testing.assert_allclose(predictions(torch.zeros(1, 1), task, cuts), [[0.7]], rtol=1e-4)


def test_members_average_their_losses_and_predictions():
    tasks = [Task("click", "binary"), Task("watch", "regression", transform="log1p")]
    logits = torch.randn(4, 6, 2)
    labels = torch.rand(6, 2).round()
    each = torch.stack([losses(member, labels, tasks) for member in logits])
    torch.testing.assert_close(losses(logits, labels, tasks), each.mean(0))
    each = torch.stack([predictions(member, tasks) for member in logits])
    torch.testing.assert_close(predictions(logits, tasks), each.mean(0))


def test_a_row_of_weight_two_is_two_rows() -> None:
    """In the constants that training starts at and divides by."""
    torch.manual_seed(1)
    tasks = [Task("click", "binary"), Task("stars", "ordinal", levels=3)]
    labels = torch.stack([torch.rand(20).round(), torch.randint(0, 3, (20,)).float()], 1)
    weight = torch.ones(20)
    weight[:5] = 2.0
    twice = torch.cat([torch.arange(20), torch.arange(5)])
    torch.testing.assert_close(
        base_cutpoints(labels, tasks, weight), base_cutpoints(labels[twice], tasks)
    )


def test_ensemble_losses_are_those_of_the_served_prediction() -> None:
    """Each kind's loss as a function of the mean prediction, not the mean of members' losses."""
    torch.manual_seed(0)
    tasks = [
        Task("click", "binary"),
        Task("like", "binary", conditional_on="click"),
        Task("watch", "watch_time"),
        Task("spent", "regression", transform="log1p"),
        Task("age", "regression"),
        Task("stars", "ordinal", levels=3),
    ]
    cuts = torch.tensor([[0.0, 1.0]]).expand(6, -1)
    z = torch.randn(4, 30, 6, dtype=torch.float64)
    click = torch.rand(30).round()
    columns = [click, click * torch.rand(30).round(), *(torch.rand(30) * 3 for _ in range(3))]
    labels = torch.stack([*columns, torch.randint(0, 3, (30,)).float()], 1).double()
    labels[::5, 3:] = NAN
    served = predictions(z, tasks, cuts)
    found = ensemble_losses(z, labels, tasks, cuts)
    for t in (0, 1):
        expected = log_loss(labels[:, t].numpy(), served[:, t].numpy())
        np.testing.assert_allclose(found[t], expected, rtol=1e-5)
    y, mean = labels[:, 2], served[:, 2]
    cross_entropy = ((1 + y) * torch.log1p(mean) - y * torch.log(mean)).sum()
    np.testing.assert_allclose(found[2], cross_entropy / (1 + y).sum(), rtol=1e-5)
    known = ~labels[:, 3].isnan()
    error = (torch.log1p(served[known, 3]) - labels[known, 3]).square().mean()
    np.testing.assert_allclose(found[3], error, rtol=1e-5)
    error = (served[known, 4] - labels[known, 4]).square().mean()
    np.testing.assert_allclose(found[4], error, rtol=1e-5)
    above = torch.stack([torch.sigmoid(z[..., 5] - c).mean(0) for c in (0.0, 1.0)], 1)[known]
    level = labels[known, 5].unsqueeze(1) > torch.arange(2)
    likelihood = torch.where(level, above, 1 - above)
    np.testing.assert_allclose(found[5], -torch.log(likelihood).sum(1).mean(), rtol=1e-5)
    assert (found < losses(z, labels, tasks, None, cuts))[[0, 1, 2, 4, 5]].all()
    torch.testing.assert_close(
        ensemble_losses(z[:1], labels, tasks, cuts), losses(z[:1], labels, tasks, None, cuts)
    )
