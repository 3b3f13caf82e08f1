"""How the objectives' losses become one gradient. Each class is one published method.

A method is made from the model, the objectives' weights [T], and their base losses [T]: those of
always predicting the training means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mtl_ranker.models.ranker import Ranker


class Balancer(Protocol):
    """Turns losses [T] and a penalty into gradients on the model's parameters."""

    parameters: list[Tensor]  # of the method itself, for the optimiser

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...

    def backward(self, losses: Tensor, penalty: Tensor) -> None: ...

    def end_epoch(self, losses: Tensor) -> None: ...


class Fixed:
    """The project file's weights, unchanged: Σ_t w_t L_t."""

    def __init__(self, model: Ranker, weights: Tensor, base: Tensor) -> None:
        self.parameters: list[Tensor] = []
        self.weights = weights

    def state(self) -> dict[str, Tensor]:
        """What it has learned so far, for a checkpoint."""
        return {k: v.detach().clone() for k, v in vars(self).items() if isinstance(v, Tensor)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, value in state.items():
            now = getattr(self, name)
            if isinstance(now, Tensor) and now.requires_grad:
                now.data.copy_(value)  # the optimiser holds this very tensor
            else:
                setattr(self, name, value)

    def backward(self, losses: Tensor, penalty: Tensor) -> None:
        ((losses * self.weights).sum() + penalty).backward()

    def end_epoch(self, losses: Tensor) -> None:
        pass


class Normalised(Fixed):
    """Σ_t w_t L_t / L⁰_t, where L⁰_t is the loss of always predicting the training mean: the
    normalised entropies (He et al., ADKDD 2014) by which trainings are stopped and compared.

    A cross-entropy is small where positives are rare: unnormalised, an objective with one positive
    in 350 has a fiftieth of a click's say in what is shared.
    """

    def __init__(self, model: Ranker, weights: Tensor, base: Tensor) -> None:
        super().__init__(model, weights / base, base)


class Uncertainty(Fixed):
    """Σ_t w_t (e^{-s_t} L_t + s_t / 2) with learned s_t = log σ_t² (Kendall et al., CVPR 2018,
    eq. 10, for classification).
    """

    def __init__(self, model: Ranker, weights: Tensor, base: Tensor) -> None:
        super().__init__(model, weights, base)
        self.log_variance = torch.zeros(len(weights), requires_grad=True)
        self.parameters = [self.log_variance]

    def backward(self, losses: Tensor, penalty: Tensor) -> None:
        each = torch.exp(-self.log_variance) * losses + self.log_variance / 2
        ((each * self.weights).sum() + penalty).backward()


class DynamicWeightAverage(Fixed):
    """λ_t = T · softmax_t(r_t / 2), r_t = L_t(e-1) / L_t(e-2) over epochs (Liu et al., CVPR 2019,
    eq. 7): what falls slowly weighs more.
    """

    def __init__(self, model: Ranker, weights: Tensor, base: Tensor) -> None:
        super().__init__(model, weights, base)
        self.given = weights
        self.previous: Tensor | None = None

    def end_epoch(self, losses: Tensor) -> None:
        if self.previous is not None:
            rate = losses / self.previous.clamp(min=1e-12)
            self.weights = self.given * len(rate) * torch.softmax(rate / 2.0, 0)
        self.previous = losses


class GradNorm(Fixed):
    """Weights that keep the objectives' gradient norms on a shared layer in proportion to how
    slowly they train (Chen et al., ICML 2018, eq. 2): G_t → mean(G) · r_t^α, α = 1.5.

    As G_t = w_t ‖∇L_t‖, the gradient of |G_t − target| by w_t is sign · ‖∇L_t‖: no second
    derivatives are needed.
    """

    alpha = 1.5
    rate = 0.025

    def __init__(self, model: Ranker, weights: Tensor, base: Tensor) -> None:
        super().__init__(model, weights.clone(), base)
        self.total = float(weights.sum())
        self.shared = [p for p in model.layers[-1].parameters() if p.requires_grad]
        self.initial: Tensor | None = None

    def backward(self, losses: Tensor, penalty: Tensor) -> None:
        norms = gradients(losses, self.shared, retain=True).norm(dim=1)
        if self.initial is None:
            self.initial = losses.detach().clamp(min=1e-12)
        used = self.weights.clone()
        pace = losses.detach() / self.initial
        pace = pace / pace.mean().clamp(min=1e-12)
        now = used * norms
        target = now.mean() * pace**self.alpha
        scale = norms.mean().clamp(min=1e-12)
        moved = (used - self.rate * torch.sign(now - target) * norms / scale).clamp(min=1e-3)
        self.weights = moved * (self.total / moved.sum())
        ((losses * used).sum() + penalty).backward()


class ProjectedGradients(Fixed):
    """PCGrad: where two objectives' gradients point against each other, each loses its part along
    the other's, in random order (Yu et al., NeurIPS 2020, algorithm 1).
    """

    def __init__(self, model: Ranker, weights: Tensor, base: Tensor) -> None:
        super().__init__(model, weights, base)
        self.shared = model.shared_parameters()
        shared = {id(p) for p in self.shared}
        self.own = [p for p in model.parameters() if p.requires_grad and id(p) not in shared]

    def backward(self, losses: Tensor, penalty: Tensor) -> None:
        weighted = losses * self.weights
        each = gradients(weighted, self.shared, retain=True)  # [T, P]
        total = project_conflicts(each).sum(0)
        own = torch.autograd.grad(weighted.sum(), self.own, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(self.own, own, strict=True):
            parameter.grad = gradient
        if penalty.requires_grad:
            total = total + gradients(penalty.unsqueeze(0), self.shared, retain=False)[0]
        start = 0
        for parameter in self.shared:
            count = parameter.numel()
            parameter.grad = total[start : start + count].view_as(parameter).clone()
            start += count


BALANCERS: dict[str, type[Fixed]] = {
    "fixed": Fixed,
    "normalised": Normalised,
    "uncertainty": Uncertainty,
    "dwa": DynamicWeightAverage,
    "gradnorm": GradNorm,
    "pcgrad": ProjectedGradients,
}


def gradients(losses: Tensor, parameters: Sequence[Tensor], retain: bool) -> Tensor:
    """The gradient of each of T losses on P shared numbers: [T, P]."""
    rows = []
    last = len(losses) - 1
    for t, loss in enumerate(losses):
        found = torch.autograd.grad(
            loss, parameters, retain_graph=retain or t < last, allow_unused=True
        )
        rows.append(torch.cat([_flat(g, p) for g, p in zip(found, parameters, strict=True)]))
    return torch.stack(rows)


def project_conflicts(each: Tensor) -> Tensor:
    """PCGrad's projection of gradients [T, P], in a random order per objective."""
    projected = each.clone()
    count = len(each)
    for t in range(count):
        for other in torch.randperm(count).tolist():
            along = projected[t] @ each[other]
            if other != t and along < 0:
                projected[t] -= along / each[other].square().sum().clamp(min=1e-12) * each[other]
    return projected


def gradient_cosine(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Cosine between the objectives' gradients on shared parameters: [T, T], ones on the diagonal.

    Below zero, a step that helps one objective hurts the other (Yu et al., NeurIPS 2020).
    """
    each = gradients(losses, parameters, retain=False)
    unit = each / each.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit @ unit.t()


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros(parameter.numel()) if gradient is None else gradient.flatten()
