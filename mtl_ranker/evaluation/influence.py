"""Each user's influence on a quality: what its sampling variance over users follows from.

A quality θ of N rows is nearly linear in the users: θ - E[θ] ≈ Σ_u φ_u, where φ_u is user u's
influence (the derivative of θ by the weight of the user's rows; Hampel 1974). The rows of a user
are not independent, the users are, so Σ_u φ_u² estimates the variance of θ. The influences of two
models on the same users are subtracted user by user: the difference is paired. No resampling is
needed, and a quality takes O(N log N).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mtl_ranker.evaluation.metrics import auc_of_own_group, lists_with_both

LEAST = 10  # rows of the rarer label, and users with such a row, below which there is no interval


@dataclass(frozen=True)
class Clusters:
    """The user of each of N rows as a number, and its list.

    Attributes:
        codes: [N], from 0 to `count` - 1; a user may be without a row.
        count: number of users U.
        lists: [N], the list of each row, of one user; None if an order is not judged.
    """

    codes: np.ndarray
    count: int
    lists: np.ndarray | None = None

    @classmethod
    def of(cls, user: np.ndarray, lists: np.ndarray | None = None) -> Clusters:
        """Users and lists [N] of any type as numbers."""
        codes = np.unique(user, return_inverse=True)[1]
        own = None if lists is None else np.unique(lists, return_inverse=True)[1]
        return cls(codes, int(codes.max(initial=-1)) + 1, own)

    def where(self, chosen: np.ndarray) -> Clusters:
        """The rows chosen by booleans [N], of the same U users."""
        lists = None if self.lists is None else self.lists[chosen]
        return Clusters(self.codes[chosen], self.count, lists)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums of values [N] over each user's rows: [U]."""
        return np.bincount(self.codes, weights=values, minlength=self.count)

    def present(self) -> int:
        """Number of users with a row."""
        return int((np.bincount(self.codes, minlength=self.count) > 0).sum())


@dataclass(frozen=True)
class Support:
    """How much data an interval rests on.

    The variance between users of a mean of k rare events is itself estimated from about k numbers,
    with a relative standard error of about √(2 / k): 45 % at k = 10. Below `LEAST` there is no
    interval. Above, `users` - 1 degrees of freedom widen it.

    Attributes:
        rows: of the rarer label. Of numbers all, or where more than half are the same (a revenue of
            0), the others.
        users: with such a row.
        what: these rows in words.
    """

    rows: int
    users: int
    what: str

    @property
    def enough(self) -> bool:
        return min(self.rows, self.users) >= LEAST

    def __str__(self) -> str:
        return f"{self.rows} {self.what} of {self.users} users; it takes {LEAST} of {LEAST}"


@dataclass(frozen=True)
class LabelledRows:
    """The n labelled ones of N rows, for one objective.

    Attributes:
        kind: of the objective.
        known: [N] booleans, the rows with a label.
        label: [n].
        clusters: the rows' users and lists.
        support: of all rows.
        list_support: of the rows in lists with both labels; None without lists, and for objectives
            that are not binary.
    """

    kind: str
    known: np.ndarray
    label: np.ndarray
    clusters: Clusters
    support: Support
    list_support: Support | None = None

    @property
    def measure(self) -> str:
        """The measure by which models are compared here: the order within lists where it can be.

        Of binary objectives GAUC by list, or AUC over rows where too few rows are in lists with
        both labels; of others R².
        """
        if self.kind != "binary":
            return "r2"
        return "gauc" if self.list_support is not None and self.list_support.enough else "auc"

    def support_of(self, measure: str) -> Support:
        """The support of a measure."""
        return self.list_support or self.support if measure == "gauc" else self.support

    @classmethod
    def of(cls, kind: str, label: np.ndarray, clusters: Clusters) -> LabelledRows:
        """The rows with a label, of labels [N] with NaN = missing."""
        known = ~np.isnan(label)
        own, users = label[known].astype(np.float64), clusters.where(known)
        of_lists = None
        if kind == "binary" and users.lists is not None:
            both = lists_with_both(own, users.lists)
            of_lists = support_of(kind, own[both], users.where(both), " in lists with both labels")
        return cls(kind, known, own, users, support_of(kind, own, users), of_lists)


def support_of(kind: str, label: np.ndarray, clusters: Clusters, where: str = "") -> Support:
    """The support of labels [n] without a missing one; `where` is added to the words."""
    if kind == "binary":
        positive = label > 0.5
        groups = [("positives", positive), ("negatives", ~positive)]
    else:
        values, counts = np.unique(label, return_counts=True)
        groups = [("labels", np.ones(len(label), bool))]
        if 2 * counts.max(initial=0) > len(label):
            groups = [("labels other than the usual one", label != values[counts.argmax()])]
    found = [
        Support(int(chosen.sum()), clusters.where(chosen).present(), what + where)
        for what, chosen in groups
    ]
    return min(found, key=lambda support: (support.users, support.rows))


@dataclass(frozen=True)
class Influenced:
    """A quality, and each user's influence [U]; the sum of their squares is its variance."""

    value: float
    by_user: np.ndarray


def auc_influence(label: np.ndarray, score: np.ndarray, clusters: Clusters) -> Influenced:
    """AUC with the structural components of DeLong, DeLong & Clarke-Pearson (Biometrics 1988).

    V10 of a positive is the share of negatives below it, V01 of a negative the share of positives
    above it, ties half. A user's influence is the sum over its rows of (V10 - AUC) / positives and
    (V01 - AUC) / negatives (Obuchowski, Biometrics 1997). With one row per user the variance is
    DeLong's. NaN with only one class.
    """
    m = int((label > 0.5).sum())
    n = len(label) - m
    if m == 0 or n == 0:
        return Influenced(float("nan"), np.zeros(clusters.count))
    order = np.argsort(score)
    positive, ordered = label[order] > 0.5, score[order]
    starts = np.r_[0, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1]
    sizes = np.diff(np.r_[starts, len(ordered)])
    positives_at = np.add.reduceat(positive.astype(np.float64), starts)
    negatives_at = sizes - positives_at
    v10 = (np.cumsum(negatives_at) - negatives_at / 2) / n
    v01 = (m - np.cumsum(positives_at) + positives_at / 2) / m
    value = float(positives_at @ v10 / m)
    users = clusters.codes[order]
    of_positives = np.repeat((v10 - value) / m, sizes)
    of_negatives = np.repeat((v01 - value) / n, sizes)
    by_user = np.zeros(clusters.count)
    for chosen, component in ((positive, of_positives), (~positive, of_negatives)):
        own = Clusters(users[chosen], clusters.count)
        by_user += own.sums(component[chosen]) * _small_sample(own.present())
    return Influenced(value, by_user)


def ratio_influence(numerator: np.ndarray, denominator: np.ndarray) -> Influenced:
    """A ratio Σ_u a_u / Σ_u b_u of per-user sums [U], linearised: φ_u = (a_u - θ b_u) / Σ b."""
    total = float(denominator.sum())
    if total == 0:
        return Influenced(float("nan"), np.zeros(len(numerator)))
    value = float(numerator.sum()) / total
    users = int(((denominator != 0) | (numerator != 0)).sum())
    return Influenced(value, _small_sample(users) * (numerator - value * denominator) / total)


def gauc_influence(label: np.ndarray, score: np.ndarray, clusters: Clusters) -> Influenced:
    """GAUC (`metrics.gauc`): Σ_l n_l AUC_l / Σ_l n_l over the lists with both classes.

    A list is of one user, whose influence is that of all of its lists. Raises ValueError without
    lists.
    """
    if clusters.lists is None:
        raise ValueError("GAUC needs the list of each row (Clusters.of)")
    own = auc_of_own_group(label, score, clusters.lists)
    known = ~np.isnan(own)
    rows = clusters.where(known)
    return ratio_influence(rows.sums(own[known]), rows.sums(np.ones(int(known.sum()))))


def r2_influence(label: np.ndarray, prediction: np.ndarray, clusters: Clusters) -> Influenced:
    """R² = 1 - Σ (y - p)² / Σ (y - mean)²; the mean's own influence on the ratio is zero."""
    error = clusters.sums((label - prediction) ** 2)
    spread = clusters.sums((label - label.mean()) ** 2) if len(label) else error
    unexplained = ratio_influence(error, spread)
    return Influenced(1.0 - unexplained.value, -unexplained.by_user)


def log_loss_influence(
    label: np.ndarray, probability: np.ndarray, clusters: Clusters
) -> Influenced:
    """Mean binary cross-entropy in nats (`metrics.log_loss`)."""
    loss = _cross_entropy(label, probability)
    return ratio_influence(clusters.sums(loss), clusters.sums(np.ones(len(label))))


def skill_influence(label: np.ndarray, probability: np.ndarray, clusters: Clusters) -> Influenced:
    """1 - log loss / H(mean label): the gain over the base rate, 0 without and 1 with certainty.

    H is the entropy of a coin with the labels' mean, so 1 - skill is the normalised entropy of
    He et al. (ADKDD 2014, eq. 1). NaN with only one class.
    """
    loss = log_loss_influence(label, probability, clusters)
    rate = ratio_influence(clusters.sums(label), clusters.sums(np.ones(len(label))))
    q = rate.value
    if not 0 < q < 1:
        return Influenced(float("nan"), np.zeros(clusters.count))
    entropy = -q * np.log(q) - (1 - q) * np.log(1 - q)
    slope = np.log((1 - q) / q)  # of the entropy by q
    share = loss.value / entropy
    by_user = -(loss.by_user - share * slope * rate.by_user) / entropy
    return Influenced(1.0 - share, by_user)


def calibration_influence(
    label: np.ndarray, prediction: np.ndarray, clusters: Clusters
) -> Influenced:
    """Sum of predictions over sum of labels (`metrics.calibration_ratio`)."""
    return ratio_influence(clusters.sums(prediction), clusters.sums(label))


def _cross_entropy(label: np.ndarray, probability: np.ndarray) -> np.ndarray:
    p = np.clip(probability, 1e-7, 1 - 1e-7)
    return -(label * np.log(p) + (1 - label) * np.log(1 - p))


def _small_sample(users: int) -> float:
    """√(U / (U - 1)), by which the sum of squares is without bias; 1 for a single user."""
    return float(np.sqrt(users / (users - 1))) if users > 1 else 1.0


Measure = Callable[[np.ndarray, np.ndarray, Clusters], Influenced]

# By the names that `metrics.evaluate` uses, and `skill`.
MEASURES: dict[str, Measure] = {
    "auc": auc_influence,
    "gauc": gauc_influence,
    "r2": r2_influence,
    "log_loss": log_loss_influence,
    "skill": skill_influence,
    "calibration": calibration_influence,
}
# Of those by which models are compared, for tables and messages.
MEASURE_NAMES = {"gauc": "list GAUC", "auc": "AUC", "r2": "R²"}
