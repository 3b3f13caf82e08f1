"""Does the challenger deserve to be champion? Evidence on the same held-out rows, in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl_ranker.config import Project
from mtl_ranker.evaluation.intervals import Interval, interval, quality_draws, user_draws
from mtl_ranker.evaluation.metrics import ece
from mtl_ranker.objectives import Task
from mtl_ranker.serving import Serving


@dataclass(frozen=True)
class Decision:
    promoted: bool
    reason: str
    blended: Interval | None = None
    differences: dict[str, Interval] | None = None
    serving: Serving | None = None


def decide(
    project: Project,
    tasks: list[Task],
    labels: np.ndarray,
    user: np.ndarray,
    challenger: np.ndarray,
    champion: np.ndarray,
    serving: Serving | None = None,
) -> Decision:
    """Compare two models' predictions [N, T] on the same rows by a paired user bootstrap.

    Promoted only when the blended quality (weighted mean of AUC and R²) is better beyond doubt, no
    objective is worse beyond doubt, every binary objective's ECE is within bounds, and the saved
    challenger was served within budget (`serving`, if it was measured).
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
    against = []
    if worse:
        against.append(f"the challenger is significantly worse on {', '.join(worse)}")
    against += unfit(project, tasks, labels, challenger, serving)
    rule = project.promotion
    enough = overall.low > 0 if rule.better_beyond_doubt else overall.low > -rule.tolerance
    if not worse and not enough:
        limit = "beyond doubt" if rule.better_beyond_doubt else f"above {-rule.tolerance:+.4f}"
        against.append(
            "the challenger's blended quality differs by "
            f"{overall.value:+.4f} [{overall.low:+.4f}, {overall.high:+.4f}], not {limit}"
        )
    if against:
        reason = "kept the champion: " + "; ".join(against)
        return Decision(False, reason, overall, differences, serving)
    reason = (
        f"promoted: blended quality better by {overall.value:+.4f} "
        f"[{overall.low:+.4f}, {overall.high:+.4f}] and no objective significantly worse"
    )
    return Decision(True, reason, overall, differences, serving)


def unfit(
    project: Project,
    tasks: list[Task],
    labels: np.ndarray,
    challenger: np.ndarray,
    serving: Serving | None,
) -> list[str]:
    """What speaks against a model by itself, whoever is champion: calibration, serving."""
    against, uncalibrated, rule = [], [], project.promotion
    for t, task in enumerate(tasks):
        known = ~np.isnan(labels[:, t])
        if task.kind == "binary" and known.any():
            error = ece(labels[known, t], challenger[known, t])
            if error > rule.max_calibration_error:
                uncalibrated.append(f"{task.name} ({error:.3f})")
    if uncalibrated:
        against.append(
            f"its calibration error is above {rule.max_calibration_error} on "
            f"{', '.join(uncalibrated)}"
        )
    if serving is not None:
        if serving.failed is not None:
            against.append(f"its artifact does not serve in a fresh process: {serving.failed}")
        if serving.seconds_per_million > rule.max_seconds_per_million:
            against.append(
                f"it takes {serving.seconds_per_million:,.0f} s to score a million rows, allowed "
                f"{rule.max_seconds_per_million:,.0f} (promotion.max_seconds_per_million)"
            )
        if serving.megabytes > rule.max_megabytes:
            against.append(
                f"it is {serving.megabytes:,.1f} MB, allowed {rule.max_megabytes:,.0f} "
                "(promotion.max_megabytes)"
            )
    return against
