"""One model of uncertainty for every comparison: users and training seeds.

A model's quality on test rows varies with the users who are in the log and with the seed of the
training. The variance over users follows from their influences (`influence.py`), the variance over
seeds from the spread of trainings with other seeds. Both are estimated, the second from few
numbers, so the critical value is the mean of the two Student quantiles, weighted with the variances
(Cochran & Cox 1950; Cochran, Biometrics 1964). A Welch-Satterthwaite number of degrees of freedom
for the sum of both calls a difference where there is none in up to 7 % instead of 5 % of
comparisons with two seeds a side; it is used only among the models' own spreads, where it fits.

Interfaces: `model_quality` measures a model, `compare` subtracts two, `Estimated.interval` and
`Estimated.p_value` say what is known, and `judge` gives the verdicts of a table at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import false_discovery_control
from scipy.stats import t as student

from mtl_ranker.evaluation.influence import MEASURES, LabelledRows, Support

Key = TypeVar("Key", bound=Hashable)

ONE_SEED = "one seed: no verdict on the model"
SMALLEST = 1e-300  # p-value that is told from 0
AREAS = ("auc", "gauc")
UPPER = {**dict.fromkeys(AREAS, 1.0), "r2": 1.0, "skill": 1.0}


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval.

    Attributes:
        low, high: NaN where the data do not support an interval.
        note: what the interval does not cover or why there is none; empty if nothing is missing.
    """

    value: float
    low: float
    high: float
    note: str = ""

    def __str__(self) -> str:
        if np.isnan(self.low) and self.note:
            return f"{self.value:.4f} ({self.note})"
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"

    @property
    def signed(self) -> str:
        """A difference with its interval, if there is one."""
        if np.isnan(self.low):
            return f"{self.value:+.4f}"
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Part:
    """A variance estimated with so many degrees of freedom; infinitely many if it is known."""

    variance: float
    df: float


NO_VARIANCE = Part(0.0, np.inf)


@dataclass(frozen=True)
class Estimated:
    """A quality or a difference with its variance.

    Attributes:
        users: variance over users, the trainings as they are.
        trainings: variance over training seeds; None if unknown, as a model has one seed.
        support: the data of the objective.
    """

    value: float
    users: Part
    trainings: Part | None
    support: Support

    @property
    def note(self) -> str:
        """Why no verdict on the model can be given; empty if one can."""
        if not self.support.enough:
            return str(self.support)
        return ONE_SEED if self.trainings is None else ""

    @property
    def standard_error(self) -> float:
        """Of users and, where they are known, trainings."""
        return float(np.sqrt(sum(part.variance for part in self._parts)))

    @property
    def p_value(self) -> float:
        """Two-sided, of a value of 0. Over users only if the model has one seed.

        The level at which the interval just excludes 0. NaN without support.
        """
        if not self.support.enough or np.isnan(self.value):
            return float("nan")
        error = self.standard_error
        if error == 0:
            return 1.0 if self.value == 0 else 0.0
        wanted = abs(self.value) / error
        # One part alone would have the smallest or the largest level; the answer lies between.
        ends = [2 * student.sf(wanted, part.df) for part in self._parts if part.variance > 0]
        low, high = float(min(ends)), float(max(ends))
        if high - low <= 1e-12 * high or high < SMALLEST:
            return high
        low = max(low, SMALLEST)
        # At an end, where one part has nearly all variance, or below the smallest level.
        if self._critical(low) <= wanted:
            return low
        if self._critical(high) >= wanted:
            return high
        logs = np.log([low, high])
        return float(np.exp(brentq(lambda x: self._critical(np.exp(x)) - wanted, *logs)))

    def interval(self, confidence: float = 0.95) -> Interval:
        """The value ± critical value · standard error, with `note`; NaN bounds without support."""
        if not self.support.enough or np.isnan(self.value):
            return Interval(self.value, float("nan"), float("nan"), self.note)
        half = self._critical(1 - confidence) * self.standard_error
        return Interval(self.value, self.value - half, self.value + half, self.note)

    @property
    def _parts(self) -> list[Part]:
        return [self.users, self.trainings or NO_VARIANCE]

    def _critical(self, level: float) -> float:
        """Cochran & Cox's critical value: the parts' Student quantiles, weighted by variance."""
        total = sum(part.variance for part in self._parts)
        if total == 0:
            return 0.0
        return float(
            sum(
                part.variance / total * student.isf(level / 2, part.df)
                for part in self._parts
                if part.variance > 0
            )
        )


@dataclass(frozen=True)
class Quality:
    """A model's quality on one objective, with what comparisons with other models need.

    Attributes:
        measure: a name of `influence.MEASURES`; empty for a mean of several.
        value: mean over `averaged` trainings.
        influence: each user's [U], of `value`.
        trainings: [S] values of trainings with different seeds, whose spread is the variance of
            one training; None for a predictor without randomness (popularity, the base rate).
        averaged: how many trainings `value` is the mean of.
    """

    measure: str
    value: float
    influence: np.ndarray
    trainings: np.ndarray | None
    averaged: int
    support: Support

    def estimated(self) -> Estimated:
        """The quality by itself."""
        return Estimated(
            self.value, over_users(self.influence, self.support), self.spread(), self.support
        )

    def interval(self, confidence: float = 0.95) -> Interval:
        """The interval within the measure's range.

        An area under a curve is transformed to log-odds and back: with few positives its
        distribution is skewed, and the symmetric interval too short on the side of 0.5.
        """
        found = self.estimated().interval(confidence)
        if self.measure in AREAS and 0 < self.value < 1:
            half = (found.high - self.value) / (self.value * (1 - self.value))
            low, high = expit(logit(self.value) + np.array([-half, half]))
            return replace(found, low=float(low), high=float(high))
        return replace(found, high=float(np.minimum(found.high, UPPER.get(self.measure, np.inf))))

    def spread(self) -> Part | None:
        """The variance of `value` over training seeds; None if one training is known."""
        if self.trainings is None:
            return NO_VARIANCE
        if len(self.trainings) < 2:
            return None
        variance = float(np.var(self.trainings, ddof=1)) / self.averaged
        return Part(variance, len(self.trainings) - 1)


def model_quality(
    rows: LabelledRows,
    predictions: Sequence[np.ndarray],
    measure: str | None = None,
    fixed: bool = False,
) -> Quality:
    """The mean quality of one or several trainings of a model on one objective.

    Args:
        rows: of `LabelledRows.of`, shared by all models.
        predictions: [N] of each training (seed).
        measure: a name of `influence.MEASURES`; None for `LabelledRows.measure`.
        fixed: the predictor has no seed: the variance over trainings is zero, not unknown.
    """
    name = measure or rows.measure
    found = [
        MEASURES[name](rows.label, p[rows.known].astype(np.float64), rows.clusters)
        for p in predictions
    ]
    values = np.array([each.value for each in found])
    return Quality(
        measure=name,
        value=float(values.mean()),
        influence=np.mean([each.by_user for each in found], 0),
        trainings=None if fixed else values,
        averaged=len(found),
        support=rows.support_of(name),
    )


def compare(one: Quality, other: Quality) -> Estimated:
    """The difference of two models' qualities on the same rows, paired by users.

    The seeds are not paired: equal numbers mean nothing across models. Where both have their spread
    from the same trainings, it is one estimate, with its degrees of freedom.
    """
    if one is other:
        return Estimated(0.0, NO_VARIANCE, NO_VARIANCE, one.support)
    spreads = [one.spread(), other.spread()]
    known = [part for part in spreads if part is not None]
    trainings = _summed(known) if len(known) == len(spreads) else None
    if trainings is not None and _same_estimate(one, other):
        trainings = replace(trainings, df=known[0].df)
    return Estimated(
        value=one.value - other.value,
        users=over_users(one.influence - other.influence, one.support),
        trainings=trainings,
        support=one.support,
    )


def _same_estimate(one: Quality, other: Quality) -> bool:
    """Whether two qualities have their spread over seeds from the same trainings."""
    if one.trainings is None or other.trainings is None:
        return False
    return bool(np.array_equal(one.trainings, other.trainings))


def weighted_mean(weighted: Sequence[tuple[float, Quality]]) -> Quality:
    """The mean of (weight, quality) pairs of one model; those without support are left out.

    The variance over seeds is that of the mean, seed by seed.
    """
    usable = [(w, q) for w, q in weighted if q.support.enough and not np.isnan(q.value)]
    if not usable:
        rarest = min((q.support for _, q in weighted), key=lambda support: support.rows)
        first = weighted[0][1]
        return replace(first, measure="", value=float("nan"), support=rarest)
    weights = np.array([w for w, _ in usable]) / sum(w for w, _ in usable)
    qualities = [q for _, q in usable]
    return Quality(
        measure="",
        value=float(sum(w * q.value for w, q in zip(weights, qualities, strict=True))),
        influence=np.tensordot(weights, [q.influence for q in qualities], 1),
        trainings=_mean_of_trainings(weights, qualities),
        averaged=qualities[0].averaged,
        support=min((q.support for q in qualities), key=lambda support: support.users),
    )


def _mean_of_trainings(weights: np.ndarray, qualities: Sequence[Quality]) -> np.ndarray | None:
    """The mean of each training [S], of as many as are known of every quality; None without any."""
    known = [
        (w, q.trainings) for w, q in zip(weights, qualities, strict=True) if q.trainings is not None
    ]
    if not known:
        return None
    least = min(len(trainings) for _, trainings in known)
    return np.sum([w * trainings[:least] for w, trainings in known], 0)


def controlled(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that rejecting those ≤ α keeps the false discovery rate at α.

    Benjamini & Hochberg (JRSS B 1995). NaN stays NaN and does not count.
    """
    values = np.array(p_values, float)
    known = ~np.isnan(values)
    if known.any():
        values[known] = false_discovery_control(values[known])
    return [float(value) for value in values]


@dataclass(frozen=True)
class Judged:
    """One of several comparisons that are made at once.

    Attributes:
        interval: of this comparison alone.
        p_value: adjusted for the others; NaN where no verdict can be given.
        verdict: 1 significantly above 0, -1 below, 0 neither or no verdict.
        note: why no verdict can be given; empty if one can.
    """

    interval: Interval
    p_value: float
    verdict: int
    note: str = ""


def judge(
    compared: Mapping[Key, Estimated],
    confidence: float = 0.95,
    notes: Mapping[Key, str] | None = None,
) -> dict[Key, Judged]:
    """All comparisons of a table, with a false discovery rate of 1 - `confidence` over them.

    Args:
        notes: why a comparison has no verdict, beside what `Estimated.note` says.
    """
    given = notes or {}
    reasons = {key: each.note or given.get(key, "") for key, each in compared.items()}
    p_values = controlled(
        [float("nan") if reasons[key] else each.p_value for key, each in compared.items()]
    )
    return {
        key: Judged(
            interval=each.interval(confidence),
            p_value=p,
            verdict=int(np.sign(each.value)) if p <= 1 - confidence else 0,
            note=reasons[key],
        )
        for (key, each), p in zip(compared.items(), p_values, strict=True)
    }


def pooled_spread(groups: Sequence[np.ndarray]) -> Part | None:
    """The variance of one training, from groups of trainings that differ in their seed only.

    The pooled variance within groups, as of models of several nights. None without a group of two.

    Args:
        groups: values [S] of each group's trainings.
    """
    several = [values for values in groups if len(values) > 1]
    if not several:
        return None
    df = sum(len(values) - 1 for values in several)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in several)
    return Part(squares / df, df)


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of independent values [n]."""
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    half = float(student.isf((1 - confidence) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def over_users(influence: np.ndarray, support: Support) -> Part:
    """The variance over users, of each user's influence [U]."""
    return Part(float(influence @ influence), max(support.users - 1, 1))


def _summed(parts: Sequence[Part]) -> Part:
    """The sum of independent variances, with Welch-Satterthwaite degrees of freedom."""
    total = sum(part.variance for part in parts)
    if total == 0:
        return NO_VARIANCE
    spread = sum(part.variance**2 / part.df for part in parts)
    return Part(total, total**2 / spread if spread > 0 else np.inf)
