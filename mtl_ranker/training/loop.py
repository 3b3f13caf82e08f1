"""Train one ranker: AdamW with linear decay of the learning rate, and early stopping.

A small share of ids is replaced by the unknown value, so that its embedding is trained. The weights
of the best epoch are restored. The same seed gives the same weights. With a `WarmStart` a training
continues from another's weights and optimiser state.

A training on a GPU has its rows there where they fit, else batches are copied while the one before
is trained on; steps of the common kinds are CUDA graphs. The trained network is on the CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl_ranker.config import Training
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.models.list_losses import list_losses, needs_lists
from mtl_ranker.models.matmul import fast_matmul
from mtl_ranker.models.objectives import (
    Task,
    base_cutpoints,
    base_logits,
    ensemble_losses,
    label_weights,
    losses,
    transform_labels,
)
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.models.spec import RankerSpec
from mtl_ranker.training.balancing import BALANCERS, Balancer, gradient_cosine
from mtl_ranker.training.batches import Examples, without_ids
from mtl_ranker.training.device import CPU, GraphedStep, device_of, fits, streamed
from mtl_ranker.training.distributed import SINGLE_PROCESS, World
from mtl_ranker.training.network import build_ranker, predict_logits, start_at_prior
from mtl_ranker.training.shards import ShardedExamples
from mtl_ranker.training.state import BestWeights, Checkpoint, Epoch, TrainingState
from mtl_ranker.training.warm_start import (
    WarmStart,
    load_weights,
    restore_moments,
    shrink_and_perturb,
)

PROBE_ROWS = 4_096
PRIOR_ROWS = 1 << 21  # enough for training means
MOST_POSITIONS = 200
BATCH = (64, 2_048)  # least and greatest default size
RATE = 2e-3  # for batches of BATCH[1]
STEPS = 1_000_003  # more than of a training
SMALL_BATCH = 256  # smaller ones have its learning rate


@dataclass(frozen=True)
class Design:
    """The network to train: its specification, its inputs and its objectives.

    Attributes:
        start: where it continues from, a network of this specification; None for random weights.
    """

    spec: RankerSpec
    encoder: Encoder
    tasks: Sequence[Task]
    start: WarmStart | None = None


@dataclass(frozen=True)
class Rows:
    """Training rows, and the validation rows on which early stopping is decided."""

    train: Examples | ShardedExamples
    validate: Examples | None = None


@dataclass(frozen=True)
class Execution:
    """How a training runs.

    Attributes:
        on_epoch: called with each epoch when it ends.
        until: [T], without validation rows, the epoch after which each objective's weights are
            kept: the best epochs of an earlier training.
        checkpoint: to which the training is saved, and from which it is resumed.
        world: the processes among which every batch is divided (training/distributed.py).
        device: set by `train_ranker`.
    """

    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    until: Sequence[int] | None = None
    checkpoint: Checkpoint | None = None
    world: World = SINGLE_PROCESS
    device: torch.device = CPU


@dataclass(frozen=True)
class Trained:
    """A trained ranker in evaluation mode, on the CPU.

    Attributes:
        settings: with which it was trained (`sized`).
        best_epochs: [T], equal for all objectives unless the model is `unshared`.
        moments: of the optimisers at the restored weights (`moments_of`), where a later training
            may continue from them (`training.start`); else empty.
    """

    model: Ranker
    epochs: list[Epoch]
    best_epochs: list[int]
    seconds: float
    settings: Training
    moments: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def best_epoch(self) -> int:
        return max(self.best_epochs)


def train_ranker(
    design: Design,
    rows: Rows,
    settings: Training,
    seed: int,
    execution: Execution = Execution(),
) -> Trained:
    """Train with one seed; on a CPU the result is reproducible with the same machine and threads.

    On a GPU sums are added in an order that changes from run to run: results agree within rounding.

    Early stopping monitors normalised entropy (He et al., ADKDD 2014): the validation loss divided
    by the loss of predicting the training mean, as a weighted mean over objectives. The objectives
    of `unshared` models are monitored and restored separately; one without a label on the
    validation rows follows the mean of the others. Without validation rows nothing is monitored,
    and `execution.until` defines the epochs.

    Settings that are None follow from the number of training rows (`sized`).

    Raises FloatingPointError when the loss becomes NaN or infinite, and ProjectError without the
    device of `settings.device`.
    """
    device, settings = device_of(settings.device), sized(settings, len(rows.train))
    with fast_matmul(device, rounded=True):
        return _trained(design, rows, settings, seed, replace(execution, device=device))


def sized(settings: Training, rows: int) -> Training:
    """The settings with the size of a batch and the learning rate, where they are None.

    A batch has the power of two nearest to a hundredth of the rows, from 64 to 2,048: about a
    hundred steps an epoch, or more for more than 200,000 rows. The learning rate is proportional to
    the square root of the batch size, which keeps the noise of Adam's steps about the same (Malladi
    et al., NeurIPS 2022), but not below that of 256 rows.

    Args:
        rows: N, of the training.

    >>> found = sized(Training(), 28_000)
    >>> found.batch_size, round(found.learning_rate, 5)
    (256, 0.00071)
    """
    batch = settings.batch_size
    if batch is None:
        batch = min(max(2 ** round(math.log2(max(rows, 1) / 100)), BATCH[0]), BATCH[1])
    rate = settings.learning_rate or RATE * math.sqrt(max(batch, SMALL_BATCH) / BATCH[1])
    return settings.model_copy(update={"batch_size": batch, "learning_rate": rate})


def _trained(
    design: Design, rows: Rows, settings: Training, seed: int, execution: Execution
) -> Trained:
    tasks, checkpoint, rank = design.tasks, execution.checkpoint, execution.world.rank
    device = execution.device
    train = rows.train.with_labels(partial(transform_labels, tasks=tasks))
    prior = train.sample(PRIOR_ROWS, inputs=False)
    positions = min(rows.train.positions, MOST_POSITIONS)
    if isinstance(train, Examples) and fits(train, device):
        train = train.to(device)
    state = _start(design, prior, settings, seed, _Place(positions, train, device))
    state.best.until = execution.until
    if settings.start == "champion" and execution.until is None:
        state.best.optimisers = state.optimisers
    monitor = None if rows.validate is None else _Monitor(state.model, prior, rows.validate, tasks)
    probe = train.sample(PROBE_ROWS).to(device)
    saved = None if checkpoint is None else checkpoint.load()
    if saved is not None and saved["place"] == state.place:
        state.resume(saved)
    running = _Running(tasks, settings, execution, _step(state, design, settings, execution))
    while state.epoch <= settings.epochs:
        if state.epochs and state.best.exhausted(state.epoch - 1):
            break
        started = time.perf_counter()
        train_loss = _train_epoch(state, train, running).to(CPU)
        validate_loss = torch.full((len(tasks),), math.nan)
        relative = validate_loss
        weights = torch.tensor([task.weight for task in tasks])
        if monitor is not None:
            validate_loss = monitor.losses()
            relative = validate_loss / monitor.base
            weights = weights * monitor.labelled
        _check_finite(state.epoch, train_loss, validate_loss, monitor is not None)
        epoch = Epoch(
            number=state.epoch,
            train_loss=train_loss.tolist(),
            validate_loss=validate_loss.tolist(),
            monitored=float((relative * weights).sum() / weights.sum()),
            gradient_cosine=_gradient_cosine(state.model, probe, tasks),
            seconds=time.perf_counter() - started,
        )
        execution.on_epoch(epoch)
        monitored = torch.full((len(tasks),), epoch.monitored)
        if design.spec.unshared and monitor is not None:
            monitored = torch.where(monitor.labelled, relative, monitored)
        by_objective = monitored.tolist()
        state.best.keep(epoch.number, by_objective)
        state.next_epoch(epoch)
    seconds = state.seconds
    if checkpoint is not None and rank == 0 and seconds >= checkpoint.seconds:
        checkpoint.save(state.content())
    moments = {name: moment.to(CPU) for name, moment in state.best.restore().items()}
    model = state.model.to(CPU).eval()
    return Trained(model, state.epochs, state.best.epochs, seconds, settings, moments)


@dataclass(frozen=True)
class _Place:
    """Number of positions with a bias, training rows, and the device of the network."""

    positions: int
    train: Examples | ShardedExamples
    device: torch.device


def _start(
    design: Design, prior: Examples, settings: Training, seed: int, place: _Place
) -> TrainingState:
    """A training before its first batch.

    The random weights are drawn on the CPU, and are the same on every device.

    Args:
        prior: training rows for the labels' means.
    """
    tasks, start, device = design.tasks, design.start, place.device
    torch.manual_seed(seed)
    drawn_on = place.train.device if isinstance(place.train, Examples) else CPU
    generator = torch.Generator(drawn_on).manual_seed(seed)
    positions = place.positions if start is None else start.positions
    model = build_ranker(design.spec, design.encoder, tasks, positions, settings.position_dropout)
    if start is None:
        start_at_prior(model, prior.labels, tasks, prior.weight)
    else:
        fresh = {name: p.detach().clone() for name, p in model.named_parameters()}
        load_weights(model, start, design.encoder)
        shrink_and_perturb(model, fresh, (settings.shrink, settings.perturb))
    model.to(device)
    weights = torch.tensor([task.weight for task in tasks], device=device)
    base = _base_losses(prior, tasks).to(device)
    balancer = BALANCERS[settings.balancing](model, weights, base)
    optimisers = _optimisers(model, balancer, settings)
    if start is not None and settings.keep_optimiser:
        restore_moments(model, optimisers, start, design.encoder)
    return TrainingState(
        model=model,
        optimisers=optimisers,
        balancer=balancer,
        best=BestWeights(model, len(tasks), settings.patience),
        generator=generator,
        loss=torch.zeros(len(tasks), device=device),
        labelled=torch.zeros(len(tasks), device=device),
        epoch_start=generator.get_state(),
    )


@dataclass(frozen=True)
class _Running:
    """What the epochs of a training have in common; `step` trains on a batch (`_step`)."""

    tasks: Sequence[Task]
    settings: Training
    execution: Execution
    step: Callable[[Examples], None]


def _step(
    state: TrainingState, design: Design, settings: Training, execution: Execution
) -> Callable[[Examples], None]:
    """A function that trains on a batch; on a CUDA device, where it is possible, as a graph."""

    def step(batch: Examples) -> None:
        _train_batch(state, batch, design.tasks, settings, execution.world)

    if execution.device.type != "cuda" or execution.world.size > 1:
        return step
    assert settings.batch_size is not None  # `sized`
    return GraphedStep(step, settings.batch_size) if _graphable(state, design, settings) else step


def _graphable(state: TrainingState, design: Design, settings: Training) -> bool:
    """Whether shapes and values of a step depend on nothing but tensors on the device.

    Not so: sparse updates, experts computed for the rows that select them, pairs of lists, the
    chain of conditional objectives, and balancing that keeps new tensors.
    """
    return (
        not state.model.embedding.sparse
        and settings.balancing in ("fixed", "normalised", "uncertainty")
        and all(layer.gate != "top_k" for layer in design.spec.layers)
        and all(not task.list_loss and not task.conditional_on for task in design.tasks)
    )


def _train_epoch(
    state: TrainingState, train: Examples | ShardedExamples, running: _Running
) -> Tensor:
    """Train the rest of the running epoch.

    Returns the mean loss [T] of the batches that have labels of the objective.
    """
    settings, execution, trained_before = running.settings, running.execution, state.batches
    checkpoint, device, rank = execution.checkpoint, execution.device, execution.world.rank
    assert settings.batch_size is not None  # `sized`
    assert settings.learning_rate is not None
    steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
    state.model.train()
    state.generator.set_state(state.epoch_start)
    batches = train.batches(
        settings.batch_size, state.generator, together=needs_lists(running.tasks)
    )
    if not (isinstance(train, Examples) and train.device == device):
        batches = streamed(batches, device)
    for number, batch in enumerate(batches, 1):
        if number <= trained_before:
            continue
        _set_learning_rate(state.optimisers, settings.learning_rate * (1.0 - state.step / steps))
        if rank > 0:  # other rows than rank 0's need other dropout, the same after a restart
            drawn = (state.generator.initial_seed() * 7_919 + rank) * STEPS + state.step
            torch.manual_seed(drawn % 2**63)
        running.step(batch)
        state.step += 1
        state.batches = number
        if checkpoint is not None and execution.world.rank == 0 and checkpoint.due():
            checkpoint.save(state.content())
    mean = state.loss / state.labelled.clamp(min=1)
    state.balancer.end_epoch(mean)
    return mean


def _set_learning_rate(optimisers: Sequence[Optimizer], learning_rate: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate


def _train_batch(
    state: TrainingState,
    batch: Examples,
    tasks: Sequence[Task],
    settings: Training,
    world: World,
) -> None:
    """One step of the optimisers; adds the batch's losses to `state.loss`."""
    model = state.model
    labelled = label_weights(batch.labels, tasks, batch.weight).sum(0) > 0
    seed = None
    if batch.device.type == "cpu":
        seed = state.generator.initial_seed() * 1_000_003 + state.step
    batch, share = world.part(without_ids(batch, settings.unknown_rate, seed), tasks)
    trace = model.trace(*batch.inputs, batch.position)
    loss = _losses(model, trace.logits, batch, tasks)  # [T]
    if share is not None:
        loss = loss * share
    if any(task.list_loss for task in tasks):
        weights = torch.tensor([task.list_weight for task in tasks], device=loss.device)
        of_lists = _separately(
            lambda z: list_losses(z, batch.labels, batch.lists, tasks, batch.weight),
            trace.logits,
            model,
            tasks,
        )
        loss = loss + weights * of_lists / world.size
    for optimiser in state.optimisers:
        optimiser.zero_grad()
    state.balancer.backward(loss, model.penalty(trace) / world.size)
    state.loss += world.add_gradients(model, loss.detach())
    state.labelled += labelled
    for optimiser in state.optimisers:
        optimiser.step()


def _losses(model: Ranker, logits: Tensor, rows: Examples, tasks: Sequence[Task]) -> Tensor:
    """Losses [T] of training rows."""
    return _separately(
        lambda z: losses(z, rows.labels, tasks, rows.weight, model.cutpoints), logits, model, tasks
    )


def _separately(
    compute: Callable[[Tensor], Tensor], logits: Tensor, model: Ranker, tasks: Sequence[Task]
) -> Tensor:
    """Losses [T] that `compute` gives of logits [..., B, T].

    With `unshared` objectives, the loss of one sends no gradient to the objective that it is
    conditional on.
    """
    if not model.spec.unshared or all(task.conditional_on is None for task in tasks):
        return compute(logits)
    own = torch.eye(len(tasks), dtype=torch.bool, device=logits.device)
    fixed = logits.detach()
    return torch.stack([compute(torch.where(own[t], logits, fixed))[t] for t in range(len(tasks))])


def _check_finite(epoch: int, train: Tensor, validate: Tensor, monitored: bool) -> None:
    values = torch.cat([train, validate]) if monitored else train
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError(
            f"the loss is not finite in epoch {epoch} (train {train.tolist()}, "
            f"validation {validate.tolist()}); try a smaller training.learning_rate"
        )


def _optimisers(model: Ranker, balancer: Balancer, settings: Training) -> list[Optimizer]:
    """AdamW for all parameters; for a large table of embeddings, Adam on the batch's rows.

    Only matrices decay: a bias has nothing to regularise, and an embedding would decay by the
    number of batches that lack its id. The cost of a dense step is proportional to the table,
    whatever the batch. PCGrad projects complete gradients, so there the table stays dense.
    """
    table = model.embedding.table.weight
    model.embedding.sparse = len(table) > settings.sparse_rows and settings.balancing != "pcgrad"
    sparse = {id(table)} if model.embedding.sparse else set()
    matrices = model.matrices()
    elsewhere = sparse | {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in elsewhere]
    learned: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": others, "weight_decay": 0.0},
        *({"params": [p], "weight_decay": 0.0} for p in balancer.parameters),
    ]
    rate, decay = settings.learning_rate, settings.weight_decay
    assert rate is not None  # `sized`
    on_cuda = table.device.type == "cuda"
    # A graph of the step reads the learning rate from a tensor.
    of_step = torch.tensor(rate, device=table.device) if on_cuda else rate
    optimisers: list[Optimizer] = [
        torch.optim.AdamW(learned, lr=of_step, weight_decay=decay, fused=True, capturable=on_cuda)
    ]
    if model.embedding.sparse:
        optimisers.append(torch.optim.SparseAdam([table], lr=rate))
    return optimisers


class _Monitor:
    """Losses [T] on the validation rows; `base`, those of predicting the training means.

    With members, the losses of the mean prediction, which is what is served.
    `labelled` [T] marks which objectives have a label there; at least one has.
    """

    def __init__(
        self, model: Ranker, prior: Examples, validate: Examples, tasks: Sequence[Task]
    ) -> None:
        self.model, self.tasks = model, tasks
        labels = transform_labels(validate.labels, tasks)
        self.base = _base_losses(prior, tasks, labels)
        self.labelled = (~torch.isnan(labels)).any(0)
        self.rows = validate.to(model.device) if fits(validate, model.device) else validate
        self.labels = labels.to(model.device)

    @torch.no_grad()
    def losses(self) -> Tensor:
        logits = predict_logits(self.model, self.rows)
        return ensemble_losses(logits, self.labels, self.tasks, self.model.cutpoints).to(CPU)


def _gradient_cosine(model: Ranker, probe: Examples, tasks: Sequence[Task]) -> list[list[float]]:
    """Cosine between the objectives' gradients on some training rows: [T][T]."""
    model.eval()
    logits = model(*probe.inputs)
    loss = _losses(model, logits, probe, tasks)
    return gradient_cosine(loss, model.shared_parameters()).tolist()


def _base_losses(prior: Examples, tasks: Sequence[Task], held_out: Tensor | None = None) -> Tensor:
    """Losses [T] of predicting the means of training rows: on these rows, or on other labels.

    Args:
        held_out: [N, T], without weights; None for the rows of `prior` with their weights.
    """
    labels, weight = (prior.labels, prior.weight) if held_out is None else (held_out, None)
    constant = base_logits(prior.labels, tasks, prior.weight).expand_as(labels)
    cuts = base_cutpoints(prior.labels, tasks, prior.weight)
    return losses(constant, labels, tasks, weight, cuts).clamp(min=1e-6)
