"""Does a saved ranker serve? Loaded in a fresh process, timed, and its scores compared.

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

MEASURED_ROWS = 20_000


@dataclass(frozen=True)
class Serving:
    """What a fresh process found.

    Attributes:
        failed: why it could not score, or how its scores differ, or None.
        seconds_per_million: to score a million raw rows with features, without loading: the
            fastest of three times at least `MEASURED_ROWS` rows.
    """

    megabytes: float
    seconds_per_million: float
    failed: str | None = None


def try_serving(folder: Path, rows: pl.DataFrame, expected: pl.DataFrame) -> Serving:
    """Score `rows` with the artifact in `folder` in a new Python process.

    Args:
        rows: raw feature rows.
        expected: what the model gave for them in this process.
    """
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "rows.parquet", Path(place) / "scores.parquet"
        rows.write_parquet(given)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "mtl_ranker.ranking.load_test",
                str(folder),
                str(given),
                str(made),
            ],
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return Serving(size, 0.0, last)
        scores = pl.read_parquet(made)
    speed = json.loads(done.stdout.splitlines()[-1])["seconds_per_million"]
    failed = None
    if scores.columns != expected.columns or scores.height != expected.height:
        failed = f"it gave {scores.shape} with {scores.columns} instead of {expected.shape}"
    elif not np.allclose(scores.to_numpy(), expected.to_numpy(), rtol=1e-4, atol=1e-6):
        worst = float(np.abs(scores.to_numpy() - expected.to_numpy()).max())
        failed = f"its scores differ by up to {worst:.2g} from those in training"
    return Serving(size, speed, failed)


def main(folder: str, rows: str, made: str) -> None:
    from mtl_ranker.ranking.artifact import RankerArtifact

    artifact, frame = RankerArtifact.load(Path(folder)), pl.read_parquet(rows)
    artifact.predict(frame).write_parquet(made)
    # What a call costs whatever its size must not be taken for the cost of a row.
    many = pl.concat([frame] * -(-MEASURED_ROWS // max(frame.height, 1)))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        artifact.predict(many)
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds_per_million": 1e6 * min(seconds) / max(many.height, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
