"""Precision of float32 matrix products, and blocks of rows computed on all cores."""

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

LARGE = 4_096  # rows of a block whose operations are divided among all cores

ENOUGH_ROWS = 1_024  # per core, for a block per core

# Of factors on which the CPU's kernels are tried: oneDNN chooses a kernel by the shapes.
PRODUCTS = (
    ((64, 64), (64, 64)),
    ((128, 1_024), (1_024, 1_024)),
    ((1_024, 512), (512, 16)),
    ((8, 16, 64), (8, 64, 1_024)),
)
MOST_ERROR = 2e-3  # about 1e-4 in float32, about 0.1 with factors in bfloat16

_LOCK = threading.Lock()

_inside, _before = 0, ""


@contextmanager
def fast_matmul(device: torch.device | None = None, rounded: bool = False) -> Iterator[None]:
    """Multiply float32 matrices at torch's precision "medium" where that does not round them.

    Torch then uses oneDNN's kernels instead of MKL's, which use only half of an AMD processor's
    vector width. On CPUs with bfloat16 units (AMX), oneDNN would round the factors at "medium", and
    torch's default is kept. The context manager is reentrant and can be used by several threads.
    A precision that the process has set is kept; `MTL_RANKER_MATMUL_PRECISION` (highest, high or
    medium) in the environment overrides the choice.

    Args:
        device: of the products; None for the CPU.
        rounded: on a CUDA device, round factors to 10 bits of fraction (TensorFloat-32, torch's
            precision "high"); sums keep 23. Enough for the steps of a training.

    Raises ValueError for another value of the environment variable.
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
                if device is not None and device.type == "cuda":
                    default = "high" if rounded else "highest"
                else:
                    default = "medium" if medium_is_exact() else "highest"
                torch.set_float32_matmul_precision(wanted or default)
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
    generator = torch.Generator().manual_seed(0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for shapes in PRODUCTS:
            a, b = (torch.randn(shape, generator=generator) for shape in shapes)
            if (a @ b - a.double() @ b.double()).abs().max() > MOST_ERROR:
                return False
    finally:
        torch.set_float32_matmul_precision(before)
    return True


def in_blocks(
    work: Callable[[slice], Tensor], rows: int, size: int, device: torch.device | None = None
) -> list[Tensor]:
    """Apply `work` to blocks of rows, in inference mode, on all cores.

    Small blocks, as of wide models (`size` is chosen so that a block fits a core's cache), are
    computed one per core, so that cores do not wait for each other at every operation. Large ones
    (LARGE rows or more, of narrow models) are computed one after the other, with each operation
    divided among the cores: there the interpreter's time between operations dominates, and threads
    of Python would take it in turn.

    Args:
        work: called with the slice of rows of a block.
        rows: N, all rows.
        size: rows per block and core.
        device: that `work` computes on; on others than the CPU, one block follows the other.

    Returns the blocks' results in order; one of no rows for N = 0.
    """
    cores = torch.get_num_threads() if device is None or device.type == "cpu" else 1
    divide_operations = size >= LARGE
    count = max(1, math.ceil(rows / (size * cores if divide_operations else size)))
    if not divide_operations and rows >= cores * ENOUGH_ROWS:
        count = math.ceil(count / cores) * cores
    size = max(1, math.ceil(rows / count))
    blocks = [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]

    @torch.inference_mode()
    def compute(block: slice) -> Tensor:
        return work(block)

    def compute_on_one_core(block: slice) -> Tensor:
        torch.set_num_threads(1)  # of this thread of Python
        return compute(block)

    with fast_matmul(device):
        if divide_operations or cores == 1 or len(blocks) == 1:
            return [compute(block) for block in blocks]
        try:
            with ThreadPoolExecutor(min(cores, len(blocks))) as pool:
                return list(pool.map(compute_on_one_core, blocks))
        finally:
            torch.set_num_threads(cores)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
