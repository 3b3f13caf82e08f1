"""The effect of sharing on each objective: a model against the one that shares nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_ranker.evaluation.influence import MEASURE_NAMES
from mtl_ranker.evaluation.intervals import Interval, Quality, compare, judge

VERDICTS = {1: "helped", -1: "hurt", 0: "undecided"}


@dataclass(frozen=True, kw_only=True)
class SharingGain:
    """The multi-task gain: quality of `model` minus that of `reference` on one objective.

    Attributes:
        gain: with the interval of this comparison alone.
        p_value: adjusted for all comparisons of the table; NaN without a verdict.
        verdict: helped, hurt (negative transfer) or undecided, also where none can be given.
        note: why there is no verdict on the model; empty if there is one.
    """

    model: str
    reference: str
    objective: str
    measure: str
    gain: Interval
    p_value: float
    verdict: str
    note: str = ""

    @property
    def words(self) -> str:
        """The verdict in words."""
        if self.note:
            return self.note
        return {
            "helped": "sharing helped",
            "hurt": "sharing hurt: negative transfer",
            "undecided": "no significant difference",
        }[self.verdict]

    def __str__(self) -> str:
        effect = {
            "helped": "sharing helped",
            "hurt": "sharing hurt (negative transfer)",
            "undecided": "sharing made no significant difference to",
        }[self.verdict]
        size = f"{MEASURE_NAMES[self.measure]} {self.gain.signed}"
        if self.note:
            return f"{self.model} on {self.objective}, {self.note} ({size})"
        return f"{self.model}: {effect} {self.objective}, {size} against {self.reference}"


def sharing_gains(
    qualities: Mapping[tuple[str, str], Quality],
    reference: str,
    confidence: float,
    untrained: Mapping[tuple[str, str], str] | None = None,
) -> list[SharingGain]:
    """The gain of every other model over `reference` on each objective.

    Over all of them the false discovery rate is controlled at 1 - `confidence`.

    Args:
        qualities: (model, objective) → quality, all on the same rows.
        untrained: (model, objective) → why its training had not ended; no verdict rests on it.
    """
    stopped = untrained or {}
    keys = [key for key in qualities if key[0] != reference]
    compared = {key: compare(qualities[key], qualities[reference, key[1]]) for key in keys}
    notes = {key: stopped.get(key) or stopped.get((reference, key[1]), "") for key in keys}
    return [
        SharingGain(
            model=model,
            reference=reference,
            objective=objective,
            measure=qualities[model, objective].measure,
            gain=judged.interval,
            p_value=judged.p_value,
            verdict=VERDICTS[judged.verdict],
            note=judged.note,
        )
        for (model, objective), judged in judge(compared, confidence, notes).items()
    ]


def without_verdict(gains: Sequence[SharingGain]) -> list[str]:
    """Why comparisons have no verdict: each reason once, with what it concerns."""
    found: dict[str, list[SharingGain]] = {}
    for gain in gains:
        if gain.note:
            found.setdefault(gain.note, []).append(gain)
    lines = []
    for note, concerned in found.items():
        models = ", ".join(dict.fromkeys(g.model for g in concerned))
        objectives = ", ".join(dict.fromkeys(g.objective for g in concerned))
        lines.append(f"{models} on {objectives}: {note}")
    return lines


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
