"""Train one ranker: AdamW with a learning rate falling linearly to zero, early stopping on
validation, best weights restored, seeds honoured.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl_ranker.config import Training
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.kernels import fast_matmul, in_blocks
from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear
from mtl_ranker.models.ranker import Ranker, RankerSpec
from mtl_ranker.objectives import (
    Task,
    base_cutpoints,
    base_logits,
    cutpoints_needed,
    losses,
    pairwise_losses,
    predictions,
    transform_labels,
)
from mtl_ranker.training.balancing import BALANCERS, Balancer, gradient_cosine
from mtl_ranker.training.batches import Examples
from mtl_ranker.training.checkpoints import Checkpoint
from mtl_ranker.training.distributed import ALONE, World
from mtl_ranker.training.shards import ShardedExamples

PROBE_ROWS = 4_096
PRIOR_ROWS = 1 << 21  # enough for training means
MOST_POSITIONS = 200


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training rows gave: mean losses [T], the monitored value, and the
    cosine between the objectives' gradients on shared parameters [T, T].
    """

    number: int
    train_loss: list[float]
    validate_loss: list[float]
    monitored: float
    seconds: float
    gradient_cosine: list[list[float]]


@dataclass(frozen=True)
class Trained:
    model: Ranker
    epochs: list[Epoch]
    best_epochs: list[int]  # of each objective; all the same unless objectives are `apart`
    seconds: float

    @property
    def best_epoch(self) -> int:
        return max(self.best_epochs)


def build_ranker(
    spec: RankerSpec,
    encoder: Encoder,
    tasks: Sequence[Task],
    positions: int = 0,
    position_dropout: float = 0.1,
) -> Ranker:
    """A ranker with fresh weights for this encoder's fields.

    Raises ValueError when a group of features matches none of them.
    """
    numerics = PiecewiseLinear(
        encoder.edges, encoder.missing, encoder.numeric_encoding == "standardise"
    )
    embedding = FeatureEmbedding(
        [v.size for v in encoder.categoricals],
        [(v.size, v.max_length or 1) for v in encoder.lists],
        numerics,
        spec.embedding_width * (spec.objectives if spec.apart else 1),
        [*(v.column for v in (*encoder.categoricals, *encoder.lists)), *encoder.numerics],
        [v.share for v in (*encoder.categoricals, *encoder.lists)],
        encoder.histories,
        heads=spec.objectives if spec.apart else 1,
    )
    return Ranker(spec, embedding, positions, cutpoints_needed(tasks), position_dropout)


@fast_matmul()
def train_ranker(
    spec: RankerSpec,
    encoder: Encoder,
    tasks: Sequence[Task],
    train: Examples | ShardedExamples,
    validate: Examples | None,
    settings: Training,
    seed: int,
    on_epoch: Callable[[Epoch], None] | None = None,
    until: Sequence[int] | None = None,
    checkpoint: Checkpoint | None = None,
    world: World = ALONE,
) -> Trained:
    """Train with one seed; the same seed on the same machine and threads gives the same weights.

    The monitored value is the objectives' weighted mean of validation loss over the loss of
    predicting the training mean (normalised entropy, He et al., ADKDD 2014): lower is better.

    Models whose objectives are `apart` stop, and are restored, each objective by itself.

    Without validation rows nothing is monitored, and `until` says after how many epochs each
    objective's weights are taken: the best epochs of an earlier training.

    With a `checkpoint`, a killed training goes on from its last file and ends with the same
    weights. With a `world` of several processes (training/distributed.py) every batch is divided
    among them. Raises FloatingPointError when the loss becomes NaN or infinite.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    positions = min(train.positions, MOST_POSITIONS)
    model = build_ranker(spec, encoder, tasks, positions, settings.position_dropout)
    rows = train.with_labels(partial(transform_labels, tasks=tasks))
    known = rows.sample(PRIOR_ROWS, inputs=False)
    start_at_prior(model, known.labels, tasks, known.weight)
    watch = None if validate is None else _Watch(model, known, validate, tasks)
    weights = torch.tensor([task.weight for task in tasks])
    base = _base_losses(known.labels, known.labels, tasks, known.weight)
    balancer = BALANCERS[settings.balancing](model, weights, base)
    optimisers = _optimisers(model, balancer, settings)
    steps = settings.epochs * math.ceil(len(rows) / settings.batch_size)
    probe = rows.sample(PROBE_ROWS)
    best = BestWeights(model, len(tasks), settings.patience, until)
    epochs: list[Epoch] = []
    first, done, step, spent = 1, 0, 0, 0.0
    total = torch.zeros(len(tasks))
    began_epoch = generator.get_state()
    saved = None if checkpoint is None else checkpoint.load()
    if saved is not None:
        model.load_state_dict(saved["model"])
        for optimiser, its_state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(its_state)
        balancer.restore(saved["balancer"])
        best.resume(saved["best"])
        epochs = [Epoch(**epoch) for epoch in saved["epochs"]]
        first, done, step, spent = (saved[k] for k in ("epoch", "done", "step", "seconds"))
        total, began_epoch = saved["total"], saved["began_epoch"]
        torch.set_rng_state(saved["random"])
    if world.rank > 0:  # other rows, other dropout
        torch.manual_seed(seed + 7_919 * world.rank + step)
    began = time.perf_counter()

    def state(epoch: int, done: int) -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            "balancer": balancer.state(),
            "best": best.state(),
            "epochs": [asdict(each) for each in epochs],
            "epoch": epoch,
            "done": done,
            "step": step,
            "seconds": spent + time.perf_counter() - began,
            "total": total,
            "began_epoch": began_epoch,
            "random": torch.get_rng_state(),
        }

    for number in range(first, settings.epochs + 1):
        if epochs and best.exhausted(number - 1):
            break
        started = time.perf_counter()
        model.train()
        generator.set_state(began_epoch)
        batches = rows.batches(settings.batch_size, generator, users=settings.pairwise > 0)
        for count, batch in enumerate(batches, 1):
            if count <= done:
                continue  # trained before the training was killed
            batch, share = world.part(batch, tasks)
            trace = model.trace(*batch.inputs, batch.position)
            each = losses(trace.logits, batch.labels, tasks, batch.weight, model.cutpoints)
            if share is not None:
                each = each * share
            if settings.pairwise > 0 and batch.user is not None:
                pairs = pairwise_losses(trace.logits, batch.labels, batch.user, tasks)
                each = each + settings.pairwise * pairs / world.size
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = settings.learning_rate * (1.0 - step / steps)
                optimiser.zero_grad()
            step += 1
            balancer.backward(each, model.penalty(trace) / world.size)
            total += world.add_gradients(model, each.detach())
            for optimiser in optimisers:
                optimiser.step()
            if checkpoint is not None and world.rank == 0 and checkpoint.due():
                checkpoint.save(state(number, count))
        train_loss = total / count
        balancer.end_epoch(train_loss)
        validated = torch.full((len(tasks),), math.nan) if watch is None else watch.losses()
        seen = train_loss if watch is None else torch.cat([train_loss, validated])
        if not bool(torch.isfinite(seen).all()):
            raise FloatingPointError(
                f"the loss is not finite in epoch {number} (train {train_loss.tolist()}, "
                f"validation {validated.tolist()}); try a smaller training.learning_rate"
            )
        relative = validated if watch is None else validated / watch.base
        monitored = float((relative * weights).sum() / weights.sum())
        epoch = Epoch(
            number,
            train_loss.tolist(),
            validated.tolist(),
            monitored,
            time.perf_counter() - started,
            _conflict(model, probe, tasks),
        )
        epochs.append(epoch)
        if on_epoch is not None:
            on_epoch(epoch)
        best.keep(number, relative.tolist() if spec.apart else [monitored] * len(tasks))
        done, total, began_epoch = 0, torch.zeros(len(tasks)), generator.get_state()
    seconds = spent + time.perf_counter() - began
    if checkpoint is not None and world.rank == 0 and seconds >= checkpoint.seconds:
        checkpoint.save(state(settings.epochs + 1, 0))
    best.restore()
    model.eval()
    return Trained(model, epochs, best.epochs, seconds)


def _optimisers(model: Ranker, balancer: Balancer, settings: Training) -> list[Optimizer]:
    """AdamW for everything; of a large table of embeddings, Adam on a batch's own rows.

    A dense step costs as much as the table is large, whatever the batch. The rows' decay of weights
    is left out there; PCGrad projects whole gradients and stays dense.
    """
    table = model.embedding.table.weight
    model.embedding.sparse = len(table) > settings.sparse_rows and settings.balancing != "pcgrad"
    apart = {id(table)} if model.embedding.sparse else set()
    learned: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in apart]},
        *({"params": [p], "weight_decay": 0.0} for p in balancer.parameters),
    ]
    rate, decay = settings.learning_rate, settings.weight_decay
    made: list[Optimizer] = [torch.optim.AdamW(learned, lr=rate, weight_decay=decay, fused=True)]
    if model.embedding.sparse:
        made.append(torch.optim.SparseAdam([table], lr=rate))
    return made


class _Watch:
    """Losses on the validation rows, and those of always predicting the training means."""

    def __init__(
        self, model: Ranker, known: Examples, validate: Examples, tasks: Sequence[Task]
    ) -> None:
        self.model, self.rows, self.tasks = model, validate, tasks
        self.labels = transform_labels(validate.labels, tasks)
        self.base = _base_losses(known.labels, self.labels, tasks, known.weight)

    @torch.no_grad()
    def losses(self) -> Tensor:
        logits = predict_logits(self.model, self.rows)
        return losses(logits, self.labels, self.tasks, None, self.model.cutpoints)


class BestWeights:
    """The weights of the best epoch, of each objective its own where they share nothing.

    With `until`, each objective's epoch is given beforehand and nothing is compared.
    """

    def __init__(
        self,
        model: Ranker,
        objectives: int,
        patience: int,
        until: Sequence[int] | None = None,
    ) -> None:
        self.model, self.patience, self.until = model, patience, until
        self.values = [math.inf] * objectives
        self.epochs = [0] * objectives
        self.states: dict[int, dict[str, Tensor]] = {}

    def keep(self, epoch: int, values: Sequence[float]) -> None:
        """Remember this epoch for the objectives whose value, lower is better, it improved."""
        for t, value in enumerate(values):
            if epoch == self.until[t] if self.until else value < self.values[t]:
                self.values[t], self.epochs[t] = value, epoch
        if epoch in self.epochs:
            self.states[epoch] = copy.deepcopy(self.model.state_dict())
        self.states = {number: s for number, s in self.states.items() if number in self.epochs}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"values": self.values, "epochs": self.epochs, "states": self.states}

    def resume(self, state: dict[str, Any]) -> None:
        self.values, self.epochs, self.states = (state[k] for k in ("values", "epochs", "states"))

    def exhausted(self, epoch: int) -> bool:
        if self.until:
            return epoch >= max(self.until)
        return epoch - max(self.epochs) >= self.patience

    def restore(self) -> None:
        chosen = self.states[self.epochs[0]]
        if len(self.states) > 1:
            parts = [self.states[epoch] for epoch in self.epochs]
            for name, axis in self.model.objective_axes().items():
                blocks = [s[name].chunk(len(parts), axis)[t] for t, s in enumerate(parts)]
                chosen[name] = torch.cat(blocks, axis)
        self.model.load_state_dict(chosen)


def start_at_prior(
    model: Ranker, labels: Tensor, tasks: Sequence[Task], weight: Tensor | None = None
) -> None:
    """Let each tower's last bias, and the cut points, start at the training means."""
    model.towers.start_at(base_logits(labels, tasks, weight))
    cuts = base_cutpoints(labels, tasks)
    if cuts is not None and model.steps is not None:
        with torch.no_grad():
            model.steps.copy_(torch.cat([cuts[:, :1], torch.log(torch.expm1(cuts.diff()))], 1))


@torch.inference_mode()
def predict_logits(model: Ranker, examples: Examples) -> Tensor:
    """Logits [K, N, T] in evaluation mode, without positions, in blocks of bounded memory."""
    model.eval()

    def block(rows: slice) -> Tensor:
        return model(*(tensor[rows] for tensor in examples.inputs))

    return torch.cat(in_blocks(block, len(examples), model.block_rows), 1)


@torch.no_grad()
def predict(model: Ranker, examples: Examples, tasks: Sequence[Task]) -> np.ndarray:
    """Predictions [N, T]: probabilities, or values in the label's own unit."""
    return predictions(predict_logits(model, examples), tasks, model.cutpoints).numpy()


def _conflict(model: Ranker, probe: Examples, tasks: Sequence[Task]) -> list[list[float]]:
    model.eval()
    logits = model(*probe.inputs)
    each = losses(logits, probe.labels, tasks, probe.weight, model.cutpoints)
    return gradient_cosine(each, model.shared_parameters()).tolist()


def _base_losses(
    train: Tensor, validate: Tensor, tasks: Sequence[Task], weight: Tensor | None
) -> Tensor:
    constant = base_logits(train, tasks, weight).expand_as(validate)
    cuts = base_cutpoints(train, tasks)
    return losses(constant, validate, tasks, None, cuts).clamp(min=1e-6)
