"""Kinds of objective: how a logit becomes a prediction, and what its loss is.

Losses are plain functions of tensors. A missing label is NaN and weighs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Task:
    """What the model needs to know of an objective."""

    name: str
    kind: str  # "binary" or "regression"
    weight: float = 1.0
    transform: str = "identity"  # of a regression's label: "identity" or "log1p"


def transform_labels(labels: Tensor, tasks: Sequence[Task]) -> Tensor:
    """Labels [B, T] on the scale the model learns (log1p where asked); NaN stays NaN."""
    columns = [
        torch.log1p(labels[:, t]) if task.transform == "log1p" else labels[:, t]
        for t, task in enumerate(tasks)
    ]
    return torch.stack(columns, 1)


def predictions(logits: Tensor, tasks: Sequence[Task]) -> Tensor:
    """Logits [B, T] to predictions [B, T]: probabilities, or values in the label's own unit."""
    columns = []
    for t, task in enumerate(tasks):
        if task.kind == "binary":
            columns.append(torch.sigmoid(logits[:, t]))
        elif task.transform == "log1p":
            columns.append(torch.expm1(logits[:, t].clamp(max=30.0)).clamp(min=0.0))
        else:
            columns.append(logits[:, t])
    return torch.stack(columns, 1)


def losses(
    logits: Tensor, labels: Tensor, tasks: Sequence[Task], sample_weight: Tensor | None = None
) -> Tensor:
    """Mean loss of each objective over the rows where its label is present: [T].

    Binary: cross-entropy on the logit. Regression: squared error on the transformed scale.

    Args:
        logits: [B, T].
        labels: [B, T], transformed; NaN = missing.
        sample_weight: [B], or None for 1.
    """
    present = ~torch.isnan(labels)
    target = torch.where(present, labels, torch.zeros_like(labels))
    binary = torch.tensor([task.kind == "binary" for task in tasks])
    entropy = functional.binary_cross_entropy_with_logits(
        logits, target.clamp(0.0, 1.0), reduction="none"
    )
    each = entropy if bool(binary.all()) else torch.where(binary, entropy, (logits - target) ** 2)
    weight = present.to(logits.dtype)
    if sample_weight is not None:
        weight = weight * sample_weight.unsqueeze(1)
    return (each * weight).sum(0) / weight.sum(0).clamp(min=1e-12)
