"""Metrics on slices of the held-out rows, and the slice where the ranker is worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from mtl_ranker.evaluation.influence import MEASURE_NAMES, Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import Interval, Quality, compare, judge, model_quality
from mtl_ranker.evaluation.metrics import PredictedRows, auc, calibration_ratio
from mtl_ranker.models.objectives import Task

MAX_VALUES = 12  # of one context column; rarer values have no slice


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The metrics of one objective on one slice of the rows.

    Attributes:
        kind: what the rows are divided by, such as `tab` or `user activity`.
        value: which of its values, such as `high third`.
        measure: of the quality, that of all rows (`LabelledRows.measure`).
        quality: GAUC by list, AUC or R² of the trained model, with its interval over users.
        gap: quality minus that of all rows, with its interval.
        verdict: -1 significantly worse than all rows, 1 better, 0 neither, with the false
            discovery rate controlled over all slices and objectives.
        calibration: sum of predictions over sum of labels.
    """

    kind: str
    value: str
    objective: str
    rows: int
    positives: int
    measure: str
    quality: Interval
    gap: Interval
    verdict: int
    auc: float
    calibration: float

    def __str__(self) -> str:
        return (
            f"{self.objective} is worst where {self.kind} is {self.value}: "
            f"{MEASURE_NAMES[self.measure]} {self.quality}, "
            f"{self.gap.value:+.4f} against all rows ({self.rows:,} rows)"
        )


def divide(
    frame: pl.DataFrame, context: Sequence[str], history: Mapping[str, str]
) -> dict[str, pl.Series]:
    """The slice of each of N rows, by kind of slice; null = none.

    Args:
        frame: N raw feature rows.
        context: context columns (surfaces); each of their most frequent values is a slice, and each
            quarter of the rows by a number with more than `MAX_VALUES` values; lists have none.
        history: `user` and `item` → the feature column of its impressions per day; null (cold) if
            it has no impression in the longest window.
    """
    slices: dict[str, pl.Series] = {}
    for column in context:
        if frame.schema[column].is_nested():
            continue
        given = frame[column]
        if given.dtype.is_numeric() and given.drop_nulls().n_unique() > MAX_VALUES:
            slices[column] = _quarters(given.cast(pl.Float64).fill_nan(None))
            continue
        values = given.cast(pl.String)
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


def _quarters(values: pl.Series) -> pl.Series:
    """The quarter of each number by quantiles, named by its bounds; null stays null.

    Equal values are in the same quarter, so there may be fewer than four.
    """
    number = values.to_numpy()
    edges = np.unique(np.nanquantile(number, [0.25, 0.5, 0.75], method="inverted_cdf"))
    edges = edges[edges < np.nanmax(number)]
    names = [f"up to {edges[0]:g}"] if len(edges) else ["all"]
    names += [f"over {low:g} up to {high:g}" for low, high in zip(edges, edges[1:], strict=False)]
    names += [f"over {edges[-1]:g}"] if len(edges) else []
    index = np.searchsorted(edges, np.nan_to_num(number), side="left")
    binned = pl.Series(values.name, [names[i] for i in index])
    return binned.set(values.is_null(), None)


def slice_metrics(
    tasks: Sequence[Task],
    predicted: PredictedRows,
    slices: Mapping[str, pl.Series],
    confidence: float = 0.95,
) -> list[Slice]:
    """Each objective's metrics on each slice with the support that an interval needs.

    The model is one training as it is, so intervals cover users only.

    Args:
        predicted: N rows.
        slices: kind of slice → the slice of each row [N], null = none (see `divide`).
    """
    clusters = Clusters.of(predicted.user, predicted.lists)
    found: dict[tuple[str, str, str], _OnSlice] = {}
    overall: dict[str, Quality] = {}
    for t, task in enumerate(tasks):
        label, prediction = predicted.labels[:, t], predicted.prediction[:, t]
        whole = LabelledRows.of(task.kind, label, clusters)
        overall[task.name] = model_quality(whole, [prediction], fixed=True)
        for kind, values in slices.items():
            for value in values.unique().drop_nulls().sort().to_list():
                chosen = (values == value).fill_null(False).to_numpy()
                rows = LabelledRows.of(task.kind, np.where(chosen, label, np.nan), clusters)
                if rows.support_of(whole.measure).enough:
                    quality = model_quality(rows, [prediction], whole.measure, fixed=True)
                    found[task.name, kind, value] = _OnSlice(rows, prediction, quality)
    gaps = judge({k: compare(own.quality, overall[k[0]]) for k, own in found.items()}, confidence)
    return [
        Slice(
            kind=kind,
            value=value,
            objective=objective,
            rows=len(own.rows.label),
            positives=int((own.rows.label > 0.5).sum()),
            measure=own.quality.measure,
            quality=own.quality.interval(confidence),
            gap=gaps[objective, kind, value].interval,
            verdict=gaps[objective, kind, value].verdict,
            auc=own.auc,
            calibration=calibration_ratio(own.rows.label, own.prediction[own.rows.known]),
        )
        for (objective, kind, value), own in found.items()
    ]


@dataclass(frozen=True)
class _OnSlice:
    """A model's predictions [N] and quality on the labelled rows of a slice."""

    rows: LabelledRows
    prediction: np.ndarray
    quality: Quality

    @property
    def auc(self) -> float:
        """Over the slice's rows; NaN unless the objective is binary."""
        rows = self.rows
        if rows.kind != "binary":
            return float("nan")
        return auc(rows.label, self.prediction[rows.known])


def worst(slices: Sequence[Slice]) -> list[Slice]:
    """Each objective's worst slice among those that are significantly worse than all rows.

    The worst is the one whose interval has the lowest upper bound, so that a small slice with a
    wide interval is not chosen by chance.
    """
    lowest: dict[str, Slice] = {}
    for candidate in slices:
        if candidate.verdict < 0:
            current = lowest.get(candidate.objective)
            if current is None or candidate.quality.high < current.quality.high:
                lowest[candidate.objective] = candidate
    return list(lowest.values())
