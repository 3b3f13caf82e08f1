"""What a Dask worker does for the trainings of a night.

A training runs in a process of its own (`process_pool.Child`), as torch's random numbers and number
of threads are those of a process, and a worker has one process for all its threads. These
processes keep the night's rows for their next training.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distributed import Worker, WorkerPlugin, get_worker

from mtl_ranker import __version__
from mtl_ranker.errors import ProjectError
from mtl_ranker.training.process_pool import Child

SEAT = "mtl_ranker_training"  # Dask's resource: a worker has as many as trainings fit


def about_worker() -> tuple[str, bool]:
    """The version of this package, and whether torch is installed."""
    try:
        return __version__, find_spec("torch") is not None
    except ModuleNotFoundError:
        return __version__, False


def lacking(about: tuple[str, bool], version: str) -> str:
    """Why a worker cannot train for a night of this version, by `about_worker`; empty if it can."""
    found, has_torch = about
    if found != version:
        return f"has mtl_ranker {found}"
    return "" if has_torch else "lacks torch"


class TrainingSeats(WorkerPlugin):
    """The trainings of a night on a worker; Dask gives it to later workers too.

    N threads of the worker are N trainings at a time with `training.threads` = 1, N / 2 with 2, at
    least one. A worker with a GPU has one training at a time.

    Args:
        work: pickled function that is called with a folder for temporary files, a job as bytes and
            its `RankPlace`, and with a function for reports; it returns bytes.
        threads: `training.threads`; None to share the worker's cores among its trainings.
        device: `training.device`.
    """

    def __init__(self, work: bytes, threads: int | None, device: str) -> None:
        self._work, self._threads, self._device = work, threads, device
        self._version = __version__  # of the night

    async def setup(self, worker: Worker) -> None:
        """Raises ProjectError on a worker that cannot train, and without `training.device`."""
        self._guard, self._idle = threading.Lock(), list[Child]()
        self._busy: dict[Child, str] = {}  # process → the training that it runs
        self._folder = Path(tempfile.mkdtemp(prefix="training-", dir=worker.local_directory))
        self._file = self._folder / "work.pickle"
        self._file.write_bytes(self._work)
        if lack := lacking(about_worker(), self._version):
            raise ProjectError(f"worker {worker.address} cannot train: it {lack}")
        seats, self._threads = await asyncio.to_thread(self._fitting, worker.state.nthreads)
        await worker.set_resources(**{SEAT: seats})

    def _fitting(self, threads: int) -> tuple[int, int]:
        """Trainings at a time on a worker with some threads, and torch's threads of each."""
        from mtl_ranker.models.matmul import cores
        from mtl_ranker.training.device import device_of

        on_cpu = device_of(self._device).type == "cpu"
        seats = max(1, threads // (self._threads or 1)) if on_cpu else 1
        return seats, self._threads or max(1, cores() // seats)

    def run(self, training: str, message: Any, report: Any) -> bytes:
        """The result of a message. Raises what the work raises, and ChildProcessError if its
        process ends."""
        with self._guard:
            child = self._idle.pop() if self._idle else Child(self._file, self._threads or 1)
            self._busy[child] = training
        try:
            return child.run((self._folder / uuid.uuid4().hex, *message), report)
        finally:
            with self._guard:
                if self._busy.pop(child, None) is not None and child.runs:
                    self._idle.append(child)

    def stop(self, training: str) -> None:
        """End the processes that run this training."""
        with self._guard:
            for child in [child for child, name in self._busy.items() if name == training]:
                del self._busy[child]
                child.close()

    def teardown(self, worker: Worker) -> None:
        """End the processes, whatever they do, and remove their files."""
        with self._guard:
            for child in [*self._idle, *self._busy]:
                child.close()
            self._idle.clear()
            self._busy.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class Place:
    """Where the trainings of a night are on each worker, and where they report.

    Attributes:
        plugin: name of the worker's `TrainingSeats`.
        topic: of Dask's events.
    """

    plugin: str
    topic: str


@dataclass(frozen=True)
class Share:
    """What a task computes of a training: one of its ranks.

    Attributes:
        training: name of this start of the training.
        rank, size, store: see `RankPlace`.
    """

    training: str
    rank: int = 0
    size: int = 1
    store: tuple[str, int] | None = None


def run_on_worker(place: Place, share: Share, job: bytes) -> tuple[str, bytes]:
    """A Dask task: run a share of a job on this worker; its address and the job's result.

    The topic tells where each rank is started, and what rank 0 reports.
    """
    from mtl_ranker.training.distributed import RankPlace

    worker = get_worker()
    seats = worker.plugins[place.plugin]
    assert isinstance(seats, TrainingSeats)

    def report(content: Mapping[str, Any]) -> None:
        worker.log_event(place.topic, {"training": share.training, **content})

    report({"started": worker.address, "rank": share.rank})
    host = urlsplit(worker.address).hostname or ""
    rank = RankPlace(share.rank, share.size, host, share.store)
    return worker.address, seats.run(share.training, (job, rank), report)


def stop_on_worker(place: Place, training: str, dask_worker: Worker) -> None:
    """End what runs of this start of a training on a worker."""
    seats = dask_worker.plugins.get(place.plugin)
    if isinstance(seats, TrainingSeats):
        seats.stop(training)
