"""Train one ranker: AdamW with a learning rate falling linearly to zero, early stopping on
validation, best weights restored, seeds honoured.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtl_ranker.config import Training
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear
from mtl_ranker.models.ranker import Ranker, RankerSpec
from mtl_ranker.objectives import Task, losses, predictions, transform_labels
from mtl_ranker.training.batches import Examples, shuffled_batches

PREDICT_ROWS = 16_384


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training rows gave: mean losses [T] and the monitored value."""

    number: int
    train_loss: list[float]
    validate_loss: list[float]
    monitored: float
    seconds: float


@dataclass(frozen=True)
class Trained:
    model: Ranker
    epochs: list[Epoch]
    best_epoch: int
    seconds: float


def build_ranker(spec: RankerSpec, encoder: Encoder) -> Ranker:
    """A ranker with fresh weights for this encoder's fields."""
    numerics = PiecewiseLinear(
        encoder.edges, encoder.missing, encoder.numeric_encoding == "standardise"
    )
    embedding = FeatureEmbedding(
        [v.size for v in encoder.categoricals],
        [(v.size, v.max_length or 1) for v in encoder.lists],
        numerics,
        spec.embedding_width,
    )
    return Ranker(spec, embedding)


def train_ranker(
    spec: RankerSpec,
    encoder: Encoder,
    tasks: Sequence[Task],
    train: Examples,
    validate: Examples,
    settings: Training,
    seed: int,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Trained:
    """Train with one seed; the same seed on the same machine and threads gives the same weights.

    The monitored value is the objectives' weighted mean of validation loss over the loss of
    predicting the training mean (normalised entropy, He et al., ADKDD 2014): lower is better.

    Raises FloatingPointError when the loss becomes NaN or infinite.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_ranker(spec, encoder)
    train_labels = transform_labels(train.labels, tasks)
    validate_labels = transform_labels(validate.labels, tasks)
    start_at_prior(model, train_labels, tasks)
    base = _base_losses(train_labels, validate_labels, tasks)
    weights = torch.tensor([task.weight for task in tasks])
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=steps)
    rows = Examples(*train.inputs, train_labels)
    epochs: list[Epoch] = []
    best, best_weights, began = math.inf, copy.deepcopy(model.state_dict()), time.perf_counter()
    for number in range(1, settings.epochs + 1):
        started = time.perf_counter()
        model.train()
        total, count = torch.zeros(len(tasks)), 0
        for inputs, labels in shuffled_batches(rows, settings.batch_size, generator):
            each = losses(model(*inputs), labels, tasks)
            optimiser.zero_grad()
            (each * weights).sum().backward()
            optimiser.step()
            schedule.step()
            total += each.detach()
            count += 1
        validated = losses(predict_logits(model, validate), validate_labels, tasks)
        if not bool(torch.isfinite(total).all() and torch.isfinite(validated).all()):
            raise FloatingPointError(
                f"the loss is not finite in epoch {number} (train {(total / count).tolist()}, "
                f"validation {validated.tolist()}); try a smaller training.learning_rate"
            )
        monitored = float(((validated / base) * weights).sum() / weights.sum())
        epoch = Epoch(
            number,
            (total / count).tolist(),
            validated.tolist(),
            monitored,
            time.perf_counter() - started,
        )
        epochs.append(epoch)
        if on_epoch is not None:
            on_epoch(epoch)
        if monitored < best:
            best, best_weights = monitored, copy.deepcopy(model.state_dict())
        best_epoch = min(epochs, key=lambda e: e.monitored).number
        if number - best_epoch >= settings.patience:
            break
    model.load_state_dict(best_weights)
    model.eval()
    return Trained(model, epochs, best_epoch, time.perf_counter() - began)


def start_at_prior(model: Ranker, labels: Tensor, tasks: Sequence[Task]) -> None:
    """Let each tower's last bias start at its objective's training mean (in logits)."""
    bias = model.towers.biases[-1]
    with torch.no_grad():
        for t, task in enumerate(tasks):
            mean = labels[:, t].nanmean()
            bias[t] = torch.logit(mean.clamp(1e-6, 1 - 1e-6)) if task.kind == "binary" else mean


@torch.no_grad()
def predict_logits(model: Ranker, examples: Examples) -> Tensor:
    """Logits [N, T] in evaluation mode, in blocks of bounded memory."""
    model.eval()
    return torch.cat(
        [
            model(*(tensor[start : start + PREDICT_ROWS] for tensor in examples.inputs))
            for start in range(0, max(len(examples), 1), PREDICT_ROWS)
        ]
    )


def predict(model: Ranker, examples: Examples, tasks: Sequence[Task]) -> np.ndarray:
    """Predictions [N, T]: probabilities, or values in the label's own unit."""
    return predictions(predict_logits(model, examples), tasks).numpy()


def _base_losses(train: Tensor, validate: Tensor, tasks: Sequence[Task]) -> Tensor:
    means = train.nanmean(0)
    constant = torch.stack(
        [
            torch.logit(means[t].clamp(1e-6, 1 - 1e-6)) if task.kind == "binary" else means[t]
            for t, task in enumerate(tasks)
        ]
    )
    return losses(constant.expand_as(validate), validate, tasks).clamp(min=1e-6)
