"""Run jobs side by side in several processes with a few threads each.

Small batches do not use all cores: at 256 rows a second thread gains little, but a second training
runs at full speed. Workers are spawned, since OpenMP does not work in forked processes. They read
the data once from a file, and exit when their parent is killed. As they take seconds to start, the
parent works on jobs meanwhile.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mtl_ranker.training.state import Epoch

Report = Callable[[Epoch], None]
_WORKER: dict[str, Any] = {}  # state of a worker process, set by `_start_worker`


def side_by_side(
    work: Callable[[Any, Report], Any],
    jobs: Sequence[tuple[Any, Report]],
    processes: int,
    threads: int,
) -> list[Any]:
    """Compute `work(job, report)` for every job; return the results in the jobs' order.

    Args:
        work: pickled once for all workers; results are pickled too.
        jobs: each with a function that is called with its epochs, from threads of this process.
        processes: including this one, at least 2.
        threads: of torch in each worker; those of this process are not changed.
    """
    context = get_context("spawn")
    messages = context.SimpleQueue()
    listener = threading.Thread(target=_forward_reports, args=(messages, jobs), daemon=True)
    with tempfile.TemporaryDirectory(prefix="mtl-ranker-") as folder:
        file = Path(folder) / "work.pickle"
        with open(file, "wb") as out:
            pickle.dump(work, out, protocol=5)
        listener.start()
        pool = ProcessPoolExecutor(
            processes - 1,
            context,
            initializer=_start_worker,
            initargs=(str(file), threads, os.getpid(), messages),
        )
        # Workers take jobs from the left, this process from the right.
        waiting = deque(range(len(jobs)))
        results: dict[int, Any] = {}

        def feed() -> None:
            while (number := _next(waiting.popleft)) is not None:
                pickled = pool.submit(_run_in_worker, number, jobs[number][0]).result()
                results[number] = pickle.loads(pickled)

        try:
            with ThreadPoolExecutor(processes - 1) as feeders:
                futures = [feeders.submit(feed) for _ in range(processes - 1)]
                try:
                    # This process works too, also while workers are still importing torch.
                    while (number := _next(waiting.pop)) is not None:
                        results[number] = work(*jobs[number])
                finally:
                    waiting.clear()
                for future in futures:
                    future.result()
            return [results[number] for number in range(len(jobs))]
        finally:
            pool.shutdown(cancel_futures=True)
            messages.put(None)
            listener.join()


def _next(pop: Callable[[], int]) -> int | None:
    """The next job's number, or None when none is left."""
    try:
        return pop()
    except IndexError:
        return None


def _forward_reports(messages: Any, jobs: Sequence[tuple[Any, Report]]) -> None:
    """Call each job's function with the epochs that workers send, until a message of None."""
    while (message := messages.get()) is not None:
        number, epoch = message
        jobs[number][1](epoch)


def _start_worker(file: str, threads: int, parent: int, messages: Any) -> None:
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    with open(file, "rb") as pickled:
        _WORKER["work"] = pickle.load(pickled)
    _WORKER["messages"] = messages


def _run_in_worker(number: int, job: Any) -> bytes:
    def report(epoch: Epoch) -> None:
        _WORKER["messages"].put((number, epoch))

    return pickle.dumps(_WORKER["work"](job, report), protocol=5)


def _exit_with_parent(parent: int) -> None:
    """Exit this worker when its parent is killed; otherwise it would wait for jobs for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
