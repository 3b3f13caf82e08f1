"""Does the challenger deserve to be champion? Evidence on the same held-out rows, in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl_ranker.config import Project
from mtl_ranker.evaluation.intervals import Interval, interval, quality_draws, user_draws
from mtl_ranker.evaluation.metrics import ece
from mtl_ranker.objectives import Task


@dataclass(frozen=True)
class Decision:
    promoted: bool
    reason: str
    blended: Interval | None = None
    differences: dict[str, Interval] | None = None


def decide(
    project: Project,
    tasks: list[Task],
    labels: np.ndarray,
    user: np.ndarray,
    challenger: np.ndarray,
    champion: np.ndarray,
) -> Decision:
    """Compare two models' predictions [N, T] on the same rows by a paired user bootstrap.

    Promoted only when the blended quality (weighted mean of AUC and R²) is better beyond doubt, no
    objective is worse beyond doubt, and every binary objective's ECE is within bounds.
    """
    weights = user_draws(user, project.promotion.bootstrap)
    confidence = project.promotion.confidence
    total, blended, differences = 0.0, np.zeros(len(weights)), {}
    ones = np.ones((1, len(user)), np.float32)
    blended_value = 0.0
    for t, task in enumerate(tasks):
        label = labels[:, t]
        draws = quality_draws(task.kind, label, challenger[:, t], weights)
        draws = draws - quality_draws(task.kind, label, champion[:, t], weights)
        value = float(
            quality_draws(task.kind, label, challenger[:, t], ones)[0]
            - quality_draws(task.kind, label, champion[:, t], ones)[0]
        )
        differences[task.name] = interval(value, draws, confidence)
        if not np.isnan(value):
            blended += task.weight * np.nan_to_num(draws)
            blended_value += task.weight * value
            total += task.weight
    overall = interval(blended_value / max(total, 1e-12), blended / max(total, 1e-12), confidence)
    worse = [name for name, found in differences.items() if found.high < 0]
    uncalibrated = []
    for t, task in enumerate(tasks):
        known = ~np.isnan(labels[:, t])
        if task.kind == "binary" and known.any():
            error = ece(labels[known, t], challenger[known, t])
            if error > project.promotion.max_calibration_error:
                uncalibrated.append(f"{task.name} ({error:.3f})")
    against = []
    if worse:
        against.append(f"the challenger is significantly worse on {', '.join(worse)}")
    if uncalibrated:
        limit = project.promotion.max_calibration_error
        against.append(f"its calibration error is above {limit} on {', '.join(uncalibrated)}")
    if not worse and not overall.low > 0:
        against.append(
            "the challenger's blended quality differs by "
            f"{overall.value:+.4f} [{overall.low:+.4f}, {overall.high:+.4f}], not beyond doubt"
        )
    if against:
        reason = "kept the champion: " + "; ".join(against)
        return Decision(False, reason, overall, differences)
    reason = (
        f"promoted: blended quality better by {overall.value:+.4f} "
        f"[{overall.low:+.4f}, {overall.high:+.4f}] and no objective significantly worse"
    )
    return Decision(True, reason, overall, differences)
