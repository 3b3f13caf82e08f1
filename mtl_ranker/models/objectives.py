"""Kinds of objective: the loss of a logit, and the prediction from it.

A missing label is NaN and has weight 0. Logits may have leading dimensions before B and T (the
members of an ensemble), over which losses and predictions are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Task:
    """The settings of an objective that its loss and predictions depend on.

    Attributes:
        kind: binary, regression, watch_time or ordinal.
        weight: of its loss.
        transform: of a regression's label, identity or log1p.
        conditional_on: the binary objective without which this binary one cannot happen (ESMM).
        levels: of an ordinal label, which is 0, 1, …, levels - 1.
        list_loss: of a binary one, a name of `list_losses.LIST_LOSSES`, or None.
        list_weight: of the list loss beside the loss of the rows.
    """

    name: str
    kind: str
    weight: float = 1.0
    transform: str = "identity"
    conditional_on: str | None = None
    levels: int = 0
    list_loss: str | None = None
    list_weight: float = 0.0


def transform_labels(labels: Tensor, tasks: Sequence[Task]) -> Tensor:
    """Labels [B, T] on the scale of the loss (`Task.transform`); NaN stays NaN."""
    columns = [
        torch.log1p(labels[:, t]) if task.transform == "log1p" else labels[:, t]
        for t, task in enumerate(tasks)
    ]
    return torch.stack(columns, 1)


def cutpoints_needed(tasks: Sequence[Task]) -> int:
    """Cut points that the model must learn: the highest number of levels minus 1, or 0."""
    return max([task.levels - 1 for task in tasks if task.kind == "ordinal"], default=0)


def predictions(logits: Tensor, tasks: Sequence[Task], cutpoints: Tensor | None = None) -> Tensor:
    """Predictions [B, T] from logits [..., B, T], the mean over leading dimensions.

    Binary: a probability; with `conditional_on`, the product of the chain's probabilities. Watch
    time and regression: in the label's unit. Ordinal: the expected level.

    Args:
        cutpoints: see `losses`.
    """
    chained = any(task.conditional_on for task in tasks)
    if not chained and all(task.kind == "binary" for task in tasks):
        value = torch.sigmoid(logits)
        return value.flatten(0, -3).mean(0) if value.dim() > 2 else value
    chain = chain_log_probability(logits, tasks)[0] if chained else logits
    columns = []
    for t, task in enumerate(tasks):
        z = logits[..., t]
        if task.kind == "binary":
            value = torch.exp(chain[..., t]) if task.conditional_on else torch.sigmoid(z)
        elif task.kind == "watch_time":
            value = torch.exp(z.clamp(max=30.0))
        elif task.kind == "ordinal":
            assert cutpoints is not None
            above = z.unsqueeze(-1) - cutpoints[t, : task.levels - 1]
            value = torch.sigmoid(above).sum(-1)
        elif task.transform == "log1p":
            value = torch.expm1(z.clamp(max=30.0)).clamp(min=0.0)
        else:
            value = z
        columns.append(value.flatten(0, -2).mean(0) if value.dim() > 1 else value)
    return torch.stack(columns, -1)


def losses(
    logits: Tensor,
    labels: Tensor,
    tasks: Sequence[Task],
    sample_weight: Tensor | None = None,
    cutpoints: Tensor | None = None,
) -> Tensor:
    """Mean loss of each objective over the rows where its label is present: [T].

    Binary: cross-entropy of the logit; with `conditional_on`, of the product of the chain's
    probabilities over all impressions (ESMM, Ma et al., SIGIR 2018, eq. 3). Regression: squared
    error on the transformed scale. Watch time y: logistic regression with weight y (Covington et
    al., RecSys 2016, 4.2), where every impression is also a negative of weight 1, so that the odds
    are E[y] exactly, not only where positives are rare; the mean is over weights 1 + y. Ordinal:
    cross-entropy of P(y > c) = σ(z − θ_c), summed over cut points (McCullagh 1980).

    Args:
        logits: [..., B, T].
        labels: [B, T], transformed; NaN = missing.
        sample_weight: [B], or None for 1.
        cutpoints: [T, levels - 1], ascending, for ordinal objectives.
    """
    present = ~torch.isnan(labels)
    target = torch.where(present, labels, torch.zeros_like(labels))
    weight = label_weights(labels, tasks, sample_weight)
    kinds = {task.kind for task in tasks}
    loss = functional.binary_cross_entropy_with_logits(
        logits, target.clamp(0.0, 1.0).expand_as(logits), reduction="none"
    )  # [..., B, T]
    if any(task.conditional_on for task in tasks):
        log_p, log_not = chain_log_probability(logits, tasks)
        conditional = [task.conditional_on is not None for task in tasks]
        chained = torch.tensor(conditional, device=logits.device)
        loss = torch.where(chained, -(target * log_p + (1 - target) * log_not), loss)
    if kinds != {"binary"}:
        columns = list(loss.unbind(-1))
        for t, task in enumerate(tasks):
            z, y = logits[..., t], target[:, t]
            if task.kind == "regression":
                columns[t] = (z - y) ** 2
            elif task.kind == "watch_time":
                columns[t] = (y * functional.softplus(-z) + functional.softplus(z)) / (1 + y)
            elif task.kind == "ordinal":
                assert cutpoints is not None
                cuts = cutpoints[t, : task.levels - 1]
                levels = torch.arange(task.levels - 1, device=y.device)
                above = (y.unsqueeze(-1) > levels).to(z.dtype)
                score = z.unsqueeze(-1) - cuts
                columns[t] = functional.binary_cross_entropy_with_logits(
                    score, above.expand_as(score), reduction="none"
                ).sum(-1)
        loss = torch.stack(columns, -1)
    members = loss.numel() // max(labels.numel(), 1)
    summed = (loss * weight).flatten(0, -2).sum(0)
    return summed / (weight.sum(0) * max(members, 1)).clamp(min=1e-12)


def ensemble_losses(
    logits: Tensor, labels: Tensor, tasks: Sequence[Task], cutpoints: Tensor | None = None
) -> Tensor:
    """Losses [T] of the prediction that is served: the mean over the leading dimensions.

    `losses` averages the losses of the members instead, which is never less where the loss is
    convex in the prediction. With one member both are the same.

    Args:
        logits: [..., B, T].
        labels: [B, T], transformed; NaN = missing.
        cutpoints: see `losses`.
    """
    if logits.numel() == labels.numel():
        return losses(logits, labels, tasks, None, cutpoints)
    members = logits.flatten(0, -3)  # [K, B, T]
    probability = torch.exp(chain_log_probability(members, tasks)[0]).mean(0)
    index = {task.name: t for t, task in enumerate(tasks)}
    columns = []
    for t, task in enumerate(tasks):
        z = members[..., t]
        if task.kind == "binary":
            # Of the condition's probability only its own part: losses() multiplies the chain.
            parent = task.conditional_on
            given = 1.0 if parent is None else probability[:, index[parent]]
            columns.append(torch.logit(probability[:, t] / given, eps=1e-7))
        elif task.kind == "watch_time":
            columns.append(torch.logsumexp(z, 0) - math.log(len(z)))
        elif task.transform == "log1p":
            columns.append(torch.log1p(torch.expm1(z.clamp(max=30.0)).clamp(min=0.0).mean(0)))
        else:
            columns.append(z.mean(0))
    result = losses(torch.stack(columns, 1), labels, tasks, None, cutpoints)
    for t, task in enumerate(tasks):
        if task.kind == "ordinal":
            assert cutpoints is not None
            present = ~torch.isnan(labels[:, t])
            z, y = members[:, present, t], labels[present, t]
            above = torch.sigmoid(z.unsqueeze(-1) - cutpoints[t, : task.levels - 1]).mean(0)
            levels = torch.arange(task.levels - 1, device=y.device)
            label = (y.unsqueeze(-1) > levels).to(above.dtype)
            entropy = functional.binary_cross_entropy(above, label, reduction="sum")
            result[t] = entropy / max(len(y), 1)
    return result


def label_weights(
    labels: Tensor, tasks: Sequence[Task], sample_weight: Tensor | None = None
) -> Tensor:
    """Weight of each label in its objective's mean loss: [B, T], 0 = missing.

    Args:
        labels: [B, T], transformed.
        sample_weight: [B], or None for 1.
    """
    weight = (~torch.isnan(labels)).to(labels.dtype)
    if sample_weight is not None:
        weight = weight * sample_weight.unsqueeze(1)
    watch_times = [t for t, task in enumerate(tasks) if task.kind == "watch_time"]
    if watch_times:
        columns = list(weight.unbind(1))
        for t in watch_times:
            columns[t] = columns[t] * (1 + torch.nan_to_num(labels[:, t]))
        weight = torch.stack(columns, 1)
    return weight


def chain_log_probability(logits: Tensor, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) of each objective's chain: [..., T].

    p_t = σ(z_t) · p_c, where c is the objective that t is conditional on, if any.
    """
    index = {task.name: t for t, task in enumerate(tasks)}
    log_sigmoid = functional.logsigmoid(logits)
    columns: list[Tensor] = []
    for t, task in enumerate(tasks):
        total, parent = log_sigmoid[..., t], task.conditional_on
        while parent is not None:
            total = total + log_sigmoid[..., index[parent]]
            parent = tasks[index[parent]].conditional_on
        columns.append(total)
    log_p = torch.stack(columns, -1).clamp(max=-1e-7)
    return log_p, torch.log(-torch.expm1(log_p))


def base_logits(labels: Tensor, tasks: Sequence[Task], weight: Tensor | None = None) -> Tensor:
    """The constant logits [T] that predict the labels' means.

    Args:
        labels: [N, T], transformed; NaN = missing.
        weight: [N], or None for 1.
    """
    present = ~torch.isnan(labels)
    mass = present.to(labels.dtype) * (1.0 if weight is None else weight.unsqueeze(1))
    means = (torch.nan_to_num(labels) * mass).sum(0) / mass.sum(0).clamp(min=1e-12)
    index = {task.name: t for t, task in enumerate(tasks)}
    values = []
    for t, task in enumerate(tasks):
        mean = means[t]
        if task.kind == "binary":
            if task.conditional_on is not None:
                mean = mean / means[index[task.conditional_on]].clamp(min=1e-6)
            values.append(torch.logit(mean.clamp(1e-6, 1 - 1e-6)))
        elif task.kind == "watch_time":
            values.append(torch.log(mean.clamp(min=1e-6)))
        elif task.kind == "ordinal":
            values.append(labels.new_zeros(()))
        else:
            values.append(mean)
    return torch.stack(values)


def base_cutpoints(
    labels: Tensor, tasks: Sequence[Task], weight: Tensor | None = None
) -> Tensor | None:
    """Cut points [T, levels - 1] at which a logit of 0 predicts the labels' shares, or None.

    Args:
        labels: [N, T]; NaN = missing.
        weight: [N], or None for 1.
    """
    needed = cutpoints_needed(tasks)
    if not needed:
        return None
    cuts = (
        torch.arange(needed, dtype=labels.dtype, device=labels.device)
        .expand(len(tasks), -1)
        .clone()
    )
    for t, task in enumerate(tasks):
        if task.kind == "ordinal":
            rows = ~torch.isnan(labels[:, t])
            present = labels[rows, t]
            mass = torch.ones_like(present) if weight is None else weight[rows]
            mass = mass.double() / mass.double().sum().clamp(min=1e-12)
            share = torch.stack([((present > c) * mass).sum() for c in range(task.levels - 1)])
            at_shares = -torch.logit(share.clamp(1e-4, 1 - 1e-4)).to(labels.dtype)
            # Steps must be positive; those of empty levels would be 0.
            steps = at_shares.diff().clamp(min=1e-3)
            cuts[t, : task.levels - 1] = torch.cat([at_shares[:1], steps]).cumsum(0)
    return cuts
