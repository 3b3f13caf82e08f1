"""Load a saved ranker in a fresh process, compare its scores and measure its speed.

Run as `python -m mtl_ranker.ranking.load_test FOLDER ROWS.parquet SCORES.parquet`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from mtl_ranker.ranking.artifact import TRAINING, RankerArtifact

MEASURED_ROWS = 20_000
LONGEST = 600  # seconds


@dataclass(frozen=True)
class Serving:
    """The result of scoring with a saved ranker in a fresh process.

    Attributes:
        megabytes: size of the artifact's files, without those that only a training reads.
        seconds_per_million: seconds to score a million raw feature rows, without loading, of the
            clock or of the CPU, whichever is less: the fastest of three runs of at least
            `MEASURED_ROWS` rows.
        failed: why it could not score, or how its scores differ, or None.
    """

    megabytes: float
    seconds_per_million: float
    failed: str | None = None


def try_serving(folder: Path, rows: pl.DataFrame, expected: pl.DataFrame) -> Serving:
    """Score `rows` with the artifact in `folder` in a new Python process.

    Args:
        rows: N raw feature rows.
        expected: their predictions in this process.
    """
    files = [file for file in folder.rglob("*") if file.is_file()]
    served = [file for file in files if file.relative_to(folder).parts[0] != TRAINING]
    size = sum(file.stat().st_size for file in served) / 1e6
    with tempfile.TemporaryDirectory() as scratch:
        input_file, output_file = Path(scratch) / "rows.parquet", Path(scratch) / "scores.parquet"
        rows.write_parquet(input_file)
        module = "mtl_ranker.ranking.load_test"
        try:
            process = subprocess.run(
                [sys.executable, "-m", module, str(folder), str(input_file), str(output_file)],
                capture_output=True,
                text=True,
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired:
            return Serving(size, 0.0, f"it did not score {rows.height:,} rows within {LONGEST} s")
        if process.returncode != 0:
            last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
            return Serving(size, 0.0, last_line)
        scores = pl.read_parquet(output_file)
    speed = json.loads(process.stdout.splitlines()[-1])["seconds_per_million"]
    failed = None
    if scores.columns != expected.columns or scores.height != expected.height:
        failed = f"it returned {scores.shape} with {scores.columns} instead of {expected.shape}"
    elif not np.allclose(scores.to_numpy(), expected.to_numpy(), rtol=1e-4, atol=1e-6):
        worst = float(np.abs(scores.to_numpy() - expected.to_numpy()).max())
        failed = f"its scores differ by up to {worst:.2g} from those in training"
    return Serving(size, speed, failed)


def main(folder: str, rows: str, scores: str) -> None:
    """Score the file `rows` into the file `scores`; print the speed as JSON."""
    artifact, frame = RankerArtifact.load(Path(folder)), pl.read_parquet(rows)
    artifact.predict(frame).write_parquet(scores)
    # Few rows would measure the fixed cost of a call instead of the cost per row.
    many = pl.concat([frame] * -(-MEASURED_ROWS // max(frame.height, 1)))
    seconds = []
    for _ in range(3):
        start, used = time.perf_counter(), time.process_time()
        artifact.predict(many)
        # On a busy machine the time of the CPU is the shorter one.
        seconds.append(min(time.perf_counter() - start, time.process_time() - used))
    print(json.dumps({"seconds_per_million": 1e6 * min(seconds) / max(many.height, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
