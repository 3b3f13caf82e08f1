"""`mtl-ranker blend`: what each choice of weights gives, and the choice stored with the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.metrics import PredictedRows
from mtl_ranker.evaluation.pareto import (
    Point,
    pareto,
    propose,
    quality_of,
    try_weights,
)
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.days import split_days
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.training.batches import label_matrix


@dataclass(frozen=True)
class Blend:
    """The front over half of the test days' users; current and proposed weights on both halves."""

    how: str
    points: list[Point]
    current: Point
    proposed: Point
    current_on_test: Point
    proposed_on_test: Point


@dataclass(frozen=True)
class BlendSearch:
    """Which weights are tried, and which choice among them is proposed.

    Attributes:
        satisfaction_share: the trade-off: 0 = engagement only, 1 = satisfaction only.
        how: weighted_sum or weighted_product; None for the model's own.
        tries: choices of weights.
    """

    satisfaction_share: float = 0.5
    how: str | None = None
    tries: int = 200


def find_blend(
    context: Context,
    day: date,
    artifact: RankerArtifact,
    search: BlendSearch = BlendSearch(),
    on_point: Callable[[], None] | None = None,
) -> Blend:
    """Try weights on the test days of the split that ends with D, and propose one choice.

    Test days, because a winner that was refit has learned from the validation days. Weights are
    tried on every other user, and the proposal is then evaluated once on the others.
    Raises ProjectError when the examples are not built or the objectives are of one group.
    """
    project, workspace = context.project, context.workspace
    groups = {objective.group for objective in project.objectives}
    if len(groups) < 2:
        raise ProjectError(
            f"objectives: all are of group {groups.pop()!r}; a trade-off needs both engagement "
            "and satisfaction"
        )
    names = [task.name for task in artifact.tasks]
    if names != [objective.name for objective in project.objectives]:
        raise ProjectError(
            f"the model's objectives are {', '.join(names)}, the project's "
            f"{', '.join(o.name for o in project.objectives)}; train again first"
        )
    days = split_days(project, workspace.days("events"), day)
    unbuilt = sorted(set(days.test) - set(workspace.days("examples")))
    if unbuilt:
        raise ProjectError(
            f"examples of {unbuilt[0]} are not built; run `mtl-ranker features` first"
        )
    method, weights = search.how or artifact.project.scoring.blend, artifact.project.blend_weights
    rows = _predicted(artifact, workspace.scan("examples", days.test).collect(engine="streaming"))
    even = np.unique(rows.user, return_inverse=True)[1] % 2 == 0
    chosen_on, evaluated_on = rows.where(even), rows.where(~even)
    points = try_weights(project, chosen_on, method, search.tries, on_point)
    points = pareto([*points, quality_of(project, chosen_on, weights, method)])
    proposed = propose(points, search.satisfaction_share)
    return Blend(
        how=method,
        points=points,
        current=points[-1],
        proposed=proposed,
        current_on_test=quality_of(project, evaluated_on, weights, method),
        proposed_on_test=quality_of(project, evaluated_on, proposed.weights, method),
    )


def _predicted(artifact: RankerArtifact, frame: pl.DataFrame) -> PredictedRows:
    names = [task.name for task in artifact.tasks]
    return PredictedRows(
        labels=label_matrix(frame, [LABEL + n for n in names]),
        prediction=artifact.predict(frame).select(names).to_numpy(),
        user=frame["user_id"].to_numpy(),
    )


def check_weights(project: Project, given: Mapping[str, float]) -> dict[str, float]:
    """Weights given by hand. Raises ProjectError for an unknown objective or a negative weight."""
    names = [o.name for o in project.objectives]
    for name, weight in given.items():
        if name not in names:
            raise ProjectError(f"--set {name}: no such objective; allowed: {', '.join(names)}")
        if not 0 <= weight < float("inf"):
            raise ProjectError(f"--set {name}: weight {weight:g}; allowed: a number of 0 or more")
    if not any(weight > 0 for weight in given.values()):
        raise ProjectError("--set: at least one weight must be above 0")
    return {name: float(given.get(name, 0.0)) for name in names}
