"""Drift of the data: volume, nulls, label means, new ids, distributions of features and scores.

Each held-out day is compared with the training window, so that a model trained on data of another
distribution than it will serve is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.features.columns import LABEL, feature_columns, numeric_features

BINS = 10


@dataclass(frozen=True, kw_only=True)
class DayHealth:
    """Statistics of one day's examples.

    Attributes:
        part: train, validate or test.
        rows: impressions.
        label_rates: objective → mean of the labels that are present.
        nulls: feature → share of missing values.
        new_users, new_items: share of rows whose id does not occur in the training window; NaN on
            training days.
        psi: feature or `score OBJECTIVE` → population stability index against training; empty on
            training days.
    """

    day: date
    part: str
    rows: int
    label_rates: dict[str, float]
    nulls: dict[str, float]
    new_users: float
    new_items: float
    psi: dict[str, float]


@dataclass(frozen=True)
class Drift:
    """Every day of a split, and what crosses the warning and failing thresholds of `[drift]`."""

    days: list[DayHealth]
    warnings: list[str]
    failures: list[str]


def psi(reference: np.ndarray, now: np.ndarray, bins: int = BINS) -> float:
    """Population stability index Σ (a − b) ln(a / b) over quantile bins of the reference.

    Missing values (NaN) are a bin of their own; empty bins count half a row. NaN where either side
    has no rows. Below 0.1 is called stable and above 0.25 a shift (Siddiqi 2006). Edges are
    distinct, so few values give few bins.
    """
    if len(reference) == 0 or len(now) == 0:
        return float("nan")
    present = reference[~np.isnan(reference)]
    edges = np.zeros(0)
    if len(present):
        quantiles = np.linspace(0, 1, bins + 1)[1:-1]
        edges = np.unique(np.quantile(present, quantiles, method="inverted_cdf"))
        edges = edges[edges < present.max()]

    def shares(values: np.ndarray) -> np.ndarray:
        missing = np.isnan(values)
        index = np.searchsorted(edges, values[~missing], side="left")
        counts = np.bincount(index, minlength=len(edges) + 1).astype(np.float64)
        counts = np.maximum(np.r_[counts, missing.sum()], 0.5)
        return counts / counts.sum()

    a, b = shares(now.astype(np.float64)), shares(reference.astype(np.float64))
    return float(((a - b) * np.log(a / b)).sum())


def health(
    project: Project,
    frames: Mapping[str, pl.DataFrame],
    scores: Mapping[str, np.ndarray] | None = None,
) -> Drift:
    """Statistics of every day of a split, and what crosses the thresholds of `[drift]`.

    Args:
        frames: train, validate, test → examples of N rows.
        scores: train, validate, test → predictions [N, T]; None or a missing part skips them.
    """
    train = frames["train"]
    names = [o.name for o in project.objectives]
    schema = train.schema
    numeric = [c for c in numeric_features(project) if schema[c].is_numeric()]
    ids = {key: train[key].unique() for key in ("user_id", "item_id")}
    reference = {c: train[c].cast(pl.Float64).fill_null(np.nan).to_numpy() for c in numeric}
    days = []
    for part, frame in frames.items():
        numbered = frame.with_row_index("row")
        for (day,), rows in numbered.group_by("date", maintain_order=True):
            index = rows["row"].to_numpy()
            held_out = part != "train"
            shift: dict[str, float] = {}
            if held_out:
                for column in numeric:
                    values = rows[column].cast(pl.Float64).fill_null(np.nan).to_numpy()
                    shift[column] = psi(reference[column], values)
                if scores is not None and part in scores and "train" in scores:
                    for t, name in enumerate(names):
                        shift[f"score {name}"] = psi(scores["train"][:, t], scores[part][index, t])
            days.append(
                DayHealth(
                    day=_as_date(day),
                    part=part,
                    rows=rows.height,
                    label_rates={n: _mean(rows[LABEL + n]) for n in names},
                    nulls={
                        c: rows[c].null_count() / rows.height
                        for c in feature_columns(project)
                        if rows[c].null_count()
                    },
                    new_users=_new(rows["user_id"], ids["user_id"]) if held_out else float("nan"),
                    new_items=_new(rows["item_id"], ids["item_id"]) if held_out else float("nan"),
                    psi=shift,
                )
            )
    days.sort(key=lambda d: d.day)
    warnings, failures = compare_with_training(project, days)
    return Drift(days, warnings, failures)


def compare_with_training(
    project: Project, days: Sequence[DayHealth]
) -> tuple[list[str], list[str]]:
    """Warnings and failures: messages about held-out days that cross a threshold of `[drift]`."""
    rules = project.drift
    train = [d for d in days if d.part == "train"]
    volume = float(np.mean([d.rows for d in train]))
    warnings: list[str] = []
    failures: list[str] = []

    def check(rule: str, value: float, message: str) -> None:
        """Compare a value with `drift.warn_RULE` and `drift.fail_RULE`."""
        warn, fail = getattr(rules, f"warn_{rule}"), getattr(rules, f"fail_{rule}")
        if fail is not None and value > fail:
            failures.append(f"{message}; allowed: at most {fail:g} (drift.fail_{rule})")
        elif value > warn:
            warnings.append(f"{message}; expected: at most {warn:g} (drift.warn_{rule})")

    for day in days:
        if day.part == "train":
            continue
        change = day.rows / volume - 1
        check(
            "volume", abs(change), f"{day.day}: {day.rows:,} rows, {change:+.0%} of a training day"
        )
        for name, rate in day.label_rates.items():
            rates = [d.label_rates[name] for d in train if not np.isnan(d.label_rates[name])]
            usual = float(np.mean(rates)) if rates else 0.0
            if usual > 0 and not np.isnan(rate):
                change = rate / usual - 1
                message = f"{day.day}: label {name} {rate:.4f}, {change:+.0%} of training"
                check("label", abs(change), message)
        for column, share in day.nulls.items():
            usual = float(np.mean([d.nulls.get(column, 0.0) for d in train]))
            message = f"{day.day}: {column} is missing in {share:.1%}, in training {usual:.1%}"
            check("nulls", share - usual, message)
        limit = rules.fail_psi if rules.fail_psi is not None else float("inf")
        largest = sorted(day.psi.items(), key=lambda pair: -pair[1])
        for column, value in (pair for pair in largest if pair[1] > limit):
            check("psi", value, f"{day.day}: the distribution of {column} changed, PSI {value:.2f}")
        # One message per day: in a young feed the distributions of many counts change together.
        shifted = [f"{c} {v:.2f}" for c, v in largest if rules.warn_psi < v <= limit]
        if shifted:
            more = f" and {len(shifted) - 3} more" if len(shifted) > 3 else ""
            warnings.append(
                f"{day.day}: the distribution of {', '.join(shifted[:3])}{more} changed; "
                f"expected: a PSI of at most {rules.warn_psi:g} (drift.warn_psi)"
            )
    return warnings, failures


def _new(values: pl.Series, known: pl.Series) -> float:
    return 1.0 - _mean(values.is_in(known.implode()))


def _mean(values: pl.Series) -> float:
    mean: Any = values.mean()
    return float("nan") if mean is None else float(mean)


def _as_date(value: object) -> date:
    return value if isinstance(value, date) else date.fromisoformat(str(value))
