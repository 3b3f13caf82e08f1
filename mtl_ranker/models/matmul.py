"""How torch uses this machine: which kernels multiply matrices, and on which cores."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

PRECISION = "MTL_RANKER_MATMUL_PRECISION"

ALLOWED = ("highest", "high", "medium")

LARGE = 4_096  # rows of a block

ENOUGH_ROWS = 1_024  # for a core of its own

_LOCK = threading.Lock()

_inside, _before = 0, ""


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Within it, float32 matrices are multiplied at torch's precision "medium" where that is exact.

    Torch then takes oneDNN's kernels instead of MKL's, which use half of an AMD processor's vector
    width. On CPUs with bfloat16 units (AMX) oneDNN would round the factors at "medium", and torch's
    default stays. It can be entered by several threads and again inside itself. Whatever the
    process has set already stays, and `MTL_RANKER_MATMUL_PRECISION` (highest, high or medium) in
    the environment is taken as it is.
    """
    global _inside, _before
    wanted = os.environ.get(PRECISION)
    if wanted not in (None, *ALLOWED):
        raise ValueError(f"{PRECISION} = {wanted!r}; allowed: {', '.join(ALLOWED)}")
    with _LOCK:
        _inside += 1
        if _inside == 1:
            _before = torch.get_float32_matmul_precision()
            if _before == "highest":
                usual = "medium" if medium_is_exact() else "highest"
                torch.set_float32_matmul_precision(wanted or usual)
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                torch.set_float32_matmul_precision(_before)


@cache
def medium_is_exact() -> bool:
    """Whether this CPU multiplies float32 matrices at precision "medium" without rounding them."""
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = (a @ a - a.double() @ a.double()).abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    return bool(error < 1e-3)  # some 1e-5 in float32, some 0.1 with factors in bfloat16


def in_blocks(work: Callable[[slice], Tensor], rows: int, size: int) -> list[Tensor]:
    """`work` for blocks of rows, in inference mode, on all cores.

    Of wide models, whose blocks of `size` rows fill a core's cache, each core takes one block at a
    time: it does not wait for the others at every operation. Of narrow ones (LARGE rows and more)
    all cores divide each operation of one block of `size` rows a core: there the time between
    operations, which threads of Python would spend one after the other, counts most.

    Returns the blocks' results in order (one of no rows when there are none).
    """
    cores = torch.get_num_threads()
    together = size >= LARGE
    count = max(1, math.ceil(rows / (size * cores if together else size)))
    if not together and rows >= cores * ENOUGH_ROWS:
        count = math.ceil(count / cores) * cores
    size = max(1, math.ceil(rows / count))
    blocks = [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]

    @torch.inference_mode()
    def one(block: slice) -> Tensor:
        return work(block)

    def alone(block: slice) -> Tensor:
        torch.set_num_threads(1)  # of this thread of Python
        return one(block)

    with fast_matmul():
        if together or cores == 1 or len(blocks) == 1:
            return [one(block) for block in blocks]
        try:
            with ThreadPoolExecutor(min(cores, len(blocks))) as pool:
                return list(pool.map(alone, blocks))
        finally:
            torch.set_num_threads(cores)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
