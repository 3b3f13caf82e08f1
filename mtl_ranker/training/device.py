"""The device of a training or of predictions, rows on it, and a step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.training.batches import Examples

CPU = torch.device("cpu")
MOST_OF_MEMORY = 0.5  # of the device's free memory, for the training rows
EAGER_STEPS = 3  # before a graph is captured: they allocate the optimiser's state


def check_devices(project: Project) -> None:
    """Raise ProjectError for a device of the settings that does not exist on this machine."""
    device_of(project.training.device)
    device_of(project.scoring.device, "scoring.device")


def device_of(name: str, key: str = "training.device") -> torch.device:
    """The device of this name; for "auto", a CUDA device where there is one, else the CPU.

    Under torchrun each rank has the CUDA device of its local rank (`torch.cuda.set_device`).

    Args:
        key: the setting that is named in an error.

    Raises ProjectError if the device does not exist on this machine.
    """
    found = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        name = "cuda" if found["cuda"] else "cpu"
    if not found[name]:
        allowed = ", ".join(["auto", *(n for n, there in found.items() if there)])
        raise ProjectError(
            f"{key} = {name!r}: torch finds no such device on this machine; allowed here: {allowed}"
        )
    return (
        torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
    )


def fits(rows: Examples, device: torch.device) -> bool:
    """Whether the rows take at most `MOST_OF_MEMORY` of the device's free memory."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    # Memory that torch keeps for reuse counts as used there.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return rows.nbytes <= MOST_OF_MEMORY * free


def streamed(batches: Iterable[Examples], device: torch.device) -> Iterator[Examples]:
    """The batches, all with the same tables of vectors, on the device.

    To a CUDA device a batch is copied from pinned memory while the one before it is trained on.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    tables: tuple[Tensor, ...] | None = None  # copied once
    copies = torch.cuda.Stream(device)
    waiting: tuple[Examples, torch.cuda.Event] | None = None
    for batch in batches:
        if tables is None:
            tables = tuple(table.to(device) for table in batch.tables)
        pinned = replace(batch, tables=()).pinned()
        with torch.cuda.stream(copies):
            moved = replace(pinned.to(device, non_blocking=True), tables=tables)
            done = copies.record_event()
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = moved, done
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(rows: Examples, done: torch.cuda.Event) -> Examples:
    """The rows once they have been copied; their memory is not reused before they are read."""
    stream = torch.cuda.current_stream()
    stream.wait_event(done)
    for tensor in rows.tensors:
        tensor.record_stream(stream)
    return rows


@dataclass
class GraphedStep:
    """A training step that is replayed as one CUDA graph for batches of one size.

    A step of a small network consists of some hundred kernels that take less time than their
    launches. A graph launches all of them at once. The first steps run one kernel after the other.

    Args:
        step: trains on a batch; it must not depend on values on the CPU, nor make shapes from
            values on the device.
        rows: of a batch; a smaller one is trained without the graph.
    """

    step: Callable[[Examples], None]
    rows: int
    _eager: int = 0
    _batch: Examples | None = None
    _graph: torch.cuda.CUDAGraph | None = None
    _side: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)

    def __call__(self, batch: Examples) -> None:
        if len(batch) != self.rows:
            self.step(batch)
            return
        if self._eager < EAGER_STEPS:
            self._eager += 1
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self.step(batch)
            torch.cuda.current_stream().wait_stream(self._side)
            return
        if self._graph is None or self._batch is None:
            self._batch = batch.changed(Tensor.clone)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.step(self._batch)
        for target, source in zip(self._batch.tensors, batch.tensors, strict=True):
            target.copy_(source)
        self._graph.replay()
