"""Whether a refit model replaces the one that it was made from: if it is not worse.

Its validation days are training days, so the days that neither saw decide: the test days, on which
the winner among models is never chosen. That no harm was found is no evidence where few labels
could show one, so the test is one of non-inferiority: the largest harm that the data allow for must
be below a margin (Piaggio et al., JAMA 2012).
"""

from __future__ import annotations

import numpy as np

from mtl_ranker.config import Project
from mtl_ranker.evaluation.calibration_bounds import calibrated, out_of_bounds
from mtl_ranker.evaluation.influence import MEASURE_NAMES
from mtl_ranker.models.objectives import Task
from mtl_ranker.nightly.promotion import Evidence, compare_models
from mtl_ranker.nightly.results import ModelRun, predicted_rows
from mtl_ranker.training.dataset import HeldOut


def harm_of_refit(
    project: Project, tasks: list[Task], held_out: HeldOut, run: ModelRun, again: ModelRun
) -> list[str]:
    """Why the refit does not replace the model, from the test days, in words; empty if it does.

    It replaces it if the one-sided lower bound of the difference of blended quality (`Comparison`)
    lies above `-promotion.refit_margin`, no objective's quality or log loss is significantly worse,
    and no calibration breaks the bounds of `[promotion]` that it kept before. Where no objective
    has enough labels there is no evidence, and the model before the refit stays. Over users only:
    the two trainings are those of which one will serve.
    """
    rule = project.promotion
    evidence = Evidence(
        tasks=tasks,
        labels=held_out.labels,
        user=held_out.user,
        lists=held_out.lists,
        challenger=again.test_prediction,
        champion=run.test_prediction,
    )
    compared = compare_models(evidence, rule.confidence)
    found = [
        f"{name}: {MEASURE_NAMES[compared.measures[name]]} {difference.signed}"
        for name, difference in compared.differences.items()
        if difference.high < 0
    ]
    found += [
        f"{name}: log loss {difference.signed}"
        for name, difference in compared.losses.items()
        if difference.low > 0
    ]
    if np.isnan(compared.lower):
        found.append(f"no objective has enough labels to judge it ({', '.join(compared.thin)})")
    elif compared.lower <= -rule.refit_margin:
        found.append(
            f"its blended quality differs by {compared.blended.signed}, and a loss of "
            f"{-compared.lower:.4f} cannot be excluded (one-sided {100 * rule.confidence:g} % "
            f"bound; promotion.refit_margin = {rule.refit_margin:g})"
        )
    before, after = (
        calibrated(tasks, predicted_rows(held_out, r.test_prediction), rule.confidence)
        for r in (run, again)
    )
    for one, other in zip(before, after, strict=True):
        if not out_of_bounds([one], rule):
            found += out_of_bounds([other], rule)
    return found
