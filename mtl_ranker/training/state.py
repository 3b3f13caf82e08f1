"""The state of a training, and checkpoints from which a killed one is resumed bit for bit."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl_ranker.errors import first_line
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.stores import objects
from mtl_ranker.training.balancing import Balancer
from mtl_ranker.training.warm_start import combined, moments_of

LOG = logging.getLogger(__name__)

# Part of a checkpoint's key: another number where the content or the training's steps change.
FORMAT = 5


@dataclass(frozen=True)
class Epoch:
    """One pass over the training rows.

    Attributes:
        train_loss, validate_loss: [T], mean losses; NaN without validation rows.
        monitored: the value for early stopping and comparisons; lower is better.
        gradient_cosine: [T][T], cosine between the objectives' gradients on shared parameters.
    """

    number: int
    train_loss: list[float]
    validate_loss: list[float]
    monitored: float
    seconds: float
    gradient_cosine: list[list[float]]


@dataclass(kw_only=True)
class TrainingState:
    """Everything on which the rest of a training depends.

    Attributes:
        generator: of the order of rows.
        loss: [T], sum over the running epoch's batches.
        labelled: [T], number of those batches that have labels of each objective.
        epoch_start: state of `generator` at the start of the running epoch, to repeat its order.
        epochs: those that have ended.
        epoch: number of the running one, from 1.
        batches: number of batches trained in the running epoch.
        step: of the optimisers, over all epochs.
        spent: seconds of earlier processes.
        began: `time.perf_counter` when this process started or resumed the training.
    """

    model: Ranker
    optimisers: list[Optimizer]
    balancer: Balancer
    best: BestWeights
    generator: torch.Generator
    loss: Tensor
    labelled: Tensor
    epoch_start: Tensor
    epochs: list[Epoch] = field(default_factory=list)
    epoch: int = 1
    batches: int = 0
    step: int = 0
    spent: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def place(self) -> str:
        """The types of device of the network and of the order of rows."""
        return f"{self.device.type}, rows ordered by {self.generator.device.type}"

    @property
    def seconds(self) -> float:
        """Duration of the training so far, including earlier processes."""
        return self.spent + time.perf_counter() - self.began

    def next_epoch(self, ended: Epoch) -> None:
        """Start the next epoch."""
        self.epochs.append(ended)
        self.epoch, self.batches = self.epoch + 1, 0
        for sums in (self.loss, self.labelled):
            sums.zero_()  # in place, since a graph of the step adds to these tensors
        self.epoch_start = self.generator.get_state()

    def content(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "balancer": self.balancer.state(),
            "best": self.best.state(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "epoch": self.epoch,
            "batches": self.batches,
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
            "labelled": self.labelled,
            "epoch_start": self.epoch_start,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "place": self.place,
        }

    def resume(self, content: Mapping[str, Any]) -> None:
        """Restore the content of a checkpoint, including torch's global random state.

        The checkpoint is of a training with the same `place`.
        """
        self.model.load_state_dict(content["model"])
        for optimiser, saved in zip(self.optimisers, content["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
            for group in optimiser.param_groups:
                if isinstance(group["lr"], Tensor):  # a graph of the step reads it on the device
                    group["lr"] = group["lr"].to(self.device)
        self.balancer.restore(content["balancer"])
        self.best.resume(content["best"])
        self.epochs = [Epoch(**epoch) for epoch in content["epochs"]]
        self.epoch, self.batches, self.step = (content[k] for k in ("epoch", "batches", "step"))
        self.loss.copy_(content["loss"])
        self.labelled.copy_(content["labelled"])
        self.epoch_start = content["epoch_start"]
        self.spent, self.began = content["seconds"], time.perf_counter()
        torch.set_rng_state(content["random"])
        if content["random_cuda"] is not None:
            torch.cuda.set_rng_state(content["random_cuda"])


class BestWeights:
    """The weights of the best epoch, separately for each objective of an `unshared` model.

    Args:
        patience: epochs without improvement after which the training stops.
        until: [T], the epoch whose weights are kept for each objective, without any comparison.

    Attributes:
        optimisers: whose moments are kept with the weights; none by default.
        moments: number of an epoch → moments at its end (`moments_of`).
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
        self.optimisers: Sequence[Optimizer] = ()
        self.moments: dict[int, dict[str, Tensor]] = {}

    def keep(self, epoch: int, values: Sequence[float]) -> None:
        """Keep the model's weights if a value improves; values [T], lower is better."""
        for t, value in enumerate(values):
            if epoch == self.until[t] if self.until else value < self.values[t]:
                self.values[t], self.epochs[t] = value, epoch
        if epoch in self.epochs:
            self.states[epoch] = copy.deepcopy(self.model.state_dict())
            self.moments[epoch] = moments_of(self.model, self.optimisers)
        self.states = {number: s for number, s in self.states.items() if number in self.epochs}
        self.moments = {number: self.moments[number] for number in self.states}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        names = ("values", "epochs", "states", "moments")
        return {name: getattr(self, name) for name in names}

    def resume(self, state: dict[str, Any]) -> None:
        self.values, self.epochs, self.states = (state[k] for k in ("values", "epochs", "states"))
        self.moments = state["moments"]

    def exhausted(self, epoch: int) -> bool:
        """Whether the training stops after this epoch."""
        if self.until:
            return epoch >= max(self.until)
        return epoch - max(self.epochs) >= self.patience

    def restore(self) -> dict[str, Tensor]:
        """Load the best weights into the model; returns the kept moments at these weights."""
        if len(self.states) == 1:
            self.model.load_state_dict(self.states[self.epochs[0]])
            return self.moments[self.epochs[0]]
        axes = self.model.objective_axes()
        states, moments = (
            [of_epoch[epoch] for epoch in self.epochs] for of_epoch in (self.states, self.moments)
        )
        self.model.load_state_dict(combined(states, axes))
        return combined(moments, axes)


@dataclass
class Checkpoint:
    """The file to which a training is saved.

    Args:
        path: of the file, which is replaced atomically.
        key: identifies the training (`workspace.fingerprint` of settings and rows); a file with
            another key is ignored.
        seconds: least time between two saves.
    """

    path: Path
    key: str
    seconds: float = 60.0
    _last: float = field(default_factory=time.monotonic)

    def load(self) -> dict[str, Any] | None:
        """The saved state, or None without a whole file of this key."""
        if not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            # Not whole, as after a power cut: the training begins anew and replaces it.
            LOG.warning("%s: not a checkpoint (%s); ignored", self.path, first_line(error))
            return None
        return state if state["key"] == self.key else None

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.seconds

    def save(self, state: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A process of another host may write this file too: one that was taken for lost.
        temporary = self.path.with_suffix(f".{uuid.uuid4().hex}")
        with open(temporary, "wb") as file:
            torch.save(state | {"key": self.key}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._last = time.monotonic()


@dataclass
class StoredCheckpoint(Checkpoint):
    """A checkpoint in an object store, for processes of other hosts.

    Args:
        path: of the copy here, which no other process writes to.
        address: of the object.
    """

    address: str = field(kw_only=True)

    def load(self) -> dict[str, Any] | None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return None if objects.download(self.address, self.path) is None else super().load()

    def save(self, state: dict[str, Any]) -> None:
        super().save(state)
        objects.upload(self.path, self.address)
