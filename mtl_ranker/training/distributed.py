"""Data-parallel training: the same loop in several processes, on one machine or many.

Every process (a rank of torch.distributed) sees the same batches in the same order, takes its part
of each, and adds its gradients to the others': the sum is the gradient of the whole batch, missing
labels and sample weights included, so several processes train what one would.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist

from mtl_ranker.models.objectives import Task, label_weights
from mtl_ranker.training.batches import Examples, part_of


class World:
    """One process: everything is its own."""

    rank, size = 0, 1

    def part(self, batch: Examples, tasks: Sequence[Task]) -> tuple[Examples, Tensor | None]:
        """This rank's rows, and the share of each objective's loss that they make up: [T]."""
        return batch, None

    def add_gradients(self, model: nn.Module, losses: Tensor) -> Tensor:
        """Every rank's gradients become the sum of all ranks'; gives the sum of their losses."""
        return losses

    def wait(self) -> None:
        """Until every rank is here."""


SINGLE_PROCESS = World()


class Ranks(World):
    """The ranks of the running `torch.distributed` group (gloo, on CPUs)."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def part(self, batch: Examples, tasks: Sequence[Task]) -> tuple[Examples, Tensor | None]:
        whole = label_weights(batch.labels, tasks, batch.weight).sum(0)
        edges = torch.linspace(0, len(batch), self.size + 1).round().long().tolist()
        own = part_of(batch, slice(edges[self.rank], edges[self.rank + 1]))
        mine = label_weights(own.labels, tasks, own.weight).sum(0)
        return own, mine / whole.clamp(min=1e-12)

    def add_gradients(self, model: nn.Module, losses: Tensor) -> Tensor:
        known = [p for p in model.parameters() if p.grad is not None]
        for parameter in known:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
                dist.all_reduce(parameter.grad)
        gradients = [p.grad for p in known if p.grad is not None and not p.grad.is_sparse]
        flat = torch.cat([*(g.flatten() for g in gradients), losses])
        dist.all_reduce(flat)
        *parts, summed = flat.split([*(g.numel() for g in gradients), len(losses)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return summed

    def wait(self) -> None:
        dist.barrier()


@contextmanager
def ranks() -> Iterator[World]:
    """The group that `torchrun` describes in the environment, over gloo; alone without it."""
    if "WORLD_SIZE" not in os.environ:
        yield SINGLE_PROCESS
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The launcher's store outlives a restart: under one name, a restarted rank would find the
        # address of the rank that was lost.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        agents = dist.TCPStore(address, port)
        store = dist.PrefixStore(group_name(agents, rank, size), agents)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group("gloo")
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def group_name(store: dist.Store, rank: int, size: int, patience: float = 600.0) -> str:
    """A name that the ranks of this start agree on and no earlier start had.

    Launchers on several hosts do not count restarts alike. So rank 0 makes a name up and waits for
    the others; to them a name is an old one if their rank has answered to it before, and one to
    which rank 0 never says go. Raises TimeoutError after `patience` seconds.
    """
    end = time.monotonic() + patience
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("name", name)
        store.wait([f"{name}/{other}" for other in range(1, size)], timedelta(seconds=patience))
        store.set(f"{name}/go", "")
        return name
    answered = ""
    while time.monotonic() < end:
        name = store.get("name").decode() if store.check(["name"]) else ""
        if name and name != answered and not store.check([f"{name}/{rank}"]):
            store.set(f"{name}/{rank}", "")
            answered = name
        if answered and answered == name and store.check([f"{name}/go"]):
            return name
        time.sleep(0.05)
    raise TimeoutError(f"rank {rank} of {size}: rank 0 has not started within {patience:g} s")
