"""Did the data change? Volume, nulls, labels, new ids and the shape of features and scores.

Each held-out day is set against the training window, so that a night that learned from one world
and serves another says so.
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


@dataclass(frozen=True)
class DayHealth:
    """One day's examples.

    Attributes:
        rows: impressions.
        label_rates: objective → mean of the labels that are present.
        nulls: feature → share of missing values.
        new_users, new_items: share of rows whose id did not occur in the training window; NaN on
            training days themselves.
        psi: feature or `score OBJECTIVE` → population stability index against training.
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
    days: list[DayHealth]
    warnings: list[str]
    failures: list[str]


def psi(reference: np.ndarray, now: np.ndarray, bins: int = BINS) -> float:
    """Population stability index Σ (a − b) ln(a / b) over quantile bins of the reference.

    Missing values (NaN) are a bin of their own; empty bins count half a row. Below 0.1 is called
    stable and above 0.25 a shift (Siddiqi 2006). Edges are distinct, so few values give few bins.
    """
    if len(reference) == 0 or len(now) == 0:
        return float("nan")
    known = reference[~np.isnan(reference)]
    cuts = np.zeros(0)
    if len(known):
        inner = np.linspace(0, 1, bins + 1)[1:-1]
        cuts = np.unique(np.quantile(known, inner, method="inverted_cdf"))
        cuts = cuts[cuts < known.max()]

    def shares(values: np.ndarray) -> np.ndarray:
        absent = np.isnan(values)
        place = np.searchsorted(cuts, values[~absent], side="left")
        counts = np.bincount(place, minlength=len(cuts) + 1).astype(np.float64)
        counts = np.maximum(np.r_[counts, absent.sum()], 0.5)
        return counts / counts.sum()

    a, b = shares(now.astype(np.float64)), shares(reference.astype(np.float64))
    return float(((a - b) * np.log(a / b)).sum())


def health(
    project: Project,
    frames: Mapping[str, pl.DataFrame],
    scores: Mapping[str, np.ndarray] | None = None,
) -> Drift:
    """Every day of a split, and what crosses the thresholds of `[drift]`.

    Args:
        frames: train, validate, test → examples.
        scores: train, validate and test → predictions [N, T], where there are any.
    """
    train = frames["train"]
    names = [o.name for o in project.objectives]
    schema = train.schema
    numeric = [c for c in numeric_features(project) if schema[c].is_numeric()]
    known = {key: train[key].unique() for key in ("user_id", "item_id")}
    reference = {c: train[c].cast(pl.Float64).fill_null(np.nan).to_numpy() for c in numeric}
    found = []
    for part, frame in frames.items():
        order = frame.with_row_index("row")
        for (day,), rows in order.group_by("date", maintain_order=True):
            index = rows["row"].to_numpy()
            held_out = part != "train"
            shift: dict[str, float] = {}
            if held_out:
                for column in numeric:
                    now = rows[column].cast(pl.Float64).fill_null(np.nan).to_numpy()
                    shift[column] = psi(reference[column], now)
                if scores is not None and part in scores and "train" in scores:
                    for t, name in enumerate(names):
                        own, base = scores[part][index, t], scores["train"][:, t]
                        shift[f"score {name}"] = psi(base, own)
            found.append(
                DayHealth(
                    _as_date(day),
                    part,
                    rows.height,
                    {n: _mean(rows[LABEL + n]) for n in names},
                    {
                        c: rows[c].null_count() / rows.height
                        for c in feature_columns(project)
                        if rows[c].null_count()
                    },
                    _new(rows["user_id"], known["user_id"]) if held_out else float("nan"),
                    _new(rows["item_id"], known["item_id"]) if held_out else float("nan"),
                    shift,
                )
            )
    found.sort(key=lambda each: each.day)
    warnings, failures = judge(project, found)
    return Drift(found, warnings, failures)


def judge(project: Project, days: Sequence[DayHealth]) -> tuple[list[str], list[str]]:
    """What crosses the thresholds, in words: warnings and failures."""
    rules = project.drift
    train = [d for d in days if d.part == "train"]
    volume = float(np.mean([d.rows for d in train]))
    warnings: list[str] = []
    failures: list[str] = []

    def weigh(value: float, words: str, warn: float, fail: float | None, key: str) -> None:
        if fail is not None and value > fail:
            failures.append(f"{words}; allowed: at most {fail:g} (drift.fail_{key})")
        elif value > warn:
            warnings.append(f"{words}; expected: at most {warn:g} (drift.warn_{key})")

    for each in days:
        if each.part == "train":
            continue
        change = abs(each.rows / volume - 1.0)
        words = f"{each.day}: {each.rows:,} rows, {each.rows / volume - 1:+.0%} of a training day"
        weigh(change, words, rules.warn_volume, rules.fail_volume, "volume")
        for name, rate in each.label_rates.items():
            rates = [d.label_rates[name] for d in train if not np.isnan(d.label_rates[name])]
            usual = float(np.mean(rates)) if rates else 0.0
            if usual > 0 and not np.isnan(rate):
                words = f"{each.day}: label {name} {rate:.4f}, {rate / usual - 1:+.0%} of training"
                weigh(abs(rate / usual - 1), words, rules.warn_label, rules.fail_label, "label")
        for column, share in each.nulls.items():
            usual = float(np.mean([d.nulls.get(column, 0.0) for d in train]))
            words = f"{each.day}: {column} is missing in {share:.1%}, in training {usual:.1%}"
            weigh(share - usual, words, rules.warn_nulls, rules.fail_nulls, "nulls")
        limit = rules.fail_psi if rules.fail_psi is not None else float("inf")
        largest = sorted(each.psi.items(), key=lambda pair: -pair[1])
        for column, value in (pair for pair in largest if pair[1] > limit):
            words = f"{each.day}: {column} changed its shape, PSI {value:.2f}"
            weigh(value, words, rules.warn_psi, rules.fail_psi, "psi")
        # One sentence a day: in a young feed many counts change their shape together.
        shifted = [f"{c} {v:.2f}" for c, v in largest if rules.warn_psi < v <= limit]
        if shifted:
            more = f" and {len(shifted) - 3} more" if len(shifted) > 3 else ""
            warnings.append(
                f"{each.day}: the shape of {', '.join(shifted[:3])}{more} changed; "
                f"expected: a PSI of at most {rules.warn_psi:g} (drift.warn_psi)"
            )
    return warnings, failures


def _new(values: pl.Series, known: pl.Series) -> float:
    return 1.0 - _mean(values.is_in(known.implode()))


def _mean(values: pl.Series) -> float:
    found: Any = values.mean()
    return float("nan") if found is None else float(found)


def _as_date(value: object) -> date:
    return value if isinstance(value, date) else date.fromisoformat(str(value))
