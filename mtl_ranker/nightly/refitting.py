"""Whether a refit model replaces its original: unless it is significantly worse or uncalibrated.

Its validation days are training days, so the decision is made on days that neither was
trained on: the test days, on which the winner among models is never chosen.
"""

from __future__ import annotations

from mtl_ranker.config import Project
from mtl_ranker.evaluation.calibration_bounds import calibrated, out_of_bounds
from mtl_ranker.evaluation.influence import MEASURE_NAMES
from mtl_ranker.evaluation.intervals import compare
from mtl_ranker.models.objectives import Task
from mtl_ranker.nightly.results import ModelRun, predicted_rows, qualities
from mtl_ranker.training.dataset import HeldOut


def harm_of_refit(
    project: Project, tasks: list[Task], held_out: HeldOut, run: ModelRun, again: ModelRun
) -> list[str]:
    """What is worse after the refit on the test days, in words.

    An objective whose quality is significantly worse, or whose calibration breaks the bounds of
    `[promotion]` that it kept before.
    """
    rule = project.promotion
    quality = qualities(tasks, {"before": [run], "after": [again]}, held_out)
    found = []
    for task in tasks:
        if ("after", task.name) not in quality:  # without labels on the test days
            continue
        change = compare(quality["after", task.name], quality["before", task.name])
        interval = change.interval(rule.confidence)
        if interval.high < 0:
            measure = MEASURE_NAMES[quality["after", task.name].measure]
            found.append(f"{task.name}: {measure} {interval.signed}")
    before, after = (
        calibrated(tasks, predicted_rows(held_out, r.test_prediction), rule.confidence)
        for r in (run, again)
    )
    for one, other in zip(before, after, strict=True):
        if not out_of_bounds([one], rule):
            found += out_of_bounds([other], rule)
    return found
