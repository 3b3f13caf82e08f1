"""Run jobs side by side in several processes with a few threads each.

Small batches do not use all cores: at 256 rows a second thread gains little, but a second training
runs at full speed. Processes are started anew, since OpenMP does not work in forked ones. They read
the data once from a file, and exit when their parent is killed. As they take seconds to start, the
parent works on jobs meanwhile.

A process is started by `subprocess`: a Dask worker with a nanny is a daemon of multiprocessing,
which may not start others of it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Report = Callable[[Any], None]
REPORTED, DONE, FAILED = range(3)  # kinds of a child's messages
PROTOCOL = 5  # of pickle


class Child:
    """A process with torch's random numbers and threads for itself, which runs one job at a time.

    Args:
        work: file with the pickled function that it computes, `work(job, report)`.
        threads: of torch.
    """

    def __init__(self, work: Path, threads: int) -> None:
        code = f"from {__name__} import serve; serve()"
        path = os.pathsep.join(folder for folder in sys.path if folder)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(work), str(threads), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )

    @property
    def runs(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def run(self, job: Any, report: Report) -> Any:
        """Compute `work(job, report)`; job, reports and result are pickled.

        Raises what it raises, and ChildProcessError if the process ends before it.
        """
        kind, content = self._next_message(pickle.dumps(job, PROTOCOL))
        while kind == REPORTED:
            report(content)
            kind, content = self._next_message()
        if kind == FAILED:
            raise content
        return content

    def _next_message(self, sent: bytes = b"") -> tuple[int, Any]:
        """The next message of the process, after it was sent some bytes."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(sent)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as lost:
            code = process.wait()
            raise ChildProcessError(f"a training process ended (exit code {code})") from lost

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError, ValueError):  # bytes for a process that has ended
                    pipe.close()


def side_by_side(
    work: Callable[[Any, Report], Any],
    jobs: Sequence[tuple[Any, Report]],
    processes: int,
    threads: int,
) -> list[Any]:
    """Compute `work(job, report)` for every job; return the results in the jobs' order.

    Args:
        work: pickled once for all processes; results are pickled too.
        jobs: each with a function that is called with its reports, from threads of this process.
        processes: including this one, at least 2.
        threads: of torch in each other process; those of this process are not changed.
    """
    # Other processes take jobs from the left, this process from the right.
    waiting, results = deque(range(len(jobs))), dict[int, Any]()

    def feed(child: Child) -> None:
        while (number := _next(waiting.popleft)) is not None:
            results[number] = child.run(*jobs[number])

    with tempfile.TemporaryDirectory(prefix="mtl-ranker-") as folder:
        file = Path(folder) / "work.pickle"
        with open(file, "wb") as out:
            pickle.dump(work, out, PROTOCOL)
        children = [Child(file, threads) for _ in range(processes - 1)]
        try:
            with ThreadPoolExecutor(processes - 1) as feeders:
                futures = [feeders.submit(feed, child) for child in children]
                try:
                    # This process works too, also while the others are still importing torch.
                    while (number := _next(waiting.pop)) is not None:
                        results[number] = work(*jobs[number])
                except BaseException:
                    waiting.clear()
                    for child in children:
                        child.close()
                    raise
                for future in futures:
                    future.result()
        finally:
            for child in children:
                child.close()
    return [results[number] for number in range(len(jobs))]


def _next(pop: Callable[[], int]) -> int | None:
    """The next job's number, or None when none is left."""
    try:
        return pop()
    except IndexError:
        return None


def serve() -> None:
    """The main function of a `Child`: file of the work, number of threads, its parent's number."""
    file, threads, parent = sys.argv[1:]
    threading.Thread(target=_exit_with_parent, args=(int(parent),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    jobs, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the work prints is no message

    def send(kind: int, content: Any) -> None:
        results.write(pickle.dumps((kind, content), PROTOCOL))
        results.flush()

    import torch

    torch.set_num_threads(int(threads))
    with open(file, "rb") as pickled:
        work = pickle.load(pickled)
    while True:
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        try:
            result = work(job, lambda content: send(REPORTED, content))
        except Exception as error:
            error.add_note(f"in a training process:\n{traceback.format_exc()}")
            send(FAILED, error)
        else:
            send(DONE, result)


def _exit_with_parent(parent: int) -> None:
    """Exit this process when its parent is killed; otherwise it would train for nobody."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
