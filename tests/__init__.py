"""Tests. Side by side there are as many processes as cores, so each has one thread.

polars reads its number of threads on import.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ.setdefault(name, "1")
