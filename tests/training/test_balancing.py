"""Loss balancing: each method against its formula, by hand or in a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear
from mtl_ranker.models.objectives import Task, losses
from mtl_ranker.models.presets import linear, make
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.training.balancing import (
    BALANCERS,
    DynamicWeightAverage,
    GradNorm,
    Uncertainty,
    gradient_cosine,
    project_conflicts,
)
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.loop import Design, Rows, train_ranker
from tests.training import rows as small

TASKS = [Task("click", "binary"), Task("like", "binary", weight=2.0)]
WEIGHTS = torch.tensor([1.0, 2.0])
BASE = torch.tensor([0.5, 0.25])


def ranker() -> Ranker:
    torch.manual_seed(0)
    embedding = FeatureEmbedding([6], [], PiecewiseLinear([[0.0, 1.0]], [False]), 4)
    return Ranker(make("m", {"preset": "mmoe", "dropout": 0.0}, 2), embedding)


def step_losses(model: Ranker) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 6, (64, 1), generator=generator)
    label = torch.rand(64, 2, generator=generator).round()
    logits = model(rows, rows[:, :0], torch.rand(64, 1, generator=generator))
    return losses(logits, label, TASKS)


def gradients_of(model: Ranker) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_fixed_is_the_weighted_sum():
    model = ranker()
    (step_losses(model) * WEIGHTS).sum().backward()
    expected = gradients_of(model)
    model.zero_grad()
    BALANCERS["fixed"](model, WEIGHTS, BASE).backward(step_losses(model), torch.zeros(()))
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_uncertainty_settles_where_the_variance_is_twice_the_loss():
    """The minimum over s of e^-s L + s/2 is at e^s = 2 L (Kendall et al. 2018)."""
    balancer = Uncertainty(ranker(), torch.ones(2), BASE)
    optimiser = torch.optim.Adam(balancer.parameters, lr=0.05)
    constant = torch.tensor([0.25, 2.0])
    for _ in range(600):
        optimiser.zero_grad()
        balancer.backward(constant, torch.zeros(()))
        optimiser.step()
    variance = torch.exp(balancer.log_variance.detach())
    np.testing.assert_allclose(variance, [0.5, 4.0], rtol=1e-3)


def test_dwa_weighs_by_relative_descent():
    balancer = DynamicWeightAverage(ranker(), torch.ones(2), BASE)
    balancer.end_epoch(torch.tensor([1.0, 1.0]))
    assert balancer.weights.tolist() == [1.0, 1.0]
    balancer.end_epoch(torch.tensor([0.5, 1.0]))
    e = np.exp([0.25, 0.5])
    np.testing.assert_allclose(balancer.weights, 2 * e / e.sum(), rtol=1e-6)


def test_gradnorm_moves_weight_to_the_slower_objective_and_keeps_the_sum():
    model = ranker()
    balancer = GradNorm(model, torch.ones(2), BASE)
    balancer.backward(step_losses(model), torch.zeros(()))
    for _ in range(20):
        loss = step_losses(model)
        # As if the first loss had decreased to a tenth, and the second not at all.
        balancer.initial = loss.detach() * torch.tensor([10.0, 1.0])
        balancer.backward(loss, torch.zeros(()))
    assert balancer.weights[1] > 1.2 > 0.8 > balancer.weights[0]
    np.testing.assert_allclose(float(balancer.weights.sum()), 2.0, rtol=1e-6)


def test_gradnorm_steps_towards_the_mean_norm_times_the_rate_to_the_power_of_its_exponent():
    """One step by a loop over the formula; the target's side of G depends on the exponent."""
    model = ranker()
    balancer = GradNorm(model, torch.tensor([1.0, 1.0]), BASE)
    loss = step_losses(model)
    norms = [
        float(torch.cat([g.flatten() for g in gradient]).norm())
        for gradient in (
            torch.autograd.grad(loss[t], balancer.shared, retain_graph=True) for t in range(2)
        )
    ]
    share = norms[0] / np.mean(norms)  # of the first objective's norm
    # Relative rates r and 2 - r, with r between those at which exponents 1 and 1.5, and 1.5 and 2,
    # disagree on whether the first norm is below its target r^alpha.
    for between in (1.25, 1.75):
        rate = share ** (1 / between)
        balancer.weights = torch.tensor([1.0, 1.0])
        balancer.initial = loss.detach() / torch.tensor([rate, 2 - rate])
        balancer.backward(loss, torch.zeros(()))
        loss = step_losses(model)
        step = 0.025 * np.sign([share - rate**1.5, 2 - share - (2 - rate) ** 1.5])
        expected = 1 - step * np.array(norms) / np.mean(norms)
        np.testing.assert_allclose(balancer.weights, 2 * expected / expected.sum(), rtol=1e-4)


def test_gradnorm_waits_for_an_objectives_first_labels():
    """After a first batch without likes, whose loss is 0, it goes on as if it began there."""
    model = ranker()
    late, plain = GradNorm(model, torch.ones(2), BASE), GradNorm(model, torch.ones(2), BASE)
    late.backward(step_losses(model) * torch.tensor([1.0, 0.0]), torch.zeros(()))
    for batch in range(6):
        factor = torch.tensor([1.0, 0.9**batch])
        late.backward(step_losses(model) * factor, torch.zeros(()))
        plain.backward(step_losses(model) * factor, torch.zeros(()))
    torch.testing.assert_close(late.weights, plain.weights)
    assert late.weights[0] > 1.01


def test_pcgrad_removes_the_conflict():
    gradient = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    projected = project_conflicts(gradient)
    # g1 - (g1·g2/|g2|²) g2 = (1,0) + ½(-1,1); g2 - (g2·g1/|g1|²) g1 = (0,1)
    np.testing.assert_allclose(projected, [[0.5, 0.5], [0.0, 1.0]])
    agreeing = torch.tensor([[1.0, 0.5], [0.2, 1.0]])
    torch.testing.assert_close(project_conflicts(agreeing), agreeing)


def test_pcgrad_equals_fixed_where_objectives_agree():
    model = ranker()
    with torch.no_grad():
        for parameter in (*model.towers.weights, *model.towers.biases):
            parameter.copy_(parameter[:1].expand_as(parameter))
        gate = model.layers[0].gates.weight
        gate.copy_(gate[:1].expand_as(gate))
    same_loss = step_losses(model)[:1].expand(2)
    (same_loss * WEIGHTS).sum().backward()
    expected = gradients_of(model)
    model.zero_grad()
    same_loss = step_losses(model)[:1].expand(2)
    BALANCERS["pcgrad"](model, WEIGHTS, BASE).backward(same_loss, torch.zeros(()))
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_gradient_cosine_is_autograds():
    model = ranker()
    shared = model.shared_parameters()
    rows = []
    for t in range(2):
        gradient = torch.autograd.grad(step_losses(model)[t], shared)
        rows.append(torch.cat([g.flatten() for g in gradient]))
    expected = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)
    cosine = gradient_cosine(step_losses(model), shared)
    torch.testing.assert_close(cosine[0, 1], expected)
    torch.testing.assert_close(cosine.diagonal(), torch.ones(2))


@pytest.mark.parametrize("method", sorted(BALANCERS))
def test_every_method_lowers_the_losses(method):
    model = ranker()
    balancer = BALANCERS[method](model, WEIGHTS, BASE)
    learned = [*model.parameters(), *balancer.parameters]
    optimiser = torch.optim.Adam([p for p in learned if p.requires_grad], lr=0.02)
    before = step_losses(model).detach()
    for step in range(60):
        optimiser.zero_grad()
        balancer.backward(step_losses(model), torch.zeros(()))
        optimiser.step()
        if step % 20 == 19:
            balancer.end_epoch(step_losses(model).detach())
    assert (step_losses(model) < before - 0.01).all()


def test_normalised_divides_each_loss_by_that_of_the_training_mean():
    model = ranker()
    (step_losses(model) * WEIGHTS / torch.tensor([0.5, 0.25])).sum().backward()
    expected = gradients_of(model)
    model.zero_grad()
    BALANCERS["normalised"](model, WEIGHTS, BASE).backward(step_losses(model), torch.zeros(()))
    gradient = gradients_of(model)
    assert all(torch.allclose(gradient[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", sorted(BALANCERS))
def test_a_balancer_restored_is_the_one_saved(method):
    """A step after `state()` equals the same step of a new balancer after `restore()`."""

    def stepped(balancer, model):
        model.zero_grad()
        torch.manual_seed(3)
        balancer.backward(step_losses(model), torch.zeros(()))
        for parameter in balancer.parameters:
            parameter.data -= 0.1 * parameter.grad
        balancer.end_epoch(torch.tensor([0.6, 0.4]) / (1 + balancer.weights.sum()))
        return gradients_of(model)

    model = ranker()
    balancer = BALANCERS[method](model, WEIGHTS, BASE)
    for _ in range(2):
        stepped(balancer, model)
    saved = balancer.state()
    expected = stepped(balancer, model)
    restored = BALANCERS[method](model, WEIGHTS, BASE)
    restored.restore(saved)
    gradient = stepped(restored, model)
    assert gradient.keys() == expected.keys()
    assert all(torch.equal(gradient[name], expected[name]) for name in expected)


@pytest.mark.parametrize("sparse_rows", [100_000, 1])
@pytest.mark.parametrize("method", sorted(BALANCERS))
def test_a_linear_model_which_has_no_layers_trains_with_every_method(method, sparse_rows):
    """With a sparse table, objectives share no dense parameters: no gradient to compare."""
    frame = small.frame(256)
    encoder = small.encoder(frame)
    rows = encode_examples(encoder, frame, small.LABELS)
    settings = small.settings(balancing=method, sparse_rows=sparse_rows, learning_rate=0.05)
    design = Design(linear(len(small.TASKS)), encoder, small.TASKS)
    trained = train_ranker(design, Rows(rows, rows), settings, 0)
    first, last = trained.epochs[0].train_loss, trained.epochs[-1].train_loss
    assert all(after < before for before, after in zip(first, last, strict=True))
    cosine = np.array(trained.epochs[-1].gradient_cosine)
    assert np.isfinite(cosine).all()
