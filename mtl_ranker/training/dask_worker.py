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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
        work: pickled function that is called with a folder for temporary files and a job, as bytes,
            and with a function for reports; it returns bytes.
        threads: `training.threads`; None to share the worker's cores among its trainings.
        device: `training.device`.
    """

    def __init__(self, work: bytes, threads: int | None, device: str) -> None:
        self._work, self._threads, self._device = work, threads, device
        self._version = __version__  # of the night

    async def setup(self, worker: Worker) -> None:
        """Raises ProjectError on a worker that cannot train, and without `training.device`."""
        self._guard, self._idle, self._busy = threading.Lock(), list[Child](), set[Child]()
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

    def run(self, job: bytes, report: Any) -> bytes:
        """The result of a job. Raises what it raises, and ChildProcessError if its process ends."""
        with self._guard:
            child = self._idle.pop() if self._idle else Child(self._file, self._threads or 1)
            self._busy.add(child)
        try:
            return child.run((self._folder / uuid.uuid4().hex, job), report)
        finally:
            with self._guard:
                if child in self._busy and child.runs:
                    self._idle.append(child)
                self._busy.discard(child)

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


def run_on_worker(place: Place, number: int, job: bytes) -> tuple[str, bytes]:
    """A Dask task: run a job on this worker; its address and the job's result.

    The topic tells where the job with this number is started, and what it reports.
    """
    worker = get_worker()
    seats = worker.plugins[place.plugin]
    assert isinstance(seats, TrainingSeats)
    worker.log_event(place.topic, {"number": number, "started": worker.address})

    def report(content: Any) -> None:
        worker.log_event(place.topic, {"number": number, "report": content})

    return worker.address, seats.run(job, report)
