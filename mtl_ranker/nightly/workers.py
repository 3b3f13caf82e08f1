"""The trainer for a Dask cluster: each training of a night is a task of a worker.

A worker reads the examples from the workspace, which is a folder that all hosts share or an address
of a store. What is sent to it is the encoder, the settings and the job; what comes back is the
trained contender. A training whose worker is lost is started on another one and resumed from its
checkpoint in the workspace.
"""

from __future__ import annotations

import io
import pickle
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distributed import Client, Future, KilledWorker

from mtl_ranker import __version__
from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError, counted, first_line
from mtl_ranker.nightly.trainers import Job, Running
from mtl_ranker.training.dask_worker import (
    SEAT,
    Place,
    TrainingSeats,
    about_worker,
    lacking,
    run_on_worker,
)
from mtl_ranker.training.dataset import Dataset, with_rows, without_rows
from mtl_ranker.training.distributed import SINGLE_PROCESS
from mtl_ranker.training.process_pool import PROTOCOL
from mtl_ranker.training.state import Epoch
from mtl_ranker.workspace import fingerprint

PATIENCE = 60.0  # seconds for a scheduler to answer and a first worker to be there
LOOK = 3.0  # seconds after which workers are looked at again
MOST_STARTS = 4  # of a training whose process ends before it, as Dask has it for lost workers


@contextmanager
def workers_of(
    address: str, announce: Callable[[str], None] = lambda message: None
) -> Iterator[DaskWorkers]:
    """The trainer for the cluster at a scheduler's address, while the block runs.

    Args:
        announce: called with a sentence for each training that has ended: where it ran.

    Raises ProjectError as `connected` does.
    """
    with connected(address) as client:
        trainer = DaskWorkers(client, announce)
        try:
            yield trainer
        finally:
            trainer.close()


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the cluster at a scheduler's address, whose workers can train.

    Raises ProjectError if the scheduler does not answer, without a worker, and for a worker without
    torch or with another version of this package.
    """
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ProjectError(
            f"--cluster {address}: no scheduler answers: {first_line(error)}"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            raise ProjectError(
                f"--cluster {address}: there is no worker; start one with `dask worker {address}`"
            ) from error
        refuse_workers(address, client.run(about_worker, on_error="return"))
        yield client


def refuse_workers(cluster: str, workers: Mapping[str, Any]) -> None:
    """Raise ProjectError naming each worker that cannot train.

    Args:
        workers: address → what `about_worker` returned, or the error that it raised.
    """
    problems = []
    for address, found in workers.items():
        if isinstance(found, BaseException):
            problems.append(f"worker {address} cannot import mtl_ranker: {first_line(found)}")
        elif lack := lacking(found, __version__):
            problems.append(f"worker {address} {lack}")
    if problems:
        raise ProjectError(
            f"--cluster {cluster}: {'; '.join(problems)}; allowed: workers with torch and "
            f"mtl_ranker {__version__}, as on this host"
        )


class DaskWorkers:
    """Runs jobs on the workers of a cluster, each when a worker has room for it."""

    world, elsewhere = SINGLE_PROCESS, True

    def __init__(self, client: Client, announce: Callable[[str], None]) -> None:
        self._client, self._announce = client, announce
        self._place: Place | None = None
        self._trained: tuple[Project, Dataset] | None = None  # what workers train on there
        self._done = threading.Event()  # a task has ended
        self._jobs: list[Job] = []
        self._starts: dict[int, list[str]] = {}  # number of a job → workers that started it

    def run(self, project: Project, dataset: Dataset, jobs: Sequence[Job]) -> list[Any]:
        """The jobs' results in order.

        Raises what a job raises, and ProjectError when `MOST_STARTS` workers were lost with it.
        """
        if not jobs:
            return []
        place, known = self._prepare(project, dataset), _known(dataset)
        first = len(self._jobs)
        self._jobs += jobs
        waiting, results = list(range(first, len(self._jobs))), dict[int, bytes]()
        running: dict[Future, int] = {}  # future → number of its job
        unplaced: set[Future] = set()
        try:
            while waiting or running:
                while waiting and len(running) < max(1, self._room()):
                    number = waiting.pop(0)
                    running[self._submit(place, number, known)] = number
                ended = self._ended(running)
                for future in ended:
                    number = running.pop(future)
                    result = self._result(number, future)
                    if result is None:
                        waiting.insert(0, number)
                    else:
                        results[number] = result
                # Dask gives a task that lost its worker to none whose room is made known later.
                before, unplaced = unplaced, set() if ended else self._unplaced(running)
                for future in before & unplaced:
                    waiting.insert(0, running.pop(future))
                    future.cancel()
        except BaseException:
            self._client.cancel(list(running))
            raise
        return [_loaded(results[number], known) for number in range(first, first + len(jobs))]

    def _submit(self, place: Place, number: int, known: Mapping[str, object]) -> Future:
        future = self._client.submit(
            run_on_worker,
            place,
            number,
            _dumped(self._jobs[number].work, known),
            key=f"training-{uuid.uuid4().hex}",
            resources={SEAT: 1},
        )
        future.add_done_callback(lambda ended: self._done.set())
        return future

    def _ended(self, running: Collection[Future]) -> set[Future]:
        """Those that have ended, of which there may be none after `LOOK` seconds."""
        self._done.wait(LOOK)
        self._done.clear()
        return {future for future in running if future.done()}

    def _result(self, number: int, future: Future) -> bytes | None:
        """The result of a job that has ended; None if it has to be started again."""
        try:
            worker, result = future.result(timeout=PATIENCE)
        except TimeoutError:
            if future.status == "error":  # the job's own
                raise
            future.cancel()  # its worker was lost before it sent the result
            return None
        except ChildProcessError:
            if len(self._starts.get(number, [])) >= MOST_STARTS:
                raise
            return None
        except KilledWorker as lost:
            raise ProjectError(
                f"{self._jobs[number].name}: {counted(MOST_STARTS, 'worker')} were lost while "
                "they trained it; their logs say why (memory, most often)"
            ) from lost
        self._tell(number, worker)
        return result

    def _unplaced(self, running: Collection[Future]) -> set[Future]:
        """Tasks that no worker has, if a worker has room."""
        if not self._room():
            return set()
        placed = {key for keys in self._client.processing().values() for key in keys}
        return {future for future in running if not future.done() and future.key not in placed}

    def close(self) -> None:
        """End what runs on the workers for this trainer, and remove its files there."""
        if self._place is not None:
            self._client.unsubscribe_topic(self._place.topic)
            # Another night on the same workspace has replaced the plugin by its own.
            with suppress(ValueError):
                self._client.unregister_worker_plugin(self._place.plugin)
        self._place = self._trained = None

    def _prepare(self, project: Project, dataset: Dataset) -> Place:
        """Send the workers, also those that come later, what they need to read the dataset."""
        if self._place is not None and self._trained is not None:
            if self._trained[0] is project and self._trained[1] is dataset:
                return self._place
            self.close()
        work = pickle.dumps(WorkerJobs(project, without_rows(dataset)), PROTOCOL)
        seats = TrainingSeats(work, project.training.threads, project.training.device)
        # The plugin of the workspace's run before this one, if that was killed, is replaced.
        where = fingerprint(dataset.workspace.where())
        place = Place(f"mtl-ranker-{where}", f"mtl-ranker-{uuid.uuid4().hex}")
        self._client.subscribe_topic(place.topic, self._hear)
        self._place, self._trained = place, (project, dataset)
        self._client.register_plugin(seats, place.plugin)
        return place

    def _room(self) -> int:
        """Trainings that fit on all workers."""
        workers = self._client.scheduler_info()["workers"].values()
        return int(sum(worker["resources"].get(SEAT, 0) for worker in workers))

    def _hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        """Take a report of a worker; called in the client's thread."""
        _, message = event
        number = message["number"]
        if "started" in message:
            self._starts.setdefault(number, []).append(message["started"])
        else:
            self._jobs[number].on_epoch(Epoch(**message["report"]))

    def _tell(self, number: int, worker: str) -> None:
        earlier = self._starts.get(number, [worker])[:-1]
        lost = f", after it was lost on {', '.join(earlier)}" if earlier else ""
        self._announce(f"{self._jobs[number].name} trained on {worker}{lost}")


class WorkerJobs:
    """What a training process of a worker computes: jobs on one dataset, which it reads once.

    Args:
        dataset: of `without_rows`.
    """

    def __init__(self, project: Project, dataset: Dataset) -> None:
        self._project, self._dataset, self._read = project, dataset, False

    def __call__(self, message: tuple[Path, bytes], report: Callable[[Any], None]) -> bytes:
        scratch, job = message
        if not self._read:
            self._dataset, self._read = with_rows(self._dataset, scratch), True
        known = _known(self._dataset)
        work = _loaded(job, known)
        running = Running(lambda epoch: report(asdict(epoch)))
        return _dumped(work(self._project, self._dataset, running), known)


def _known(dataset: Dataset) -> dict[str, object]:
    """What both sides have, and is not sent: by name."""
    return {"encoder": dataset.encoder, "tables": dataset.encoder.tables}


def _dumped(content: Any, known: Mapping[str, object]) -> bytes:
    """The content pickled, with names in place of the known objects."""
    names = {id(value): name for name, value in known.items()}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> str | None:
            return names.get(id(obj))

    out = io.BytesIO()
    Pickler(out, PROTOCOL).dump(content)
    return out.getvalue()


def _loaded(content: bytes, known: Mapping[str, object]) -> Any:
    """The content of `_dumped`, with this side's known objects."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return known[pid]

    return Unpickler(io.BytesIO(content)).load()
