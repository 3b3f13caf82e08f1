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
from scipy.stats import chi2

from mtl_ranker.config import Project
from mtl_ranker.features.columns import (
    LABEL,
    feature_columns,
    growing_numerics,
    keys_of_numerics,
    rates,
)

BINS = 10
NO_CHANGE = 0.999  # quantile of the PSI of two samples of the same distribution


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
        psi: feature or `score OBJECTIVE` → population stability index against training above that
            of no change (`excess_psi`); empty on training days, and without features that move by
            themselves.
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

    @property
    def summary(self) -> str | None:
        """All warnings in one line, or None; the report has them one by one."""
        if not self.warnings:
            return None
        more = len(self.warnings) - 1
        return self.warnings[0] + (f"; {more} more in the report's data health" if more else "")


@dataclass(frozen=True)
class Sample:
    """Values of one feature or score on some days.

    Attributes:
        values: [N]; NaN = missing.
        size: number of independent values among them, at most N: rows of the same key (user, item,
            surface) have the same value. None for N.
    """

    values: np.ndarray
    size: float | None = None

    @property
    def independent(self) -> float:
        return float(len(self.values)) if self.size is None else self.size


def psi(reference: Sample, now: Sample, bins: int = BINS) -> float:
    """Population stability index Σ (a − b) ln(a / b) over quantile bins of the reference.

    Missing values (NaN) are a bin of their own; empty bins count half an independent value. NaN
    where either side has no rows. Below 0.1 is called stable and above 0.25 a shift (Siddiqi 2006).
    Edges are distinct, so few values give few bins.
    """
    return _psi(reference, now, bins)[0]


def excess_psi(reference: Sample, now: Sample, bins: int = BINS) -> float:
    """PSI above what two samples of the same distribution have; 0 where it is not above.

    Of n and m independent values in B bins, PSI / (1/n + 1/m) is distributed as χ² with B − 1
    degrees of freedom (Yurdakul & Naranjo 2020); its `NO_CHANGE` quantile is subtracted.
    """
    value, filled = _psi(reference, now, bins)
    if np.isnan(value):
        return value
    scale = 1 / reference.independent + 1 / now.independent
    return max(0.0, value - scale * float(chi2.ppf(NO_CHANGE, max(filled - 1, 1))))


def _psi(reference: Sample, now: Sample, bins: int) -> tuple[float, int]:
    """PSI, and the number of bins that either side fills."""
    if len(reference.values) == 0 or len(now.values) == 0:
        return float("nan"), 0
    present = reference.values[~np.isnan(reference.values)]
    edges = np.zeros(0)
    if len(present):
        quantiles = np.linspace(0, 1, bins + 1)[1:-1]
        edges = np.unique(np.quantile(present, quantiles, method="inverted_cdf"))
        edges = edges[edges < present.max()]

    def counts(sample: Sample) -> np.ndarray:
        values = sample.values.astype(np.float64)
        missing = np.isnan(values)
        index = np.searchsorted(edges, values[~missing], side="left")
        in_bins = np.bincount(index, minlength=len(edges) + 1).astype(np.float64)
        return np.r_[in_bins, missing.sum()] * sample.independent / len(values)

    a, b = counts(now), counts(reference)
    filled = int(((a > 0) | (b > 0)).sum())
    a, b = (np.maximum(x, 0.5) / np.maximum(x, 0.5).sum() for x in (a, b))
    return float(((a - b) * np.log(a / b)).sum()), filled


def effective_keys(keys: pl.DataFrame) -> float:
    """The number of keys of N rows, (Σ n)² / Σ n² with n rows of each key (Kish 1965)."""
    rows = keys.group_by(keys.columns).len()["len"].cast(pl.Float64)
    return keys.height**2 / float((rows**2).sum()) if keys.height else 0.0


def health(
    project: Project,
    frames: Mapping[str, pl.DataFrame],
    scores: Mapping[str, np.ndarray] | None = None,
    day_rows: Mapping[date, int] | None = None,
    history_days: int = 365,
) -> Drift:
    """Statistics of every day of a split, and what crosses the thresholds of `[drift]`.

    Args:
        frames: train, validate, test → examples of N rows.
        scores: train, validate, test → predictions [N, T] of one model; None or a missing part
            skips them.
        day_rows: rows of each training day, of which `frames["train"]` may be a sample.
        history_days: days of the log before the first training day.
    """
    names = [o.name for o in project.objectives]
    known = {key: frames["train"][key].unique() for key in ("user_id", "item_id")}
    reference = _samples(project, frames["train"], history_days)
    scored = _scores(project, frames["train"], scores, "train", np.arange(frames["train"].height))
    days = []
    for part, frame in frames.items():
        numbered = frame.with_row_index("row")
        for (value,), rows in numbered.group_by("date", maintain_order=True):
            day, held_out = _as_date(value), part != "train"
            shift: dict[str, float] = {}
            if held_out:
                now = _samples(project, rows, history_days)
                now |= _scores(project, rows, scores, part, rows["row"].to_numpy())
                of_training = reference | scored
                shift = {c: excess_psi(of_training[c], now[c]) for c in now if c in of_training}
            counted = None if held_out or day_rows is None else day_rows.get(day)
            days.append(
                DayHealth(
                    day=day,
                    part=part,
                    rows=rows.height if counted is None else counted,
                    label_rates={n: _mean(rows[LABEL + n]) for n in names},
                    nulls={
                        c: rows[c].null_count() / rows.height
                        for c in feature_columns(project)
                        if rows[c].null_count()
                    },
                    new_users=_new(rows["user_id"], known["user_id"]) if held_out else np.nan,
                    new_items=_new(rows["item_id"], known["item_id"]) if held_out else np.nan,
                    psi=shift,
                )
            )
    days.sort(key=lambda d: d.day)
    warnings, failures = compare_with_training(project, days)
    return Drift(days, warnings, failures)


def _samples(project: Project, rows: pl.DataFrame, history_days: int) -> dict[str, Sample]:
    """Every numeric feature that does not move by itself, with its number of keys.

    A smoothed rate is that of all events where a key has none, which moves many keys together: of
    rates, equal values count as one key.
    """
    growing, smoothed = growing_numerics(project, history_days), rates(project)
    sizes: dict[tuple[str, ...], float] = {}
    samples = {}
    for column, keys in keys_of_numerics(project).items():
        if column in growing or not rows.schema[column].is_numeric():
            continue
        # Without the keys' columns, rows with the same value count as rows of the same key.
        by = tuple(keys) if all(key in rows.columns for key in keys) else (column,)
        if by not in sizes:
            sizes[by] = effective_keys(rows.select(by))
        size = sizes[by]
        if column in smoothed:
            size = min(size, effective_keys(rows.select(column)))
        values = rows[column].cast(pl.Float64).fill_null(np.nan).to_numpy()
        samples[column] = Sample(values, size)
    return samples


def _scores(
    project: Project,
    rows: pl.DataFrame,
    scores: Mapping[str, np.ndarray] | None,
    part: str,
    index: np.ndarray,
) -> dict[str, Sample]:
    """`score OBJECTIVE` → predictions of these rows of a part, of as many users."""
    if scores is None or part not in scores:
        return {}
    users = effective_keys(rows.select("user_id"))
    return {
        f"score {objective.name}": Sample(scores[part][index, t], users)
        for t, objective in enumerate(project.objectives)
    }


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
            if usual != 0 and not np.isnan(rate):
                change = (rate - usual) / abs(usual)
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
        shifted = [f"{c} (PSI {v:.2f})" for c, v in largest if rules.warn_psi < v <= limit]
        if shifted:
            more = f" and {len(shifted) - 3} more" if len(shifted) > 3 else ""
            warnings.append(
                f"{day.day}: the distribution of {', '.join(shifted[:3])}{more} changed; "
                f"expected: at most {rules.warn_psi:g} (drift.warn_psi)"
            )
    return warnings, failures


def _new(values: pl.Series, known: pl.Series) -> float:
    return 1.0 - _mean(values.is_in(known.implode()))


def _mean(values: pl.Series) -> float:
    mean: Any = values.mean()
    return float("nan") if mean is None else float(mean)


def _as_date(value: object) -> date:
    return value if isinstance(value, date) else date.fromisoformat(str(value))
