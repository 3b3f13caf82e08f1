"""The trainer for a Dask cluster: each training of a night is a task of a worker.

A worker reads the examples from the workspace, which is a folder that all hosts share or an address
of a store. What is sent to it is the encoder, the settings and the job; what comes back is the
trained contender. A training whose worker is lost is started on another one and resumed from its
checkpoint in the workspace. Where rows are many, several processes share the batches of a training
(training/distributed.py): the first one opens a store, whose address the others are given.
"""

from __future__ import annotations

import io
import math
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
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
    Share,
    TrainingSeats,
    about_worker,
    lacking,
    run_on_worker,
    stop_on_worker,
)
from mtl_ranker.training.dataset import Dataset, with_rows, without_rows
from mtl_ranker.training.distributed import (
    SINGLE_PROCESS,
    SUMMED,
    RankLost,
    RankPlace,
    joined,
    store_of,
)
from mtl_ranker.training.process_pool import PROTOCOL
from mtl_ranker.training.state import Epoch
from mtl_ranker.workspace import fingerprint

PATIENCE = 60.0  # seconds for a scheduler to answer and a first worker to be there
SEATED = 20.0  # seconds after which ranks that no worker has started are not waited for
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


@dataclass(eq=False)
class _Start:
    """A start of a job on the cluster.

    Attributes:
        number: of the job.
        size: processes that share its batches.
        training: name of this start.
        futures: of its ranks; of rank 0 alone until that has a store for the others.
        store: of rank 0, when it is known.
        submitted: when the last rank was, in seconds of `time.monotonic`.
        begun: for each rank the workers that started it.
        unplaced: futures that no worker had at the last look, though there was room.
        results: rank → worker and result.
        errors: rank → its error, or RankLost if its worker was lost.
        ending: when the first rank ended, or a rank was lost, in seconds of `time.monotonic`.
        stopped: whether its tasks are cancelled.
    """

    number: int
    size: int
    training: str
    futures: list[Future] = field(default_factory=list)
    store: tuple[str, int] | None = None
    submitted: float = math.inf
    begun: dict[int, list[str]] = field(default_factory=dict)
    unplaced: set[Future] = field(default_factory=set)
    results: dict[int, tuple[str, bytes]] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)
    ending: float | None = None
    stopped: bool = False

    def take(self) -> None:
        """Results and errors of the tasks that have ended since the last time."""
        for rank, future in enumerate(self.futures):
            if self.settled(rank) or not future.done():
                continue
            try:
                self.results[rank] = future.result(timeout=PATIENCE)
            except TimeoutError as error:
                if future.status == "error":  # the job's own
                    self.errors[rank] = error
                else:
                    self.errors[rank] = RankLost("the worker was lost before it sent the result")
                    future.cancel()
            except Exception as error:
                self.errors[rank] = error

    def settled(self, rank: int) -> bool:
        return rank in self.results or rank in self.errors

    def lost(self, workers: Callable[[], Collection[str]]) -> bool:
        """Whether a rank has failed, or was lost.

        Dask starts a lost task again by itself, which is of use to a single rank only.

        Args:
            workers: returns the addresses of those that there are.
        """
        if self.errors or self.size == 1:
            return bool(self.errors)
        present = workers()
        return any(
            len(places) > 1 or places[-1] not in present
            for rank, places in list(self.begun.items())  # the client's thread adds to it
            if rank not in self.results
        )

    @property
    def over(self) -> bool:
        """Whether nothing more is to come of it."""
        ranks = range(len(self.futures))
        return self.stopped or (
            (0 in self.results or bool(self.errors)) and all(self.settled(rank) for rank in ranks)
        )


class DaskWorkers:
    """Runs jobs on the workers of a cluster, each when a worker has room for it.

    With streamed rows several processes share the batches of a job that can be divided
    (`training.ranks`), on one worker or several.
    """

    world, elsewhere = SINGLE_PROCESS, True

    def __init__(self, client: Client, announce: Callable[[str], None]) -> None:
        self._client, self._announce = client, announce
        self._place: Place | None = None
        self._trained: tuple[Project, Dataset] | None = None  # what workers train on there
        self._changed = threading.Event()  # a task has ended, or a rank has reported its store
        self._jobs: list[Job] = []
        self._running: dict[str, _Start] = {}
        self._starts: dict[int, list[str]] = {}  # number of a job → workers of its first rank
        self._undivided: set[int] = set()  # numbers of jobs whose ranks did not find each other

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
        try:
            while waiting or self._running:
                while waiting and (size := self._size(project, dataset, waiting)):
                    self._start(place, waiting.pop(0), size, known)
                changed = self._changed.wait(LOOK)
                self._changed.clear()
                for start in list(self._running.values()):
                    self._continue(place, start, known)
                    if not changed and not start.stopped:
                        self._move(place, start)
                    if start.over:
                        del self._running[start.training]
                        result = self._result(start)
                        if result is None:
                            waiting.insert(0, start.number)
                        else:
                            results[start.number] = result
        except BaseException:
            self._client.cancel([f for start in self._running.values() for f in start.futures])
            self._running.clear()
            raise
        return [_loaded(results[number], known) for number in range(first, first + len(jobs))]

    def _size(self, project: Project, dataset: Dataset, waiting: Sequence[int]) -> int:
        """Processes for the next job that waits; 0 while there is no room for it."""
        number, settings, room = waiting[0], project.training, max(1, self._room())
        free = room - sum(start.size for start in self._running.values())
        if (
            dataset.shards is None
            or not self._jobs[number].divisible
            or settings.balancing not in SUMMED
            or number in self._undivided
        ):
            return min(1, max(0, free))
        wanted = min(settings.ranks or max(1, free // len(waiting)), room)
        return wanted if wanted <= free else 0

    def _start(self, place: Place, number: int, size: int, known: Mapping[str, object]) -> None:
        start = _Start(number, size, f"training-{uuid.uuid4().hex}")
        self._running[start.training] = start
        start.futures.append(self._submit(place, start, known))

    def _submit(self, place: Place, start: _Start, known: Mapping[str, object]) -> Future:
        """The next rank of a job."""
        rank = len(start.futures)
        share = Share(start.training, rank, start.size, start.store if rank else None)
        future = self._client.submit(
            run_on_worker,
            place,
            share,
            _dumped(self._jobs[start.number].work, known),
            key=f"{start.training}-{rank}",
            resources={SEAT: 1},
        )
        future.add_done_callback(lambda ended: self._changed.set())
        return future

    def _continue(self, place: Place, start: _Start, known: Mapping[str, object]) -> None:
        """Start the other ranks when the first one is there; end what is left of a start.

        The other ranks notice a lost one by themselves, mostly; and an error of a rank may come
        after those of the ranks that lost it.
        """
        start.take()
        lost = start.lost(self._workers)
        if start.store is not None and len(start.futures) == 1 < start.size and not lost:
            while len(start.futures) < start.size:
                start.futures.append(self._submit(place, start, known))
            start.submitted = time.monotonic()
        if (lost or 0 in start.results) and not start.over:
            start.ending = start.ending or time.monotonic()
            if time.monotonic() - start.ending > LOOK:
                self._stop(place, start)

    def _move(self, place: Place, start: _Start) -> None:
        """End a start with a task that no worker starts, so that its job is started again.

        Dask gives a task that lost its worker to none whose room is made known later. Ranks for
        which another night leaves no room would keep the others waiting; then one does the job.
        """
        before, start.unplaced = start.unplaced, self._unplaced(start)
        alone = len(start.begun) < start.size and time.monotonic() - start.submitted > SEATED
        if alone:
            self._undivided.add(start.number)
        if before & start.unplaced or alone:
            self._stop(place, start)

    def _stop(self, place: Place, start: _Start) -> None:
        """Cancel a start's tasks, and end their processes."""
        start.take()
        start.stopped = True
        self._client.cancel(start.futures)
        if start.size > 1:
            self._client.run(stop_on_worker, place, start.training, on_error="ignore")

    def _result(self, start: _Start) -> bytes | None:
        """The result of a start that is over; None if the job has to be started again.

        An error of a rank's own comes before those of ranks that have lost another.
        """
        number = start.number
        if 0 in start.results:
            self._tell(number, [start.results[rank][0] for rank in sorted(start.results)])
            return start.results[0][1]
        for error in start.errors.values():
            if isinstance(error, KilledWorker):
                raise self._lost(number) from error
            if not isinstance(error, ChildProcessError | RankLost | CancelledError):
                raise error
        if len(self._starts.get(number, [])) >= MOST_STARTS:
            raise self._lost(number) from next(iter(start.errors.values()), None)
        return None

    def _lost(self, number: int) -> ProjectError:
        return ProjectError(
            f"{self._jobs[number].name}: {counted(MOST_STARTS, 'worker')} were lost while they "
            "trained it; their logs say why (memory, most often)"
        )

    def _unplaced(self, start: _Start) -> set[Future]:
        """Tasks that no worker has, if a worker has room."""
        waiting = {future for future in start.futures if not future.done()}
        if not waiting or not self._room():
            return set()
        placed = {key for keys in self._client.processing().values() for key in keys}
        return {future for future in waiting if future.key not in placed}

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

    def _workers(self) -> set[str]:
        """Addresses of the workers that there are."""
        return set(self._client.scheduler_info()["workers"])

    def _room(self) -> int:
        """Trainings that fit on all workers."""
        workers = self._client.scheduler_info()["workers"].values()
        return int(sum(worker["resources"].get(SEAT, 0) for worker in workers))

    def _hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        """Take a report of a worker; called in the client's thread."""
        _, message = event
        start = self._running.get(message["training"])
        if start is None:
            return
        if "started" in message:
            start.begun.setdefault(message["rank"], []).append(message["started"])
            if message["rank"] == 0:
                self._starts.setdefault(start.number, []).append(message["started"])
        elif "store" in message:
            start.store = message["store"]
            self._changed.set()
        else:
            self._jobs[start.number].on_epoch(Epoch(**message["epoch"]))

    def _tell(self, number: int, workers: Sequence[str]) -> None:
        earlier = self._starts.get(number, workers)[:-1]
        lost = ""
        if earlier and len(workers) == 1:
            lost = f", after it was lost on {', '.join(earlier)}"
        elif earlier:
            lost = f", after it was started on {', '.join(earlier)} and lost a rank"
        self._announce(f"{self._jobs[number].name} trained on {' and '.join(workers)}{lost}")


class WorkerJobs:
    """What a training process of a worker computes: jobs on one dataset, which it reads once.

    Args:
        dataset: of `without_rows`.
    """

    def __init__(self, project: Project, dataset: Dataset) -> None:
        self._project, self._dataset, self._read = project, dataset, False

    def __call__(
        self, message: tuple[Path, bytes, RankPlace], report: Callable[[Any], None]
    ) -> bytes:
        scratch, job, place = message
        store = store_of(place)
        if store is not None and place.rank == 0:
            report({"store": (place.host, store.port)})
        if not self._read:
            self._dataset, self._read = with_rows(self._dataset, scratch), True
        known = _known(self._dataset)
        work = _loaded(job, known)

        def on_epoch(epoch: Epoch) -> None:
            if place.rank == 0:
                report({"epoch": asdict(epoch)})

        with joined(place, store, self._project.training.device) as world:
            result = work(self._project, self._dataset, Running(on_epoch, world))
        return _dumped(result, known) if place.rank == 0 else b""


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
