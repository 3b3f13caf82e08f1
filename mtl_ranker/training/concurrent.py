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
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mtl_ranker.training.loop import Epoch

Job = tuple[str, int]  # model and seed
_HERE: dict[str, Any] = {}  # what a worker process was given


def side_by_side(
    work: Callable[[Any, Job, Callable[[Epoch], None]], Any],
    given: Any,
    jobs: Sequence[Job],
    processes: int,
    threads: int,
    on_epoch: Callable[[str, int, Epoch], None],
) -> list[Any]:
    """`work(given, job, report)` for every job, in the jobs' order.

    Args:
        work: a function of a module; its result is pickled.
        given: what all jobs read; pickled once.
        processes: how many at a time, at least two, this one among them.
        threads: of torch, in each; this process has been given them already.
        on_epoch: told each epoch of each job, from threads of this process.
    """
    context = get_context("spawn")
    news = context.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(news, on_epoch), daemon=True)
    with tempfile.TemporaryDirectory(prefix="mtl-ranker-") as folder:
        file = Path(folder) / "given.pickle"
        with open(file, "wb") as out:
            pickle.dump((work, given), out, protocol=5)
        listener.start()
        pool = ProcessPoolExecutor(
            processes - 1,
            context,
            initializer=_begin,
            initargs=(str(file), threads, os.getpid(), news),
        )
        waiting = deque(range(len(jobs)))  # workers take from the left, this process from the right
        results: dict[int, Any] = {}

        def feed() -> None:
            while (number := _next(waiting.popleft)) is not None:
                results[number] = pickle.loads(pool.submit(_run, jobs[number]).result())

        try:
            with ThreadPoolExecutor(processes - 1) as feeders:
                fed = [feeders.submit(feed) for _ in range(processes - 1)]
                try:
                    # This process works too, while workers are still importing torch.
                    while (number := _next(waiting.pop)) is not None:
                        report = partial(on_epoch, *jobs[number])
                        results[number] = work(given, jobs[number], report)
                finally:
                    waiting.clear()
                for each in fed:
                    each.result()
            return [results[number] for number in range(len(jobs))]
        finally:
            pool.shutdown(cancel_futures=True)
            news.put(None)
            listener.join()


def _next(pop: Callable[[], int]) -> int | None:
    try:
        return pop()
    except IndexError:
        return None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _listen(news: Any, on_epoch: Callable[[str, int, Epoch], None]) -> None:
    while (said := news.get()) is not None:
        on_epoch(*said)


def _begin(file: str, threads: int, parent: int, news: Any) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    with open(file, "rb") as given:
        _HERE["work"], _HERE["given"] = pickle.load(given)
    _HERE["news"] = news


def _run(job: Job) -> bytes:
    def report(epoch: Epoch) -> None:
        _HERE["news"].put((*job, epoch))

    return pickle.dumps(_HERE["work"](_HERE["given"], job, report), protocol=5)


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
