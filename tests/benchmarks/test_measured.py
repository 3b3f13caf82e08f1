"""The memory of a stage is its own, not that of the process that started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_peak_is_not_that_of_the_parent():
    held = np.ones(40_000_000)  # 320 MB
    code = "from benchmarks.measured import peak_mb; print(peak_mb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 5 < float(done.stdout) < held.nbytes / 1e6 / 2
