"""Train many random starts of one model at once, with a replica dimension on every parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtl_ranker.models.matmul import fast_matmul

Chunk = tuple[Tensor, Tensor]  # inputs [S, B, I] and labels [S, B, T] of S steps


@dataclass(frozen=True)
class AdamSettings:
    """How long, and at which learning rate, Adam trains."""

    steps: int
    learning_rate: float


class Replicas:
    """R models of the same structure with different weights, trained by Adam as one.

    Every parameter is stacked to [R, …] and the model is evaluated once for all replicas
    (`torch.vmap`), so that R small matrix products become one batched product. Adam is elementwise
    and the replicas' losses are summed, so replicas do not affect each other: each has the weights
    of a separate training, up to rounding. Models must not use random numbers.

    Args:
        models: R modules that map inputs [B, I] to outputs [B, T].
        learning_rate: of Adam.
    """

    def __init__(self, models: Sequence[nn.Module], learning_rate: float) -> None:
        self.parameters, self.buffers = torch.func.stack_module_state(list(models))
        self.structure = copy.deepcopy(models[0])
        self.optimiser = torch.optim.Adam(
            list(self.parameters.values()), lr=learning_rate, fused=True
        )

    def __call__(self, inputs: Tensor) -> Tensor:
        """Outputs of every replica for its inputs: [R, B, I] → [R, B, T]."""

        def single(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self.structure, (parameters, buffers), (x,))

        return torch.vmap(single)(self.parameters, self.buffers, inputs)

    def step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """One step of Adam on the mean squared error; returns the losses before it [R, T]."""
        self.optimiser.zero_grad()
        losses = (self(inputs) - labels).square().mean(1)
        losses.sum().backward()
        self.optimiser.step()
        return losses.detach()

    @torch.no_grad()
    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean squared errors of each replica: [R, T]."""
        return (self(inputs) - labels).square().mean(1)


@fast_matmul()
def train_replicas(
    build: Callable[[], nn.Module],
    data: Callable[[int], Iterator[Chunk]],
    seeds: Sequence[int],
    adam: AdamSettings,
    on_steps: Callable[[int], None] | None = None,
) -> Replicas:
    """Train one replica per seed.

    Args:
        build: returns a new model; called after torch is seeded with the replica's seed.
        data: endless chunks of steps for a seed, of equal sizes for all seeds.
        on_steps: called after every chunk with its number of steps, summed over replicas.
    """
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(build())
    replicas = Replicas(models, adam.learning_rate)
    sources = [data(seed) for seed in seeds]
    step = 0
    while step < adam.steps:
        chunks = [next(source) for source in sources]
        inputs, labels = (torch.stack([c[part] for c in chunks], 1) for part in (0, 1))
        count = min(adam.steps - step, len(inputs))
        for x, y in zip(inputs[:count], labels[:count], strict=True):
            replicas.step(x, y)
        step += count
        if on_steps is not None:
            on_steps(count * len(models))
    return replicas
