"""Kinds of objective: how a logit becomes a prediction, and what its loss is.

Losses are plain functions of tensors. A missing label is NaN and weighs nothing. Logits may have
leading dimensions before B and T (the members of an ensemble); losses are their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Task:
    """What the model needs to know of an objective.

    Attributes:
        kind: binary, regression, watch_time or ordinal.
        transform: of a regression's label, identity or log1p.
        conditional_on: the binary objective without which this binary one cannot happen.
        levels: of an ordinal label, which is 0, 1, …, levels - 1.
    """

    name: str
    kind: str
    weight: float = 1.0
    transform: str = "identity"
    conditional_on: str | None = None
    levels: int = 0


def transform_labels(labels: Tensor, tasks: Sequence[Task]) -> Tensor:
    """Labels [B, T] on the scale the model learns (log1p where asked); NaN stays NaN."""
    columns = [
        torch.log1p(labels[:, t]) if task.transform == "log1p" else labels[:, t]
        for t, task in enumerate(tasks)
    ]
    return torch.stack(columns, 1)


def cutpoints_needed(tasks: Sequence[Task]) -> int:
    """Cut points that the model must learn: the highest number of levels minus 1, or 0."""
    return max([task.levels - 1 for task in tasks if task.kind == "ordinal"], default=0)


def predictions(logits: Tensor, tasks: Sequence[Task], cutpoints: Tensor | None = None) -> Tensor:
    """Logits [..., B, T] to predictions [B, T], the mean over leading dimensions.

    Binary: a probability, of a chained objective that of the whole chain. Watch time and
    regression: in the label's own unit. Ordinal: the expected level.
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

    Binary: cross-entropy on the logit; with `conditional_on`, on the product of the chain's
    probabilities over all impressions (ESMM, Ma et al., SIGIR 2018, eq. 3). Regression: squared
    error on the transformed scale. Watch time y: logistic regression weighted by y (Covington et
    al., RecSys 2016, 4.2), where every impression is also a negative of weight 1, so that the
    learned odds are E[y] exactly and not only for rare positives; the mean is over weights 1 + y.
    Ordinal: cross-entropy of P(y > c) = σ(z − θ_c), summed over cut points (McCullagh 1980).

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
    each = functional.binary_cross_entropy_with_logits(
        logits, target.clamp(0.0, 1.0).expand_as(logits), reduction="none"
    )
    if any(task.conditional_on for task in tasks):
        log_p, log_not = chain_log_probability(logits, tasks)
        chained = torch.tensor([task.conditional_on is not None for task in tasks])
        each = torch.where(chained, -(target * log_p + (1 - target) * log_not), each)
    if kinds != {"binary"}:
        columns = list(each.unbind(-1))
        for t, task in enumerate(tasks):
            z, y = logits[..., t], target[:, t]
            if task.kind == "regression":
                columns[t] = (z - y) ** 2
            elif task.kind == "watch_time":
                columns[t] = (y * functional.softplus(-z) + functional.softplus(z)) / (1 + y)
            elif task.kind == "ordinal":
                assert cutpoints is not None
                cuts = cutpoints[t, : task.levels - 1]
                above = (y.unsqueeze(-1) > torch.arange(task.levels - 1)).to(z.dtype)
                score = z.unsqueeze(-1) - cuts
                columns[t] = functional.binary_cross_entropy_with_logits(
                    score, above.expand_as(score), reduction="none"
                ).sum(-1)
        each = torch.stack(columns, -1)
    members = each.numel() // max(labels.numel(), 1)
    summed = (each * weight).flatten(0, -2).sum(0)
    return summed / (weight.sum(0) * max(members, 1)).clamp(min=1e-12)


def pairwise_losses(logits: Tensor, labels: Tensor, user: Tensor, tasks: Sequence[Task]) -> Tensor:
    """How badly each objective orders a user's own impressions: [T].

    Σ log(1 + exp(z_j − z_i)) over pairs of one user's rows of which i is positive and j is not
    (RankNet, Burges et al., ICML 2005, eq. 3), over the number of rows; the mean over leading
    dimensions. Objectives that are not binary have 0; of a chain, z is the chain's log-odds.

    Args:
        logits: [..., B, T].
        labels: [B, T], NaN = missing: in no pair.
        user: [B].
    """
    if any(task.conditional_on for task in tasks):
        log_p, log_not = chain_log_probability(logits, tasks)
        logits = log_p - log_not
    same = user.unsqueeze(1) == user.unsqueeze(0)
    found = []
    for t, task in enumerate(tasks):
        y, z = labels[:, t], logits[..., t]
        better, worse = (same & (y.unsqueeze(1) > y.unsqueeze(0))).nonzero(as_tuple=True)
        if task.kind == "binary" and len(better):
            each = functional.softplus(z[..., worse] - z[..., better]).sum(-1)
            found.append(each.mean() / len(y))
        else:
            found.append(z.new_zeros(()))
    return torch.stack(found)


def label_weights(
    labels: Tensor, tasks: Sequence[Task], sample_weight: Tensor | None = None
) -> Tensor:
    """How much each label counts in the mean that is its objective's loss: [B, T], 0 = missing."""
    weight = (~torch.isnan(labels)).to(labels.dtype)
    if sample_weight is not None:
        weight = weight * sample_weight.unsqueeze(1)
    watched = [t for t, task in enumerate(tasks) if task.kind == "watch_time"]
    if watched:
        columns = list(weight.unbind(1))
        for t in watched:
            columns[t] = columns[t] * (1 + torch.nan_to_num(labels[:, t]))
        weight = torch.stack(columns, 1)
    return weight


def chain_log_probability(logits: Tensor, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) of each objective's chain, p_t = σ(z_t) · p_after(t): [..., T]."""
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
    """The constant logits [T] that predict the training means; labels [N, T] are transformed."""
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
            values.append(torch.zeros(()))
        else:
            values.append(mean)
    return torch.stack(values)


def base_cutpoints(labels: Tensor, tasks: Sequence[Task]) -> Tensor | None:
    """Cut points [T, levels - 1] at which a logit of 0 gives the training shares, or None."""
    needed = cutpoints_needed(tasks)
    if not needed:
        return None
    cuts = torch.arange(needed, dtype=labels.dtype).expand(len(tasks), -1).clone()
    for t, task in enumerate(tasks):
        if task.kind == "ordinal":
            known = labels[~torch.isnan(labels[:, t]), t]
            share = torch.stack([(known > c).double().mean() for c in range(task.levels - 1)])
            found = -torch.logit(share.clamp(1e-4, 1 - 1e-4)).to(labels.dtype)
            # Empty levels would give equal cut points, which no positive step can make.
            steps = found.diff().clamp(min=1e-3)
            cuts[t, : task.levels - 1] = torch.cat([found[:1], steps]).cumsum(0)
    return cuts
