"""Data-parallel training: the same loop in several processes, on one machine or many.

Every process (a rank of torch.distributed) iterates over the same batches in the same order and
takes its part of each. The ranks' gradients are summed. With losses scaled by each rank's share of
the label weights, the sum is the gradient of the whole batch, so that several processes train the
same model as one. A list loss is the mean of those of the parts: a list that is divided between two
parts has no pairs across them.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist

from mtl_ranker.errors import ProjectError
from mtl_ranker.models.objectives import Task, label_weights
from mtl_ranker.training.batches import Examples, part_of
from mtl_ranker.training.device import device_of

SUMMED = ("fixed", "normalised")  # kinds of balancing whose gradient is a sum over rows
CONNECTING = timedelta(seconds=30)  # to rank 0's store, which is open before its port is known
JOINING = timedelta(minutes=10)  # for all ranks of a training to have read their rows
SILENT = timedelta(minutes=10)  # until a rank that does not answer is taken for lost


class RankLost(RuntimeError):
    """Another rank of the training has ended, or does not answer."""


class World:
    """A single process.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank, size = 0, 1

    def part(self, batch: Examples, tasks: Sequence[Task]) -> tuple[Examples, Tensor | None]:
        """This rank's rows, and their share [T] of each objective's loss; None for all rows."""
        return batch, None

    def add_gradients(self, model: nn.Module, losses: Tensor) -> Tensor:
        """Sum the gradients over all ranks, in place; return the sum of their losses [T]."""
        return losses

    def wait(self) -> None:
        """Block until every rank has called this."""


SINGLE_PROCESS = World()


class Ranks(World):
    """The ranks of the running `torch.distributed` group: gloo on CPUs, NCCL on GPUs."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def part(self, batch: Examples, tasks: Sequence[Task]) -> tuple[Examples, Tensor | None]:
        whole = label_weights(batch.labels, tasks, batch.weight).sum(0)
        edges = torch.linspace(0, len(batch), self.size + 1).round().long().tolist()
        part = part_of(batch, slice(edges[self.rank], edges[self.rank + 1]))
        weight = label_weights(part.labels, tasks, part.weight).sum(0)
        return part, weight / whole.clamp(min=1e-12)

    def add_gradients(self, model: nn.Module, losses: Tensor) -> Tensor:
        trained = [p for p in model.parameters() if p.grad is not None]
        for parameter in trained:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = self._sum_of_sparse(parameter.grad.coalesce())
        gradients = [p.grad for p in trained if p.grad is not None and not p.grad.is_sparse]
        flat = torch.cat([*(g.flatten() for g in gradients), losses])
        with _exchange():
            dist.all_reduce(flat)
        *sums, summed_losses = flat.split([*(g.numel() for g in gradients), len(losses)])
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_(total.view_as(gradient))
        return summed_losses

    def _sum_of_sparse(self, gradient: Tensor) -> Tensor:
        """The sum over ranks of coalesced gradients of some rows of a table.

        Row numbers and rows are gathered, as NCCL adds no sparse tensors.
        """
        own = torch.tensor([gradient.indices().shape[1]], device=gradient.device)
        counts = [torch.zeros_like(own) for _ in range(self.size)]
        with _exchange():
            dist.all_gather(counts, own)
        most = int(torch.cat(counts).max())
        gathered = []
        for tensor in (gradient.indices()[0], gradient.values()):
            padded = tensor.new_zeros(most, *tensor.shape[1:])
            padded[: len(tensor)] = tensor
            of_ranks = [torch.zeros_like(padded) for _ in range(self.size)]
            with _exchange():
                dist.all_gather(of_ranks, padded)
            gathered.append(torch.cat([t[: int(n)] for t, n in zip(of_ranks, counts, strict=True)]))
        rows, values = gathered
        return torch.sparse_coo_tensor(rows.unsqueeze(0), values, gradient.shape).coalesce()

    def wait(self) -> None:
        with _exchange():
            dist.barrier()


@contextmanager
def _exchange() -> Iterator[None]:
    """A collective operation; its errors are raised as RankLost."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"another rank has ended or does not answer: {error}") from error


@dataclass(frozen=True)
class RankPlace:
    """A rank of a training that several processes started for it share.

    Attributes:
        rank, size: as in `World`.
        host: address of this process's host, by which the other ranks reach it.
        store: host and port of rank 0's store; None for rank 0, which opens it.
    """

    rank: int
    size: int
    host: str
    store: tuple[str, int] | None = None


def store_of(place: RankPlace) -> dist.TCPStore | None:
    """The store by which a training's ranks find each other, opened by rank 0; None for one rank.

    Raises RankLost where rank 0's does not answer, and ProjectError as `interface_of` does.
    """
    if place.size == 1:
        return None
    os.environ["GLOO_SOCKET_IFNAME"] = interface_of(place.host)
    with _exchange():
        if place.store is None:
            return dist.TCPStore(
                place.host, 0, is_master=True, wait_for_workers=False, timeout=JOINING
            )
        store = dist.TCPStore(*place.store, wait_for_workers=False, timeout=CONNECTING)
        store.set_timeout(JOINING)
        return store


@contextmanager
def joined(place: RankPlace, store: dist.TCPStore | None, device: str) -> Iterator[World]:
    """The group of a training's ranks; without further ranks a single process.

    Args:
        store: of `store_of`.
        device: `training.device`; each rank has the first CUDA device that it sees.

    Raises RankLost if not all ranks come within `JOINING`.
    """
    if store is None:
        yield SINGLE_PROCESS
        return
    backend = "gloo"
    if device_of(device).type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(0)
    with _exchange():
        store.set(f"here/{place.rank}", "")
        store.wait([f"here/{rank}" for rank in range(place.size)], JOINING)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=SILENT
        )
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def interface_of(host: str) -> str:
    """The network interface of this machine that has an address.

    Raises ProjectError if none has it.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.split("%")[0] == host for each in addresses):
            return name
    raise ProjectError(
        f"worker at {host}: no network interface of its machine has this address, by which other "
        "processes of a training would reach it; allowed: `dask worker --host` with an address of "
        "an interface, or training.ranks = 1"
    )


@contextmanager
def ranks(device: str = "cpu") -> Iterator[World]:
    """The process group that `torchrun` describes in the environment; without it one process.

    Args:
        device: `training.device`; on CUDA devices each rank of a host has its own.
    """
    if "WORLD_SIZE" not in os.environ:
        yield SINGLE_PROCESS
        return
    backend = "gloo"
    if device_of(device).type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The launcher's store is kept over a restart. With the same prefix, a restarted rank would
        # read the address of the lost one.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        agents = dist.TCPStore(address, port)
        store = dist.PrefixStore(group_name(agents, rank, size), agents)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend)
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def group_name(store: dist.Store, rank: int, size: int, patience: float = 600.0) -> str:
    """A name for the process group, the same on all ranks and different at every start.

    Launchers on several hosts do not count restarts consistently. Rank 0 generates the name and
    waits until the others have confirmed it. They ignore a name that their rank has confirmed
    already, and one that rank 0 does not release: both are of earlier starts.

    Raises TimeoutError after `patience` seconds.
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
