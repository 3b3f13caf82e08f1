"""The suite's trainings side by side: one process each, a few threads each.

Small batches leave most of a machine idle: at 256 rows a second thread adds little, a second
training adds all. Workers are started fresh (never forked, which OpenMP does not survive), read
the examples once from a file, and end by themselves when the night is killed.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
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
        processes: how many at a time.
        threads: of torch, in each.
        on_epoch: told each epoch of each job, from a thread of this process.
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
            processes, context, initializer=_begin, initargs=(str(file), threads, os.getpid(), news)
        )
        try:
            found = [pool.submit(_run, job) for job in jobs]
            return [pickle.loads(each.result()) for each in found]
        finally:
            pool.shutdown(cancel_futures=True)
            news.put(None)
            listener.join()


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
