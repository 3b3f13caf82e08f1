"""Quality of predictions per objective. NumPy and SciPy only; rows without a label are left out.

Orders are judged within lists, the impressions that were served together (features/lists.py), and
never across days: between two days of a user the later features contain the earlier labels, which
makes a past rate and a label left out negatively correlated (docs/decisions/0005).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from mtl_ranker.models.objectives import Task


@dataclass(frozen=True)
class PredictedRows:
    """Labelled rows with predictions.

    Attributes:
        labels: [N, T], NaN = missing.
        prediction: [N, T].
        user: [N], the clusters of intervals.
        lists: [N], equal for rows of the same list; a list is of one user.
    """

    labels: np.ndarray
    prediction: np.ndarray
    user: np.ndarray
    lists: np.ndarray

    def where(self, chosen: np.ndarray) -> PredictedRows:
        """The rows chosen by booleans [N]."""
        return PredictedRows(
            self.labels[chosen], self.prediction[chosen], self.user[chosen], self.lists[chosen]
        )


@dataclass(frozen=True)
class ListCount:
    """How many lists have both labels, and how many labelled rows are in them.

    Attributes:
        lists: with a labelled row.
        both: with both labels; only these have an AUC.
        rows: with a label.
        rows_of_both: of the lists with both labels.
    """

    lists: int
    both: int
    rows: int
    rows_of_both: int

    def __str__(self) -> str:
        share = self.rows_of_both / self.rows if self.rows else 0.0
        return (
            f"{self.both:,} of {self.lists:,} lists have both labels, "
            f"with {self.rows_of_both:,} of {self.rows:,} rows ({share:.1%})"
        )


def count_lists(label: np.ndarray, lists: np.ndarray) -> ListCount:
    """Of a binary objective's labels [N] (NaN = missing) in lists [N]."""
    known = ~np.isnan(label)
    own = lists[known]
    both = lists_with_both(label[known], own)
    return ListCount(
        len(np.unique(own)), len(np.unique(own[both])), int(known.sum()), int(both.sum())
    )


def lists_with_both(label: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Which rows [n] are in a list with a positive and a negative label, none missing."""
    codes = np.unique(lists, return_inverse=True)[1]
    rows, positives = np.bincount(codes), np.bincount(codes, weights=label > 0.5)
    return ((positives > 0) & (positives < rows))[codes]


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half; NaN when only one class occurs."""
    positive = label > 0.5
    positives = int(positive.sum())
    negatives = len(label) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    ranks = rankdata(score)
    area = ranks[positive].sum() - positives * (positives + 1) / 2
    return float(area / (positives * negatives))


def gauc(label: np.ndarray, score: np.ndarray, group: np.ndarray) -> float:
    """AUC within each list, weighted by its rows (Zhou et al., KDD 2018, eq. 7, of lists).

    Lists with only one class have no AUC and are left out; NaN when none remains.
    """
    values = auc_of_own_group(label, score, group)
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def auc_of_own_group(label: np.ndarray, score: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The AUC within each row's list: [N]; NaN where the list has only one class.

    Its mean over rows is GAUC, as every list counts once for each of its impressions.
    """
    codes, count, positive, ranks = _ranks_in_group(label, score, group)
    negative = count - positive
    rank_sum = np.bincount(codes, weights=ranks * (label > 0.5), minlength=len(count))
    area = rank_sum - positive * (positive + 1) / 2
    pairs = positive * negative
    values = np.divide(area, pairs, out=np.full(len(count), np.nan), where=pairs > 0)
    return values[codes]


def _ranks_in_group(
    label: np.ndarray, score: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Group code and rank within the group of each row [N]; rows and positives of each group."""
    _, codes = np.unique(group, return_inverse=True)
    count = np.bincount(codes).astype(np.float64)
    positive = np.bincount(codes, weights=label > 0.5)
    # Rank (group, score) pairs together; subtracting the rows of earlier groups ranks within.
    _, dense = np.unique(score, return_inverse=True)
    overall = rankdata(codes * (dense.max(initial=0) + 1) + dense)
    before = np.concatenate([[0.0], np.cumsum(count)[:-1]])
    return codes, count, positive, overall - before[codes]


def ndcg(label: np.ndarray, score: np.ndarray, group: np.ndarray, k: int = 10) -> float:
    """Mean NDCG@k over lists with at least one positive label and two rows.

    Gains are the labels, discounts 1 / log2(1 + rank) (Järvelin & Kekäläinen 2002). Rows with equal
    scores share the mean discount of their ranks, so that their order does not matter. NaN when no
    list remains.
    """
    values = grouped_ndcg(label, score, group, k)
    return float(values.mean()) if len(values) else float("nan")


def grouped_ndcg(label: np.ndarray, score: np.ndarray, group: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k of each group with at least one positive label and two rows (see `ndcg`)."""
    if len(label) == 0:
        return np.zeros(0)
    _, codes = np.unique(group, return_inverse=True)
    count = np.bincount(codes)
    gain = np.maximum(label, 0.0)

    def dcg(key: np.ndarray) -> np.ndarray:
        order = np.lexsort((-key, codes))
        first = np.concatenate([[0], np.cumsum(count)[:-1]])
        rank = np.arange(len(order)) - first[codes[order]]
        discount = np.where(rank < k, 1.0 / np.log2(rank + 2.0), 0.0)
        changed = np.r_[True, (np.diff(codes[order]) != 0) | (np.diff(key[order]) != 0)]
        tie = np.cumsum(changed) - 1
        shared = np.bincount(tie, weights=discount) / np.bincount(tie)
        return np.bincount(codes[order], weights=gain[order] * shared[tie], minlength=len(count))

    ideal = dcg(gain)
    usable = (ideal > 0) & (count > 1)
    return dcg(score)[usable] / ideal[usable]


def log_loss(label: np.ndarray, probability: np.ndarray) -> float:
    """Mean binary cross-entropy in nats, probabilities clipped to [1e-7, 1 - 1e-7]."""
    p = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(label * np.log(p) + (1 - label) * np.log(1 - p)))


def calibration_ratio(label: np.ndarray, prediction: np.ndarray) -> float:
    """Sum of predictions over sum of labels; 1 is calibrated on average, NaN without positives."""
    observed = float(label.sum())
    return float(prediction.sum()) / observed if observed else float("nan")


def calibration_bins(
    label: np.ndarray, prediction: np.ndarray, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean prediction, mean label and number of rows of each of `bins` bins of equal size.

    Rows with equal predictions share their mean label, so that their order does not matter.
    """
    order = np.argsort(prediction, kind="stable")
    ranked = prediction[order]
    tie = np.cumsum(np.r_[True, np.diff(ranked) != 0]) - 1 if len(ranked) else order
    shared = (np.bincount(tie, weights=label[order]) / np.bincount(tie))[tie]
    bounds = [part for part in np.array_split(np.arange(len(order)), bins) if len(part)]
    predicted = np.array([ranked[part].mean() for part in bounds])
    observed = np.array([shared[part].mean() for part in bounds])
    return predicted, observed, np.array([len(part) for part in bounds])


def ece(label: np.ndarray, prediction: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error over bins of equal numbers of rows (Naeini et al., AAAI 2015)."""
    predicted, observed, rows = calibration_bins(label, prediction, bins)
    return float((np.abs(predicted - observed) * rows).sum() / rows.sum())


def r_squared(label: np.ndarray, prediction: np.ndarray) -> float:
    """1 - squared error over squared deviation from the labels' mean; NaN for constant labels."""
    spread = float(((label - label.mean()) ** 2).sum())
    return 1.0 - float(((label - prediction) ** 2).sum()) / spread if spread else float("nan")


def quality_metric(kind: str) -> str:
    """The metric over all rows of an objective, higher is better, as if the log had no lists."""
    return "auc" if kind == "binary" else "r2"


def can_be_judged(label: np.ndarray) -> bool:
    """Whether labels [N] (NaN = missing) have two different values, so that quality is defined."""
    known = label[~np.isnan(label)]
    return len(known) > 0 and bool((known != known[0]).any())


def evaluate(
    kind: str, label: np.ndarray, prediction: np.ndarray, lists: np.ndarray
) -> dict[str, float]:
    """All metrics of one objective over its labelled rows; gauc and ndcg_10 are by list.

    Binary: auc, gauc, ndcg_10, log_loss, calibration, ece. Other kinds, whose predictions are in
    the label's unit: r2, rmse, calibration. All are NaN without a labelled row.
    """
    known = ~np.isnan(label)
    if not known.any():
        names = BINARY_METRICS if kind == "binary" else OTHER_METRICS
        return dict.fromkeys(names, float("nan"))
    label, prediction, lists = label[known].astype(np.float64), prediction[known], lists[known]
    prediction = prediction.astype(np.float64)
    if kind == "binary":
        return {
            "auc": auc(label, prediction),
            "gauc": gauc(label, prediction, lists),
            "ndcg_10": ndcg(label, prediction, lists),
            "log_loss": log_loss(label, prediction),
            "calibration": calibration_ratio(label, prediction),
            "ece": ece(label, prediction),
        }
    return {
        "r2": r_squared(label, prediction),
        "rmse": float(np.sqrt(((label - prediction) ** 2).mean())),
        "calibration": calibration_ratio(label, prediction),
    }


BINARY_METRICS = ("auc", "gauc", "ndcg_10", "log_loss", "calibration", "ece")
OTHER_METRICS = ("r2", "rmse", "calibration")
Metrics = dict[str, dict[str, float]]  # objective -> metric -> value


def evaluate_all(
    tasks: list[Task], labels: np.ndarray, prediction: np.ndarray, lists: np.ndarray
) -> Metrics:
    """`evaluate` of every objective; labels and prediction are [N, T], lists is [N]."""
    return {
        task.name: evaluate(task.kind, labels[:, t], prediction[:, t], lists)
        for t, task in enumerate(tasks)
    }


def blended_quality(tasks: list[Task], metrics: Metrics) -> float:
    """The objectives' weighted mean of AUC (binary) and R² (others); NaN ones are left out."""
    values = [metrics[t.name][quality_metric(t.kind)] for t in tasks]
    weights = [t.weight for t in tasks]
    known = [(v, w) for v, w in zip(values, weights, strict=True) if not np.isnan(v)]
    return sum(v * w for v, w in known) / sum(w for _, w in known) if known else float("nan")
