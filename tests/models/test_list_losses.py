"""Every list loss against a loop over the rows, and the laws that it must keep."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from mtl_ranker.models import list_losses as module
from mtl_ranker.models.list_losses import LIST_LOSSES, list_losses, needs_lists
from mtl_ranker.models.objectives import Task, losses

NAMES = list(LIST_LOSSES)
ROWS = 40


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def loop(name: str, z: list[float], y: list[float], lists: list[int]) -> float:
    """The loss of labelled rows, written as its formula, row by row."""
    rows = range(len(z))
    total = 0.0
    if name == "pairs":
        for i, j in product(rows, rows):
            if lists[i] == lists[j] and y[i] == 1 and y[j] == 0:
                total += math.log1p(math.exp(z[j] - z[i]))
        return total
    if name == "combined_pair":
        pairs = [(i, j) for i, j in product(rows, rows) if y[i] == 1 and y[j] == 0]
        return sum(math.log1p(math.exp(z[j] - z[i])) for i, j in pairs) / len(pairs)
    for i in rows:
        others = [j for j in rows if lists[j] == lists[i]]
        if name == "rcr" and y[i] == 1:
            total -= math.log(sigmoid(z[i]) / sum(sigmoid(z[j]) for j in others))
        if name == "jrc":
            sign = 0.5 if y[i] == 1 else -0.5
            total -= math.log(math.exp(sign * z[i]) / sum(math.exp(sign * z[j]) for j in others))
    return total / len(z)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels of three objectives, the last with missing ones, and lists of one to ten rows."""
    torch.manual_seed(seed)
    labels = torch.randint(0, 2, (ROWS, 3)).float()
    labels[::7, 2] = float("nan")
    return labels, torch.randint(0, 12, (ROWS,)) * 1_000_003


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("members", [None, 4])
def test_it_is_the_loop_over_rows(name: str, members: int | None) -> None:
    tasks = [
        Task("click", "binary", list_loss=name, list_weight=1.0),
        Task("watch", "regression"),
        Task("like", "binary", list_loss=name, list_weight=1.0),
    ]
    labels, lists = batch()
    shape = (ROWS, 3) if members is None else (members, ROWS, 3)
    logits = 2 * torch.randn(shape, dtype=torch.float64)
    expected = [0.0, 0.0, 0.0]
    for t in (0, 2):
        known = ~labels[:, t].isnan()
        each = [
            loop(name, z[known, t].tolist(), labels[known, t].tolist(), lists[known].tolist())
            for z in logits.reshape(-1, ROWS, 3)
        ]
        expected[t] = sum(each) / len(each) / (ROWS if name == "pairs" else 1)
    found = list_losses(logits, labels, lists, tasks)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_weight_two_is_two_rows(name: str) -> None:
    labels, lists = batch(1)
    tasks = [Task("click", "binary", list_loss=name)]
    labels, logits = labels[:, 2:], torch.randn(ROWS, 1)
    weight = torch.ones(ROWS)
    weight[:9] = 2.0
    twice = torch.cat([torch.arange(ROWS), torch.arange(9)])
    torch.testing.assert_close(
        list_losses(logits, labels, lists, tasks, weight),
        list_losses(logits[twice], labels[twice], lists[twice], tasks),
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    labels, lists = batch(2)
    tasks = [Task("click", "binary", list_loss=name)]
    logits, order = torch.randn(ROWS, 1), torch.randperm(ROWS)
    torch.testing.assert_close(
        list_losses(logits[order], labels[order, :1], lists[order], tasks),
        list_losses(logits, labels[:, :1], lists, tasks),
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_at_extreme_logits(name: str) -> None:
    labels, lists = batch(3)
    logits = torch.tensor([200.0, -200.0, 0.0, 1e4]).repeat(10).unsqueeze(1).requires_grad_()
    weight = (torch.arange(ROWS) % 3 > 0).float()
    weight[lists == lists[0]] = 0.0
    loss = list_losses(logits, labels[:, :1], lists, [Task("a", "binary", list_loss=name)], weight)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()


def expected_gradient(name: str | None, z: Tensor, chance: Tensor) -> Tensor:
    """The gradient by z of one list's expected loss, its labels independent with these chances."""
    z = z.clone().requires_grad_()
    task = [Task("a", "binary", list_loss=name)]
    total = torch.zeros((), dtype=z.dtype)
    for outcome in product((0.0, 1.0), repeat=len(z)):
        y = torch.tensor(outcome, dtype=z.dtype)
        probability = torch.where(y > 0, chance, 1 - chance).prod()
        rows = z.unsqueeze(1), y.unsqueeze(1)
        lists = torch.zeros(len(z), dtype=torch.long)
        loss = losses(*rows, task) if name is None else list_losses(*rows, lists, task)
        total = total + probability * loss[0]
    return torch.autograd.grad(total, z)[0]


def test_rcr_has_the_minimiser_of_the_cross_entropy_and_pairs_have_another() -> None:
    """At z = logit P(y = 1) the expected gradient is 0, of RCR's list term as of cross-entropy."""
    chance = torch.tensor([0.8, 0.3, 0.05, 0.5], dtype=torch.float64)
    best = torch.logit(chance)
    zero = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(expected_gradient(None, best, chance), zero)
    torch.testing.assert_close(expected_gradient("rcr", best, chance), zero)
    elsewhere = best + torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert expected_gradient("rcr", elsewhere, chance).abs().max() > 1e-3
    # Probabilities that are all half as high have the same ratios: RCR leaves levels to the rows.
    scaled = torch.logit(chance / 2)
    torch.testing.assert_close(expected_gradient("rcr", scaled, chance), zero)
    assert expected_gradient("pairs", best, chance).abs().max() < 1e-9
    assert expected_gradient("pairs", scaled, chance).abs().max() > 1e-3


def test_a_chain_is_compared_by_the_chains_odds() -> None:
    like = Task("like", "binary", conditional_on="click", list_loss="pairs")
    tasks = [Task("click", "binary", list_loss="pairs"), like]
    logits = torch.tensor([[2.0, 0.0], [-1.0, 1.0]])
    labels = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    odds = [math.log(q / (1 - q)) for q in (sigmoid(a) * sigmoid(b) for a, b in logits.tolist())]
    loss = list_losses(logits, labels, torch.zeros(2), tasks)
    expected = [math.log1p(math.exp(-3.0)) / 2, math.log1p(math.exp(odds[1] - odds[0])) / 2]
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_a_partner_have_no_loss(name: str) -> None:
    task = [Task("click", "binary", list_loss=name)]
    logits, one = torch.randn(5, 1), torch.zeros(5)
    mixed = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0]])
    if name != "combined_pair":
        for lists in (torch.arange(5), None):
            assert list_losses(logits, mixed, lists, task).abs().max() < 1e-6
    if name in ("pairs", "combined_pair"):
        assert list_losses(logits, torch.ones(5, 1), one, task).tolist() == [0.0]
    missing = torch.full((5, 1), float("nan"))
    assert list_losses(logits, missing, one, task).tolist() == [0.0]


def test_more_pairs_than_the_most_are_spaced_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every positive meets as many negatives, and every negative is met."""
    labels = (torch.arange(60) % 3 == 0).float().unsqueeze(1)  # 20 positives, 40 negatives
    logits = torch.randn(60, 1, requires_grad=True)
    task = [Task("click", "binary", list_loss="combined_pair")]
    whole = list_losses(logits, labels, None, task)
    monkeypatch.setattr(module, "MOST_PAIRS", 200)
    part = list_losses(logits, labels, None, task)
    assert part.item() != whole.item()
    assert part.item() == pytest.approx(whole.item(), rel=0.3)
    gradient = torch.autograd.grad(part.sum(), logits)[0]
    assert (gradient[labels == 0] > 0).all()
    assert (gradient[labels == 1] < 0).all()


def test_memory_is_linear_in_rows_of_short_lists() -> None:
    """A batch whose square would not fit: 200,000 rows in lists of four."""
    rows = 200_000
    labels = (torch.arange(rows) % 4 == 0).float().unsqueeze(1)
    lists = torch.arange(rows) // 4
    for name in ("pairs", "rcr", "jrc"):
        task = [Task("click", "binary", list_loss=name)]
        found = list_losses(torch.zeros(rows, 1), labels, lists, task).item()
        expected = {"pairs": 0.75 * math.log(2), "rcr": math.log(4) / 4, "jrc": math.log(4)}
        assert found == pytest.approx(expected[name], rel=1e-4)


def test_only_losses_within_lists_need_batches_of_whole_lists() -> None:
    plain = Task("click", "binary")
    assert not needs_lists([plain, replace(plain, list_loss="combined_pair")])
    assert all(needs_lists([plain, replace(plain, list_loss=n)]) for n in ("pairs", "rcr", "jrc"))


@pytest.mark.parametrize("name", NAMES)
def test_a_soft_label_is_a_positive_and_a_negative_with_its_weights(name: str) -> None:
    z = torch.tensor([[0.3], [-0.7], [1.1], [0.2]])
    labels = torch.tensor([[1.0], [0.25], [0.0], [float("nan")]])
    lists = torch.tensor([1, 1, 1, 1])
    hard = torch.tensor([[1.0], [1.0], [0.0], [0.0], [float("nan")]])
    twice, weight = z[[0, 1, 1, 2, 3]], torch.tensor([1.0, 0.25, 0.75, 1.0, 1.0])
    tasks = [Task("a", "binary", list_loss=name)]
    soft = list_losses(z, labels, lists, tasks)
    same = list_losses(twice, hard, torch.ones(5, dtype=torch.long), tasks, weight)
    torch.testing.assert_close(soft, same)
