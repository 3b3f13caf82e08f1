"""Metrics on slices of the held-out rows, and the slice where the ranker is worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from mtl_ranker.evaluation.intervals import Interval, interval, quality_draws, user_draws
from mtl_ranker.evaluation.metrics import (
    PredictedRows,
    calibration_ratio,
    evaluate,
    quality_metric,
)
from mtl_ranker.models.objectives import Task

MAX_VALUES = 12  # of one context column; rarer values have no slice
MIN_POSITIVES = 10
RESAMPLES = 100


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The metrics of one objective on one slice of the rows.

    Attributes:
        kind: what the rows are divided by, such as `tab` or `user activity`.
        value: which of its values, such as `high third`.
        quality: AUC or R², with an interval from resampling users.
        gap: quality minus that of all rows.
        calibration: sum of predictions over sum of labels.
    """

    kind: str
    value: str
    objective: str
    rows: int
    positives: int
    quality: Interval
    gap: float
    gauc: float
    calibration: float

    def __str__(self) -> str:
        return (
            f"{self.objective} is worst where {self.kind} is {self.value}: {self.quality}, "
            f"{self.gap:+.4f} against all rows ({self.rows:,} rows)"
        )


def divide(
    frame: pl.DataFrame, context: Sequence[str], history: Mapping[str, str]
) -> dict[str, pl.Series]:
    """The slice of each of N rows, by kind of slice; null = none.

    Args:
        frame: N raw feature rows.
        context: context columns (surfaces); each of their most frequent values is a slice, except
            of lists.
        history: `user` and `item` → the feature column of its impressions per day; null (cold) if
            it has no impression in the longest window.
    """
    slices: dict[str, pl.Series] = {}
    for column in context:
        if frame.schema[column].is_nested():
            continue
        values = frame[column].cast(pl.String)
        counts = values.value_counts(sort=True).drop_nulls()
        frequent = counts[column].head(MAX_VALUES).to_list()
        slices[column] = values.set(~values.is_in(frequent), None)
    for entity, column in history.items():
        impressions = frame[column].cast(pl.Float64)
        # Without any value there is no quantile, and every row is cold.
        low, high = (impressions.quantile(q, "nearest") or 0.0 for q in (1 / 3, 2 / 3))
        kind = "user activity" if entity == "user" else f"{entity} exposure"
        slices[kind] = pl.select(
            pl.when(impressions.is_null())
            .then(pl.lit("cold (not seen in the window)"))
            .when(impressions <= low)
            .then(pl.lit("low third"))
            .when(impressions <= high)
            .then(pl.lit("middle third"))
            .otherwise(pl.lit("high third"))
            .alias(kind)
        ).to_series()
    if "item_age_days" in frame.columns:
        age = frame["item_age_days"].cast(pl.Float64)
        bands = [(1, "up to 1 day"), (7, "2 to 7 days"), (30, "8 to 30 days")]
        band: Any = pl.when(age.is_null()).then(pl.lit("unknown"))
        for upper, name in bands:
            band = band.when(age <= upper).then(pl.lit(name))
        slices["item age"] = pl.select(
            band.otherwise(pl.lit("over 30 days")).alias("item age")
        ).to_series()
    return slices


def slice_metrics(
    tasks: Sequence[Task],
    predicted: PredictedRows,
    slices: Mapping[str, pl.Series],
    confidence: float = 0.95,
) -> list[Slice]:
    """Each objective's metrics on each slice with at least `MIN_POSITIVES` positives and negatives.

    Objectives of another kind than binary need 2 · `MIN_POSITIVES` rows.

    Args:
        predicted: N rows.
        slices: kind of slice → the slice of each row [N], null = none (see `divide`).
    """
    metrics = []
    for t, task in enumerate(tasks):
        all_labels, all_predictions = predicted.labels[:, t], predicted.prediction[:, t]
        known = ~np.isnan(all_labels)
        overall = evaluate(task.kind, all_labels, all_predictions, predicted.user)
        measure = quality_metric(task.kind)
        for kind, values in slices.items():
            for value in values.unique().drop_nulls().sort().to_list():
                rows = (values == value).fill_null(False).to_numpy() & known
                label, prediction, user = (
                    all_labels[rows],
                    all_predictions[rows],
                    predicted.user[rows],
                )
                positives = int((label > 0.5).sum())
                negatives = len(label) - positives
                rarer = min(positives, negatives) if task.kind == "binary" else len(label) // 2
                if rarer < MIN_POSITIVES:
                    continue
                values_of_slice = evaluate(task.kind, label, prediction, user)
                draws = quality_draws(task.kind, label, prediction, user_draws(user, RESAMPLES))
                metrics.append(
                    Slice(
                        kind=kind,
                        value=value,
                        objective=task.name,
                        rows=len(label),
                        positives=positives,
                        quality=interval(values_of_slice[measure], draws, confidence),
                        gap=values_of_slice[measure] - overall[measure],
                        gauc=values_of_slice.get("gauc", float("nan")),
                        calibration=calibration_ratio(label, prediction),
                    )
                )
    return metrics


def worst(slices: Sequence[Slice]) -> list[Slice]:
    """Each objective's worst slice: the one whose interval has the lowest upper bound.

    By the upper bound, a small slice with a wide interval is not chosen by chance.
    """
    lowest: dict[str, Slice] = {}
    for candidate in slices:
        current = lowest.get(candidate.objective)
        if current is None or candidate.quality.high < current.quality.high:
            lowest[candidate.objective] = candidate
    return list(lowest.values())
