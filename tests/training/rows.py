"""Small rows and settings for tests of training: missing values, weights and positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from mtl_ranker.config import Features, Training
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.models.objectives import Task
from mtl_ranker.models.presets import make
from mtl_ranker.models.spec import RankerSpec

TASKS = [Task("click", "binary"), Task("seconds", "regression"), Task("like", "binary")]
LABELS = [LABEL + task.name for task in TASKS]
FEATURES = Features(
    categoricals=[{"column": "colour"}], lists=[{"column": "tags", "max_length": 3}], bins=4
)
NUMERICS = ["age", "rate"]


def frame(rows: int, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    age, colour = rng.normal(size=rows), rng.integers(0, 5, rows)
    click = (rng.random(rows) < 1 / (1 + np.exp(-age))).astype(np.float32)
    return pl.DataFrame(
        {
            "row": np.arange(rows),
            "colour": colour,
            "tags": [[f"t{n}" for n in range(c)] for c in colour],
            "age": np.where(rng.random(rows) < 0.1, np.nan, age),
            "rate": rng.random(rows),
            "position": rng.integers(0, 4, rows),
            "sample_weight": rng.random(rows).astype(np.float32) + 0.5,
            LABELS[0]: click,
            LABELS[1]: np.where(click > 0, age + colour, np.nan).astype(np.float32),
            LABELS[2]: np.where(click > 0, rng.random(rows) < 0.4, np.nan).astype(np.float32),
        }
    ).with_columns(pl.col(LABELS[1:]).fill_nan(None))


def with_list_loss(name: str, weight: float) -> list[Task]:
    """The binary objectives with this list loss."""
    return [
        replace(task, list_loss=name, list_weight=weight) if task.kind == "binary" else task
        for task in TASKS
    ]


def encoder(rows: pl.DataFrame) -> Encoder:
    return Encoder.fit(FEATURES, NUMERICS, rows)


def spec(**more: object) -> RankerSpec:
    settings = {"preset": "mmoe", "experts": 3, "expert_hidden": [8], "dropout": 0.2}
    return make("m", settings | more, len(TASKS))


def settings(**more: object) -> Training:
    given = {"batch_size": 64, "epochs": 3, "patience": 3, "learning_rate": 0.01}
    return Training(**(given | more))


def partitions(rows: pl.DataFrame, folder: Path, sizes: list[int], group: int = 50) -> list[Path]:
    """The rows in files of these sizes."""
    files, start = [], 0
    for number, size in enumerate(sizes):
        files.append(folder / f"{number}.parquet")
        rows.slice(start, size).write_parquet(files[-1], row_group_size=group)
        start += size
    assert start == rows.height
    return files
