"""The effect of sharing on each objective: a model against the one that shares nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mtl_ranker.evaluation.intervals import Interval, Resampled, paired_difference


@dataclass(frozen=True)
class SharingGain:
    """The multi-task gain: quality of `model` minus that of `reference` on one objective."""

    model: str
    reference: str
    objective: str
    measure: str
    gain: Interval

    @property
    def verdict(self) -> str:
        """helped, hurt (negative transfer) or undecided, at the interval's confidence."""
        if self.gain.low > 0:
            return "helped"
        return "hurt" if self.gain.high < 0 else "undecided"

    def __str__(self) -> str:
        effect = {
            "helped": "sharing helped",
            "hurt": "sharing hurt (negative transfer)",
            "undecided": "sharing made no significant difference to",
        }[self.verdict]
        g = self.gain
        return (
            f"{self.model}: {effect} {self.objective}, {self.measure.upper()} "
            f"{g.value:+.4f} [{g.low:+.4f}, {g.high:+.4f}] against {self.reference}"
        )


def sharing_gains(
    qualities: Mapping[tuple[str, str], Resampled],
    reference: str,
    measures: Mapping[str, str],
    confidence: float,
) -> list[SharingGain]:
    """The gain of every other model over `reference` on each objective.

    Args:
        qualities: (model, objective) → quality, all resampled with the same weights.
        measures: objective → auc or r2.
    """
    return [
        SharingGain(
            model,
            reference,
            objective,
            measures[objective],
            paired_difference(quality, qualities[reference, objective], confidence),
        )
        for (model, objective), quality in qualities.items()
        if model != reference
    ]


def label_correlation(labels: np.ndarray) -> np.ndarray:
    """Pearson correlation between objectives' labels [N, T] over rows that have both: [T, T].

    NaN if fewer than two rows have both, or if one of the labels is constant on them.
    """
    tasks = labels.shape[1]
    correlation = np.eye(tasks)
    for a in range(tasks):
        for b in range(a):
            pair = labels[~np.isnan(labels[:, [a, b]]).any(1)][:, [a, b]].astype(np.float64)
            varies = len(pair) > 1 and (pair.std(0) > 0).all()
            value = np.corrcoef(pair.T)[0, 1] if varies else np.nan
            correlation[a, b] = correlation[b, a] = value
    return correlation
