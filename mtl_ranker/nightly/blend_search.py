"""Search of blend weights: the quality of each choice, and the choice that a trade-off selects."""

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
from mtl_ranker.nightly.build import model_examples
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.training.batches import label_matrix


@dataclass(frozen=True)
class Blend:
    """The Pareto front on half of the test days' users, and two choices on both halves.

    Attributes:
        points: all choices, on the users that weights are chosen on.
        current, proposed: on the same users.
        current_on_test, proposed_on_test: on the other users.
    """

    how: str
    points: list[Point]
    current: Point
    proposed: Point
    current_on_test: Point
    proposed_on_test: Point


@dataclass(frozen=True)
class BlendSearch:
    """Which weights are tried, and which of them are proposed.

    Attributes:
        satisfaction_share: the trade-off: 0 = engagement only, 1 = satisfaction only.
        how: weighted_sum or weighted_product; None for the model's current one.
        tries: number of choices.
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

    On test days, because a refit winner was trained on the validation days too. Weights are tried
    on every second user, and the proposal is evaluated once on the others. `on_point` is called
    after each choice. Raises ProjectError if the examples are not built, the objectives are of one
    group, or the model's objectives are not the project's.
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
    method, weights = search.how or artifact.project.scoring.blend, artifact.project.blend_weights
    rows = _predicted(artifact, model_examples(context, artifact, days.test))
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
    """Weights from the command line, 0 for other objectives.

    Raises ProjectError for an unknown objective, a negative weight, or if no weight is positive.
    """
    names = [o.name for o in project.objectives]
    for name, weight in given.items():
        if name not in names:
            raise ProjectError(f"--set {name}: no such objective; allowed: {', '.join(names)}")
        if not 0 <= weight < float("inf"):
            raise ProjectError(f"--set {name}: weight {weight:g}; allowed: a number of 0 or more")
    if not any(weight > 0 for weight in given.values()):
        raise ProjectError("--set: at least one weight must be above 0")
    return {name: float(given.get(name, 0.0)) for name in names}
