"""The mixture of experts, accumulated one at a time, against the formula with all products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from mtl_ranker.models.gates import combine

# Outputs, members, experts, units and rows; whether the weights have members and rows of their own.
SHAPES = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)
)


def tensors(shape, own=(True, True), dtype=torch.float64):
    outputs, members, experts, units, rows = shape
    generator = torch.Generator().manual_seed(sum(shape))
    per_row = (members if own[0] else 1, experts, rows if own[1] else 1)
    weights = torch.randn(outputs, *per_row, generator=generator, dtype=dtype, requires_grad=True)
    inputs = (experts, members, units, rows)
    return weights, torch.randn(inputs, generator=generator, dtype=dtype, requires_grad=True)


def formula(weights, experts):
    return torch.einsum(
        "okeb,ekhb->okhb", weights.expand(-1, experts.shape[1], -1, experts.shape[3]), experts
    )


@given(shape=SHAPES, own=st.tuples(st.booleans(), st.booleans()))
def test_values_and_gradients_are_those_of_the_formula(shape, own):
    weights, experts = tensors(shape, own)
    mixture, expected = combine(weights, experts), formula(weights, experts)
    torch.testing.assert_close(mixture, expected)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    for found, wanted in zip(
        torch.autograd.grad(mixture, (weights, experts), upstream),
        torch.autograd.grad(expected, (weights, experts), upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("own", [(True, True), (False, True), (False, False)])
def test_gradients_are_those_of_finite_differences(own):
    """Of the gradients as well, which methods of loss balancing may differentiate."""
    weights, experts = tensors((2, 2, 3, 2, 3), own)
    assert gradcheck(combine, (weights, experts))
    assert gradgradcheck(combine, (weights, experts))


def test_one_gate_for_all_outputs_has_the_sum_of_their_gradients():
    """Weights that are an expanded view, as those of tied gates."""
    single, experts = tensors((1, 1, 3, 2, 4))
    combine(single.expand(2, -1, -1, -1), experts).sum().backward()
    expected = 2 * experts.detach().sum(2).permute(1, 0, 2).unsqueeze(0)
    torch.testing.assert_close(single.grad, expected)


@pytest.mark.parametrize("own", [(True, True), (False, False)])
@pytest.mark.parametrize("shared", [False, True])
def test_replicas_are_combined_separately(own, shared):
    """Under vmap, as by training/replicas.py; with `shared` all have the same weights."""
    weights, experts = tensors((2, 2, 3, 2, 4), own)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w = weights if shared else torch.stack([weights.detach() * f for f in factors])
    x = torch.stack([experts.detach() * f for f in factors])
    w, x = (each.detach().requires_grad_() for each in (w, x))
    mixture = torch.vmap(combine, in_dims=(None if shared else 0, 0))(w, x)
    expected = torch.stack([formula(w if shared else w[r], x[r]) for r in range(3)])
    torch.testing.assert_close(mixture, expected)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    for found, wanted in zip(
        torch.autograd.grad(mixture, (w, x), upstream),
        torch.autograd.grad(expected, (w, x), upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_mixed_precision_keeps_each_gradients_type():
    """Under autocast the softmax stays in float32 while experts are bfloat16."""
    weights = tensors((2, 1, 3, 2, 4), dtype=torch.float32)[0]
    experts = tensors((2, 1, 3, 2, 4), dtype=torch.bfloat16)[1]
    mixture = combine(weights, experts)
    assert mixture.dtype == torch.float32
    mixture.sum().backward()
    assert (weights.grad.dtype, experts.grad.dtype) == (torch.float32, torch.bfloat16)
