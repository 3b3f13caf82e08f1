"""Build a ranker from a specification and an encoder, initialise it, and predict with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtl_ranker.config import Objective, Project, Training
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.models.embedding import ContentProjection, FeatureEmbedding, PiecewiseLinear
from mtl_ranker.models.matmul import in_blocks
from mtl_ranker.models.objectives import (
    Task,
    base_cutpoints,
    base_logits,
    cutpoints_needed,
    predictions,
)
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.models.spec import RankerSpec
from mtl_ranker.training.batches import Examples, part_of


def tasks_of(project: Project) -> list[Task]:
    return [
        Task(
            o.name,
            o.kind,
            o.weight,
            o.transform,
            o.conditional_on,
            o.level_count,
            *list_loss_of(o, project.training),
        )
        for o in project.objectives
    ]


def list_loss_of(objective: Objective, training: Training) -> tuple[str | None, float]:
    """An objective's list loss and its weight: its own, or pairs with `training.pairwise`."""
    if objective.list_loss == "none" or objective.kind != "binary":
        return None, 0.0
    if objective.list_loss is not None:
        return objective.list_loss, objective.list_weight
    return ("pairs", training.pairwise) if training.pairwise > 0 else (None, 0.0)


def build_ranker(
    spec: RankerSpec,
    encoder: Encoder,
    tasks: Sequence[Task],
    positions: int = 0,
    position_dropout: float = 0.1,
) -> Ranker:
    """A ranker with random weights for this encoder's fields.

    Raises ValueError when a group of features matches none of them.

    Args:
        positions, position_dropout: see Ranker.
    """
    numerics = PiecewiseLinear(
        encoder.edges, encoder.missing, encoder.numeric_encoding == "standardise"
    )
    width = spec.embedding_dim * (spec.objectives if spec.unshared else 1)
    fields = [v.column for v in (*encoder.categoricals, *encoder.lists)]
    embedding = FeatureEmbedding(
        [v.size for v in encoder.categoricals],
        [(v.size, v.max_length or 1) for v in encoder.lists],
        numerics,
        width,
        [*fields, *encoder.numerics, *(content.column for content in encoder.contents)],
        [v.share for v in (*encoder.categoricals, *encoder.lists)],
        encoder.histories,
        heads=spec.objectives if spec.unshared else 1,
        contents=[ContentProjection(own.mean, own.rms, width) for own in encoder.contents],
    )
    return Ranker(spec, embedding, positions, cutpoints_needed(tasks), position_dropout)


def start_at_prior(
    model: Ranker, labels: Tensor, tasks: Sequence[Task], weight: Tensor | None = None
) -> None:
    """Initialise each tower's last bias, and the cut points, to predict the training means.

    Args:
        labels: [N, T], transformed; NaN = missing.
        weight: [N], or None for 1.
    """
    model.towers.start_at(base_logits(labels, tasks, weight))
    cuts = base_cutpoints(labels, tasks, weight)
    if cuts is not None and model.steps is not None:
        with torch.no_grad():
            model.steps.copy_(torch.cat([cuts[:, :1], torch.log(torch.expm1(cuts.diff()))], 1))


@torch.inference_mode()
def predict_logits(model: Ranker, examples: Examples) -> Tensor:
    """Logits [K, N, T] in evaluation mode, without positions, in blocks of bounded memory.

    They are computed on the model's device, and stay there.
    """
    model.eval()
    device = model.device

    def block(rows: slice) -> Tensor:
        return model(*(tensor.to(device) for tensor in part_of(examples, rows).inputs))

    return torch.cat(in_blocks(block, len(examples), model.block_rows, device), 1)


@torch.no_grad()
def predict(model: Ranker, examples: Examples, tasks: Sequence[Task]) -> np.ndarray:
    """Predictions [N, T]: probabilities, or values in the label's own unit."""
    return predictions(predict_logits(model, examples), tasks, model.cutpoints).cpu().numpy()
