"""Servers that a command starts, and that end with it, however it ends.

A server starts processes of its own, and a signal to its parent does not reach it. So a child is
given a process group, is asked to end when its parent dies (Linux: PR_SET_PDEATHSIG), and whatever
it leaves behind becomes a child of this process (Linux: PR_SET_CHILD_SUBREAPER), which ends it.
Elsewhere the signals and the process group remain: everything but SIGKILL of the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Loaded here, because a child between fork and exec must not import.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_STARTED: set[int] = set()  # children of `started`


class Ended(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Ended` for SIGINT, SIGTERM and SIGHUP once; later ones are ignored while ending."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    before = {each: signal.signal(each, stop) for each in ENDING}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def started(command: Sequence[str], grace: float = 10.0, **options: Any) -> Iterator[Any]:
    """A child process that ends, with all it has started, when the block or this process ends.

    Children that this process had before the block are left alone.

    Args:
        command: the program and its arguments.
        grace: seconds between SIGTERM and SIGKILL.
        options: of `subprocess.Popen`.
    """
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    parent = os.getpid()
    others = descendants(parent)

    def tied_to_parent() -> None:
        for each in ENDING:  # an ignored signal would stay ignored in the child
            signal.signal(each, signal.SIG_DFL)
        if _LIBC is not None:
            _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

    # A group of its own: Ctrl-C reaches this process, which then ends the child in order.
    process = subprocess.Popen(command, process_group=0, preexec_fn=tied_to_parent, **options)
    _STARTED.add(process.pid)
    try:
        yield process
    finally:
        end(process, grace, others)
        _STARTED.discard(process.pid)


def end(process: subprocess.Popen, grace: float, others: dict[int, str]) -> None:
    """End a child with its group and all that it has left to this process.

    Args:
        others: processes, with their start times, that neither the child nor its own have started.
    """
    left_alone = _STARTED | {pid for pid, start in others.items() if _runs(pid, start)}
    known = descendants(process.pid) | descendants(os.getpid(), without=left_alone)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + (min(grace, 3.0) if number == signal.SIGTERM else 10.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        for pid in _left(known):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while (process.poll() is None or _left(known)) and time.monotonic() < deadline:
            time.sleep(0.05)


def call(command: Sequence[str], grace: float = 10.0) -> int:
    """Run a command until it or this process is asked to end; its exit code, or 128 + signal."""
    try:
        with ended_by_signals(), started(command, grace) as process:
            return exit_code(process.wait())
    except Ended as ended:
        return exit_code(-ended.number)


def exit_code(returned: int) -> int:
    """As a shell has it: 128 + the number of the signal that ended a process."""
    return returned if returned >= 0 else 128 - returned


def descendants(root: int, without: Collection[int] = ()) -> dict[int, str]:
    """Processes that `root` has started, directly or not, with their start times; {} without /proc.

    A process number is given again after its process has ended; with the start time it is unique.
    Processes in `without`, and what they have started, are left out.
    """
    children: dict[int, list[tuple[int, str]]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if (fields := _fields(int(folder.name))) is not None:
            children.setdefault(int(fields[1]), []).append((int(folder.name), fields[19]))
    found: dict[int, str] = {}
    waiting = [root]
    while waiting:
        fresh = {pid: start for pid, start in children.get(waiting.pop(), []) if pid not in without}
        found |= fresh
        waiting += fresh
    return found


def _left(known: dict[int, str]) -> list[int]:
    """Those of the known processes that still run, with what they have started since."""
    for pid, start in list(known.items()):
        with contextlib.suppress(ChildProcessError):  # an orphan that this process inherited
            os.waitpid(pid, os.WNOHANG)
        if _runs(pid, start):
            known |= descendants(pid)
        else:
            del known[pid]
    return list(known)


def _runs(pid: int, start: str) -> bool:
    fields = _fields(pid)
    return fields is not None and fields[19] == start and fields[0] != "Z"


def _fields(pid: int) -> list[str] | None:
    """State, parent, …, start time of a process: /proc/PID/stat from its third field on."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
