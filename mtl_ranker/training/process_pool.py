"""The suite's trainings side by side: one process each, a few threads each.

Small batches leave most of a machine idle: at 256 rows a second thread adds little, a second
training adds all. Workers are started fresh (never forked, which OpenMP does not survive), read
the examples once from a file, and end by themselves when the night is killed. They need seconds to
start; the process that starts them trains meanwhile.
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
_WORKER: dict[str, Any] = {}  # what a worker process was given


def side_by_side(
    work: Callable[[Any, Report], Any],
    jobs: Sequence[tuple[Any, Report]],
    processes: int,
    threads: int,
) -> list[Any]:
    """`work(job, report)` for every job, in the jobs' order.

    Args:
        work: pickled once with all that it holds; its results are pickled too.
        jobs: each with the function that is told its epochs, from threads of this process.
        processes: how many at a time, at least two, this one among them.
        threads: of torch, in each; this process has been given them already.
    """
    context = get_context("spawn")
    messages = context.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(messages, jobs), daemon=True)
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
        waiting = deque(range(len(jobs)))  # workers take from the left, this process from the right
        results: dict[int, Any] = {}

        def feed() -> None:
            while (number := _next(waiting.popleft)) is not None:
                done = pool.submit(_run_in_worker, number, jobs[number][0]).result()
                results[number] = pickle.loads(done)

        try:
            with ThreadPoolExecutor(processes - 1) as feeders:
                fed = [feeders.submit(feed) for _ in range(processes - 1)]
                try:
                    # This process works too, while workers are still importing torch.
                    while (number := _next(waiting.pop)) is not None:
                        results[number] = work(*jobs[number])
                finally:
                    waiting.clear()
                for each in fed:
                    each.result()
            return [results[number] for number in range(len(jobs))]
        finally:
            pool.shutdown(cancel_futures=True)
            messages.put(None)
            listener.join()


def _next(pop: Callable[[], int]) -> int | None:
    try:
        return pop()
    except IndexError:
        return None


def _listen(messages: Any, jobs: Sequence[tuple[Any, Report]]) -> None:
    while (message := messages.get()) is not None:
        number, epoch = message
        jobs[number][1](epoch)


def _start_worker(file: str, threads: int, parent: int, messages: Any) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    with open(file, "rb") as pickled:
        _WORKER["work"] = pickle.load(pickled)
    _WORKER["messages"] = messages


def _run_in_worker(number: int, job: Any) -> bytes:
    def report(epoch: Epoch) -> None:
        _WORKER["messages"].put((number, epoch))

    return pickle.dumps(_WORKER["work"](job, report), protocol=5)


def _end_with(parent: int) -> None:
    """End this worker when its parent is killed; it would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
