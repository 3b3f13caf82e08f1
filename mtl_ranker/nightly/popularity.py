"""Item popularity and the base rate as rankers: they serve until a trained model is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import torch

from mtl_ranker.config import Project
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.encoders import Encoder, Vocabulary
from mtl_ranker.models.objectives import Task, predictions, transform_labels
from mtl_ranker.models.presets import linear
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.training.network import build_ranker, start_at_prior, tasks_of

NAME = "item_popularity"
BASE_RATE = "base_rate"
SMOOTHING = 20.0  # prior impressions at the mean rate in an item's popularity
STEPS = 60  # of the bisection; halves an interval of 60 logits to below 1e-16


def smoothed_means(tasks: Sequence[Task], rows: pl.LazyFrame) -> pl.DataFrame:
    """Each item's mean label per objective, smoothed with the mean of all rows.

    (Σ y + 20 m) / (n + 20) for the n labelled rows of an item and the mean m of all rows.

    Returns V + 1 rows in the order of items: `item_id`, and a column per objective. The first row
    is of unknown items: null, and the means m.
    """
    labels = [pl.col(LABEL + task.name).cast(pl.Float64) for task in tasks]
    means = rows.select(label.mean() for label in labels).collect().row(0)
    known = [0.0 if mean is None else mean for mean in means]
    per_item = [
        ((label.sum() + SMOOTHING * mean) / (label.count() + SMOOTHING)).alias(task.name)
        for task, label, mean in zip(tasks, labels, known, strict=True)
    ]
    known_items = rows.filter(pl.col("item_id").is_not_null())
    items = known_items.group_by("item_id").agg(per_item).sort("item_id").collect()
    everything = dict(zip((task.name for task in tasks), known, strict=True))
    first = pl.DataFrame({"item_id": [None], **everything}, schema=items.schema)
    return pl.concat([first, items])


def fit_popularity(
    project: Project, rows: pl.LazyFrame, sql: Mapping[str, str] | None
) -> RankerArtifact:
    """A linear ranker over the item alone whose predictions are the items' smoothed means.

    Args:
        rows: examples of the training days.
        sql: see `RankerArtifact`.
    """
    tasks = tasks_of(project)
    means = smoothed_means(tasks, rows)
    encoder = Encoder(
        categoricals=[Vocabulary("item_id", means["item_id"][1:].to_list())],
        lists=[],
        numerics=[],
        edges=[],
        numeric_encoding=project.features.numeric_encoding,
        missing=[],
    )
    model = build_ranker(replace(linear(len(tasks)), embedding_dim=len(tasks)), encoder, tasks)
    labels = rows.select(
        pl.col(LABEL + task.name).cast(pl.Float32).fill_null(float("nan")) for task in tasks
    )
    start_at_prior(model, transform_labels(labels.collect().to_torch(), tasks), tasks)
    with torch.no_grad():
        model.towers.biases[0].zero_()
        model.towers.weights[0].copy_(torch.eye(len(tasks)).unsqueeze(1))
        wanted = means.select(task.name for task in tasks).to_numpy()
        model.embedding.table.weight.copy_(_logits(tasks, wanted, model.cutpoints))
    return RankerArtifact(project, encoder, tasks, model.eval(), sql=sql, fixed=True)


def fit_base_rate(
    project: Project, rows: pl.LazyFrame, sql: Mapping[str, str] | None
) -> RankerArtifact:
    """Popularity over no items: every prediction is the mean label of the rows.

    Args:
        rows: examples of the training days.
        sql: see `RankerArtifact`.
    """
    item = rows.collect_schema()["item_id"]
    return fit_popularity(project, rows.with_columns(item_id=pl.lit(None, item)), sql)


def name_of(baseline: RankerArtifact) -> str:
    """`BASE_RATE` for a ranker of `fit_base_rate`, `NAME` for one of `fit_popularity`."""
    return NAME if baseline.encoder.categoricals[0].values else BASE_RATE


def _logits(
    tasks: Sequence[Task], wanted: np.ndarray, cutpoints: torch.Tensor | None
) -> torch.Tensor:
    """Logits [V, T] whose predictions are `wanted` [V, T], by bisection.

    Every prediction ascends with its own logit. Objectives that others are conditional on come
    first, as their probability is a factor of the others' predictions.
    """
    low = np.full(wanted.shape, -30.0)
    high = -low
    depth = {task.name: 0 for task in tasks}
    parents = {task.name: task.conditional_on for task in tasks}
    for name in depth:
        above = parents[name]
        while above is not None:
            depth[name] += 1
            above = parents[above]
    for level in sorted(set(depth.values())):
        own = [t for t, task in enumerate(tasks) if depth[task.name] == level]
        for _ in range(STEPS):
            middle = (low + high) / 2
            value = predictions(torch.from_numpy(middle), tasks, cutpoints).numpy()
            less = value[:, own] < wanted[:, own]
            low[:, own] = np.where(less, middle[:, own], low[:, own])
            high[:, own] = np.where(less, high[:, own], middle[:, own])
    return torch.from_numpy((low + high) / 2).float()
