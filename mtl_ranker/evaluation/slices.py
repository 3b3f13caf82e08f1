"""The same metrics on parts of the held-out rows: where is the ranker worst?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from mtl_ranker.evaluation.intervals import Interval, interval, quality_draws, user_draws
from mtl_ranker.evaluation.metrics import calibration_ratio, evaluate, quality_metric
from mtl_ranker.models.objectives import Task

MOST_VALUES = 12  # of one context column; rarer ones are not sliced


@dataclass(frozen=True)
class Slice:
    """One objective on one part of the rows.

    Attributes:
        kind: what the rows are divided by, such as `tab` or `user activity`.
        quality: AUC or R² with an interval over users resampled.
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
    """What each of N rows belongs to, by kind of slice; null = to none.

    Args:
        frame: raw feature rows.
        context: context columns (surfaces); the most frequent values of each.
        history: `user` and `item` → the feature column of its impressions a day; a null means that
            it was never shown in the longest window: cold.
    """
    found: dict[str, pl.Series] = {}
    for column in context:
        values = frame[column].cast(pl.String)
        counts = values.value_counts(sort=True).drop_nulls()
        frequent = counts[column].head(MOST_VALUES).to_list()
        found[column] = values.set(~values.is_in(frequent), None)
    for who, column in history.items():
        seen = frame[column].cast(pl.Float64)
        low, high = (seen.quantile(q, "nearest") for q in (1 / 3, 2 / 3))
        words = f"{who} activity" if who == "user" else f"{who} exposure"
        part = pl.select(
            pl.when(seen.is_null())
            .then(pl.lit("cold (not seen in the window)"))
            .when(seen <= low)
            .then(pl.lit("low third"))
            .when(seen <= high)
            .then(pl.lit("middle third"))
            .otherwise(pl.lit("high third"))
            .alias(words)
        )
        found[words] = part.to_series()
    if "item_age_days" in frame.columns:
        age = frame["item_age_days"].cast(pl.Float64)
        cuts = [(1, "up to 1 day"), (7, "2 to 7 days"), (30, "8 to 30 days")]
        chain: Any = pl.when(age.is_null()).then(pl.lit("unknown"))
        for most, words in cuts:
            chain = chain.when(age <= most).then(pl.lit(words))
        found["item age"] = pl.select(
            chain.otherwise(pl.lit("over 30 days")).alias("item age")
        ).to_series()
    return found


def slice_metrics(
    tasks: Sequence[Task],
    labels: np.ndarray,
    prediction: np.ndarray,
    user: np.ndarray,
    parts: Mapping[str, pl.Series],
    resamples: int = 100,
    confidence: float = 0.95,
    min_positives: int = 10,
) -> list[Slice]:
    """Each objective's quality on each slice that has `min_positives` positives and negatives.

    Labels and predictions are [N, T]; a slice of another kind than binary needs twice as many rows.
    """
    found = []
    for t, task in enumerate(tasks):
        known = ~np.isnan(labels[:, t])
        whole = evaluate(task.kind, labels[:, t], prediction[:, t], user)
        measure = quality_metric(task.kind)
        for kind, values in parts.items():
            for value in values.unique().drop_nulls().sort().to_list():
                rows = (values == value).fill_null(False).to_numpy() & known
                label = labels[rows, t]
                positives = int((label > 0.5).sum())
                rest = len(label) - positives
                few = min(positives, rest) if task.kind == "binary" else len(label) // 2
                if few < min_positives:
                    continue
                own = evaluate(task.kind, label, prediction[rows, t], user[rows])
                draws = quality_draws(
                    task.kind, label, prediction[rows, t], user_draws(user[rows], resamples)
                )
                quality = interval(own[measure], draws, confidence)
                found.append(
                    Slice(
                        kind,
                        value,
                        task.name,
                        len(label),
                        positives,
                        quality,
                        own[measure] - whole[measure],
                        own.get("gauc", float("nan")),
                        calibration_ratio(label, prediction[rows, t]),
                    )
                )
    return found


def worst(slices: Sequence[Slice]) -> list[Slice]:
    """Each objective's worst slice: the lowest upper end of its interval, so that a small slice's
    bad luck does not count.
    """
    found: dict[str, Slice] = {}
    for each in slices:
        known = found.get(each.objective)
        if known is None or each.quality.high < known.quality.high:
            found[each.objective] = each
    return list(found.values())
