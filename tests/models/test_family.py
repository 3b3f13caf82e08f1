"""The models against naive loops over the paper's equations, with the same weights."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest
import torch

from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear
from mtl_ranker.models.presets import mmoe, omoe, shared_bottom, single_task
from mtl_ranker.models.ranker import Ranker, RankerSpec

B = 32


def make_ranker(spec: RankerSpec) -> Ranker:
    numerics = PiecewiseLinear([[0.0, 0.5, 1.0], [-1.0, 1.0]], [True, False])
    ranker = Ranker(spec, FeatureEmbedding([5, 3], [(4, 2)], numerics, 4))
    return ranker.eval()


def make_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    categorical = torch.stack(
        [torch.randint(0, 5, (B,), generator=rng), torch.randint(0, 3, (B,), generator=rng)], 1
    )
    bags = torch.randint(0, 4, (B, 2), generator=rng)
    numeric = torch.randn(B, 2, generator=rng)
    numeric[0, 0] = float("nan")
    return categorical, bags, numeric


def naive(ranker: Ranker, rows: tuple[torch.Tensor, ...]) -> np.ndarray:
    """y_k = h^k(Σ_i g^k(x)_i f_i(x)), one row, expert and objective at a time, in NumPy."""
    inputs = ranker.embedding(*rows).detach().numpy()
    visible = np.array(ranker.spec.visible)
    gate = ranker.gates.linear
    out = np.zeros((len(inputs), len(visible)))
    for b, x in enumerate(inputs):
        heard_by = []
        for e in range(visible.shape[1]):
            h = x
            for w, c in zip(ranker.experts.weights, ranker.experts.biases, strict=True):
                h = np.maximum(w[e].detach().numpy() @ h + c[e].detach().numpy(), 0)
            heard_by.append(h)
        for k in range(len(visible)):
            if gate is None:
                g = visible[k].astype(float)
            else:
                start = 0 if ranker.spec.tied_gate else k * visible.shape[1]
                z = gate.weight[start : start + visible.shape[1]].detach().numpy() @ x
                z = np.where(visible[k], np.exp(z - z.max()), 0)
                g = z / z.sum()
            h = sum(g[e] * heard_by[e] for e in range(visible.shape[1]))
            layers = list(zip(ranker.towers.weights, ranker.towers.biases, strict=True))
            for depth, (w, c) in enumerate(layers):
                h = w[k].detach().numpy() @ h + c[k].detach().numpy()
                h = np.maximum(h, 0) if depth < len(layers) - 1 else h
            out[b, k] = h[0]
    return out


@pytest.mark.parametrize(
    "spec",
    [
        single_task(3, [8], [4]),
        shared_bottom(3, [8, 6], [4]),
        omoe(3, 4, [8, 6], [4]),
        mmoe(3, 4, [8], []),
        mmoe(2, 5, [8, 8], [4, 4]),
    ],
    ids=["single_task", "shared_bottom", "omoe", "mmoe no tower", "mmoe deep"],
)
def test_equals_the_equations_in_loops(spec):
    torch.manual_seed(1)
    ranker, rows = make_ranker(spec), make_rows()
    np.testing.assert_allclose(ranker(*rows).detach().numpy(), naive(ranker, rows), atol=1e-5)


def test_mmoe_with_one_expert_is_shared_bottom():
    torch.manual_seed(1)
    bottom = make_ranker(shared_bottom(3, [8], [4]))
    one = make_ranker(mmoe(3, 1, [8], [4]))
    one.load_state_dict(bottom.state_dict())
    torch.testing.assert_close(one(*make_rows()), bottom(*make_rows()))


def test_omoe_is_mmoe_with_tied_gates():
    torch.manual_seed(1)
    single = make_ranker(omoe(3, 4, [8], [4]))
    many = make_ranker(mmoe(3, 4, [8], [4]))
    state = single.state_dict()
    state["gates.linear.weight"] = state["gates.linear.weight"].repeat(3, 1)
    many.load_state_dict(state)
    torch.testing.assert_close(many(*make_rows()), single(*make_rows()))


def test_permuting_experts_and_gates_changes_nothing():
    torch.manual_seed(1)
    ranker = make_ranker(mmoe(2, 4, [8], [4]))
    before = ranker(*make_rows())
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameters in (ranker.experts.weights, ranker.experts.biases):
            for parameter in parameters:
                parameter.copy_(parameter[order].clone())
        gate = ranker.gates.linear.weight
        gate.copy_(gate.unflatten(0, (2, 4))[:, order].flatten(0, 1).clone())
    torch.testing.assert_close(ranker(*make_rows()), before)


def test_single_task_objectives_do_not_touch_each_other():
    torch.manual_seed(1)
    ranker = make_ranker(single_task(3, [8], [4]))
    ranker(*make_rows())[:, 1].sum().backward()
    gradient = ranker.experts.weights[0].grad
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].abs().sum() == 0


def test_every_expert_starts_different_and_gets_a_gradient():
    torch.manual_seed(1)
    ranker = make_ranker(mmoe(2, 6, [16], [4]))
    weight = ranker.experts.weights[0]
    assert torch.pdist(weight.flatten(1)).min() > 1e-3
    ranker(*make_rows()).square().sum().backward()
    assert (weight.grad.flatten(1).abs().sum(1) > 0).all()


def test_gates_are_distributions_over_visible_experts():
    torch.manual_seed(1)
    visible = ((True, True, False), (False, True, True))
    ranker = make_ranker(RankerSpec(visible, expert_hidden=(8,)))
    weights = ranker.gate_weights(*make_rows())
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, 2))
    assert (weights[:, 0, 2] == 0).all()
    assert (weights[:, 1, 0] == 0).all()


def test_export_gives_the_same_scores():
    torch.manual_seed(1)
    ranker, rows = make_ranker(mmoe(2, 4, [8], [4])), make_rows()
    program = torch.export.export(ranker, rows)
    torch.testing.assert_close(program.module()(*rows), ranker(*rows))


@pytest.mark.parametrize("name", ["embedding", "experts", "gates", "towers"])
def test_docstring_examples_run(name):
    module = importlib.import_module(f"mtl_ranker.models.{name}")
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
