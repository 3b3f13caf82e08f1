"""Many random starts of one model trained side by side: a replica dimension on every parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from mtl_ranker.models.matmul import fast_matmul

Chunk = tuple[Tensor, Tensor]  # inputs [S, B, I] and labels [S, B, T] of S steps


class Replicas:
    """R models of equal structure with weights of their own, trained by Adam as one.

    Every parameter is stacked to [R, …] and the model runs once for all replicas
    (`torch.vmap`), so that R small matrix products become one batched product. Adam works on each
    number by itself and the replicas' losses are summed, so no replica feels another: each ends
    where it would have ended alone, up to rounding. Models must not draw random numbers.

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
        """Outputs of every replica on its own inputs: [R, B, I] → [R, B, T]."""

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self.structure, (parameters, buffers), (x,))

        return torch.vmap(one)(self.parameters, self.buffers, inputs)

    def step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """One step of Adam on the mean squared error; each replica's losses before it [R, T]."""
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
    steps: int,
    learning_rate: float,
    on_steps: Callable[[int], None] | None = None,
) -> Replicas:
    """Train one replica per seed.

    Args:
        build: makes a model; called under the replica's seed.
        data: a seed's own endless chunks of steps; equal sizes for all seeds.
        steps: of Adam.
        on_steps: told, after every chunk, how many replica-steps it had.
    """
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(build())
    replicas = Replicas(models, learning_rate)
    sources = [data(seed) for seed in seeds]
    done = 0
    while done < steps:
        chunks = [next(source) for source in sources]
        inputs, labels = (torch.stack([c[part] for c in chunks], 1) for part in (0, 1))
        for x, y in zip(inputs[: steps - done], labels[: steps - done], strict=True):
            replicas.step(x, y)
        count = min(steps - done, len(inputs))
        done += count
        if on_steps is not None:
            on_steps(count * len(models))
    return replicas
