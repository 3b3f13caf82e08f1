"""Where the trainings of a night run: in this process, in several of this host, or elsewhere.

A night hands out jobs: functions of the project and its dataset. A trainer runs them and returns
their results in order; results do not depend on the trainer, given the threads of a training
(`training.threads`). `nightly/workers.py` is the trainer for a Dask cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from mtl_ranker.config import Project
from mtl_ranker.models.matmul import cores
from mtl_ranker.training.dataset import Dataset
from mtl_ranker.training.device import device_of
from mtl_ranker.training.distributed import SINGLE_PROCESS, World
from mtl_ranker.training.process_pool import side_by_side
from mtl_ranker.training.state import Epoch

PARALLEL_FROM = 200_000  # rows x epochs of one training
USUAL_EPOCHS = 8  # after which early stopping ends most trainings, whatever the cap

Report = Callable[[Epoch], None]


@dataclass(frozen=True)
class Running:
    """What a job is given beside its data.

    Attributes:
        on_epoch: called with each epoch of its training.
        world: the processes among which every batch is divided.
    """

    on_epoch: Report = lambda epoch: None
    world: World = SINGLE_PROCESS


Work = Callable[[Project, Dataset, Running], Any]


@dataclass(frozen=True)
class Job:
    """A training of a night.

    Attributes:
        name: for messages.
        work: what is computed; pickled, as its result is, where it runs in another process.
        on_epoch: called in this process with its epochs, maybe from another thread.
        divisible: whether several processes may share its batches (`Running.world`).
    """

    name: str
    work: Work
    on_epoch: Report = lambda epoch: None
    divisible: bool = False


class Trainer(Protocol):
    """Runs the jobs of a night.

    Attributes:
        world: the processes that call this, each with the same jobs.
        elsewhere: whether jobs run on other hosts than this one.
    """

    world: World
    elsewhere: bool

    def run(self, project: Project, dataset: Dataset, jobs: Sequence[Job]) -> list[Any]:
        """The jobs' results in order. Raises what a job raises."""


class OneProcess:
    """Runs one job after the other, each in all processes of `world`."""

    elsewhere = False

    def __init__(self, world: World = SINGLE_PROCESS) -> None:
        self.world = world

    def run(self, project: Project, dataset: Dataset, jobs: Sequence[Job]) -> list[Any]:
        return [job.work(project, dataset, Running(job.on_epoch, self.world)) for job in jobs]


class ThisHost:
    """Runs jobs in `training.jobs` processes; by default in several if that is faster."""

    world, elsewhere = SINGLE_PROCESS, False

    def run(self, project: Project, dataset: Dataset, jobs: Sequence[Job]) -> list[Any]:
        available, before = cores(), torch.get_num_threads()
        most = project.training.jobs or (available if _parallel_is_faster(project, dataset) else 1)
        processes = max(1, min(len(jobs), most))
        threads = project.training.threads or max(1, min(before, available // processes))
        torch.set_num_threads(threads)
        try:
            if processes == 1:
                return OneProcess().run(project, dataset, jobs)
            work = partial(_run, project, dataset)
            return side_by_side(work, [(j.work, j.on_epoch) for j in jobs], processes, threads)
        finally:
            torch.set_num_threads(before)


THIS_HOST = ThisHost()


def _run(project: Project, dataset: Dataset, work: Work, on_epoch: Report) -> Any:
    return work(project, dataset, Running(on_epoch))


def _parallel_is_faster(project: Project, dataset: Dataset) -> bool:
    """Starting a process takes seconds, longer than a small training; a GPU is one for all."""
    on_cpu = device_of(project.training.device).type == "cpu"
    return (
        on_cpu and len(dataset.train) * min(project.training.epochs, USUAL_EPOCHS) >= PARALLEL_FROM
    )
