"""Loss balancing: methods that combine the objectives' losses into one gradient.

A balancer is constructed from the model, the objectives' weights [T], and their base losses [T],
the losses of predicting the training means. T objectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mtl_ranker.models.ranker import Ranker


class Balancer(Protocol):
    """A method of loss balancing.

    Attributes:
        parameters: learned by the method itself, for the optimiser.
    """

    parameters: list[Tensor]

    def state(self) -> dict[str, Tensor]:
        """The method's tensors, for a checkpoint."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()`."""

    def backward(self, losses: Tensor, penalty: Tensor) -> None:
        """Add gradients of the losses [T] and of a scalar penalty to the parameters' `grad`."""

    def end_epoch(self, losses: Tensor) -> None:
        """Called with the epoch's mean losses [T]."""


class Fixed:
    """The project file's weights, unchanged: Σ_t w_t L_t."""

    def __init__(self, model: Ranker, weights: Tensor, base: Tensor) -> None:
        self.parameters: list[Tensor] = []
        self.weights = weights

    def state(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in vars(self).items() if isinstance(v, Tensor)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, value in state.items():
            current = getattr(self, name)
            if isinstance(current, Tensor) and current.requires_grad:
                current.data.copy_(value)  # in place, since the optimiser refers to this tensor
            else:
                setattr(self, name, value.to(self.weights.device))

    def backward(self, losses: Tensor, penalty: Tensor) -> None:
        ((losses * self.weights).sum() + penalty).backward()

    def end_epoch(self, losses: Tensor) -> None:
        pass


class Normalised(Fixed):
    """Σ_t w_t L_t / L⁰_t, where L⁰_t is the loss of predicting the training mean.

    These are the normalised entropies (He et al., ADKDD 2014) that early stopping monitors. A
    cross-entropy is small where positives are rare: unnormalised, an objective with one positive in
    350 rows has a fiftieth of a click's influence on the shared parameters.
    """

    def __init__(self, model: Ranker, weights: Tensor, base: Tensor) -> None:
        super().__init__(model, weights / base, base)


class Uncertainty(Fixed):
    """Σ_t w_t (e^{-s_t} L_t + s_t / 2) with learned s_t = log σ_t².

    Kendall et al., CVPR 2018, eq. 10, for classification.
    """

    def __init__(self, model: Ranker, weights: Tensor, base: Tensor) -> None:
        super().__init__(model, weights, base)
        self.log_variance = torch.zeros_like(weights, requires_grad=True)
        self.parameters = [self.log_variance]

    def backward(self, losses: Tensor, penalty: Tensor) -> None:
        scaled = torch.exp(-self.log_variance) * losses + self.log_variance / 2
        ((scaled * self.weights).sum() + penalty).backward()


class DynamicWeightAverage(Fixed):
    """λ_t = T · softmax_t(r_t / 2), with r_t = L_t(e-1) / L_t(e-2) over epochs e.

    Losses that decrease slowly get more weight (Liu et al., CVPR 2019, eq. 7).
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
    """Weights with which the gradient norms on a shared layer reflect relative training rates.

    G_t → mean(G) · r_t^α with α = 1.5 (Chen et al., ICML 2018, eq. 2): objectives that train slowly
    get greater norms. As G_t = w_t ‖∇L_t‖, the gradient of |G_t − target| by w_t is sign · ‖∇L_t‖,
    so no second derivatives are needed. L_t(0) is the loss of the first batch with labels of
    objective t. A batch without them, whose loss is 0, leaves w_t as it is, up to the constant sum.
    """

    alpha = 1.5
    rate = 0.025

    def __init__(self, model: Ranker, weights: Tensor, base: Tensor) -> None:
        super().__init__(model, weights.clone(), base)
        self.total = float(weights.sum())
        self.model = model
        self.initial = torch.full_like(self.weights, math.nan)

    @property
    def shared(self) -> list[Tensor]:
        """Parameters of the last shared layer; those of the embedding without a mixture layer."""
        if not len(self.model.layers):
            return list(self.model.shared_parameters())
        return [p for p in self.model.layers[-1].parameters() if p.requires_grad]

    def backward(self, losses: Tensor, penalty: Tensor) -> None:
        norms = gradients(losses, self.shared, retain=True).norm(dim=1)
        current = losses.detach()
        labelled = current > 0
        self.initial = torch.where(self.initial.isnan() & labelled, current, self.initial)
        weights = self.weights.clone()
        inverse_rate = torch.where(labelled, current / self.initial, torch.zeros_like(current))
        inverse_rate = inverse_rate / _mean(inverse_rate, labelled).clamp(min=1e-12)
        weighted = weights * norms
        target = _mean(weighted, labelled) * inverse_rate**self.alpha
        scale = _mean(norms, labelled).clamp(min=1e-12)
        step = self.rate * torch.sign(weighted - target) * norms / scale
        updated = (weights - step).clamp(min=1e-3)
        self.weights = updated * (self.total / updated.sum())
        ((losses * weights).sum() + penalty).backward()


class ProjectedGradients(Fixed):
    """PCGrad: projects each gradient onto the normal plane of those it conflicts with.

    Others are taken in random order (Yu et al., NeurIPS 2020, algorithm 1). Applied to the shared
    parameters only.
    """

    def __init__(self, model: Ranker, weights: Tensor, base: Tensor) -> None:
        super().__init__(model, weights, base)
        self.shared = model.shared_parameters()
        shared = {id(p) for p in self.shared}
        self.unshared = [p for p in model.parameters() if p.requires_grad and id(p) not in shared]

    def backward(self, losses: Tensor, penalty: Tensor) -> None:
        weighted = losses * self.weights
        by_objective = gradients(weighted, self.shared, retain=True)  # [T, P]
        total = project_conflicts(by_objective).sum(0)
        of_unshared = torch.autograd.grad(
            weighted.sum(), self.unshared, retain_graph=True, allow_unused=True
        )
        for parameter, gradient in zip(self.unshared, of_unshared, strict=True):
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
    """Gradients of T losses, with the P numbers of all parameters concatenated: [T, P].

    Args:
        parameters: may be empty, as where a linear model's only shared ones are a sparse table.
        retain: keep the graph for another backward pass.
    """
    if not parameters:
        return losses.new_zeros(len(losses), 0)
    rows = []
    last = len(losses) - 1
    for t, loss in enumerate(losses):
        by_parameter = torch.autograd.grad(
            loss, parameters, retain_graph=retain or t < last, allow_unused=True
        )
        flat = [_flat(g, p) for g, p in zip(by_parameter, parameters, strict=True)]
        rows.append(torch.cat(flat))
    return torch.stack(rows)


def project_conflicts(gradient: Tensor) -> Tensor:
    """PCGrad's projection of gradients [T, P], the others in random order for each objective."""
    projected = gradient.clone()
    count = len(gradient)
    for t in range(count):
        for other in torch.randperm(count).tolist():
            product = projected[t] @ gradient[other]
            if other != t and product < 0:
                square = gradient[other].square().sum().clamp(min=1e-12)
                projected[t] -= product / square * gradient[other]
    return projected


def gradient_cosine(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Cosine between the objectives' gradients on shared parameters: [T, T].

    Ones on the diagonal, or zeros for an objective without a gradient.

    Below zero, a step along one gradient increases the other's loss (Yu et al., NeurIPS 2020).
    """
    gradient = gradients(losses, parameters, retain=False)
    unit = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit @ unit.t()


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen values; 0 without any."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return parameter.new_zeros(parameter.numel()) if gradient is None else gradient.flatten()
