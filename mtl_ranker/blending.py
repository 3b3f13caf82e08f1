"""`mtl-ranker blend`: what each choice of weights gives, and the choice stored with the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np

from mtl_ranker.artifact import RankerArtifact
from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation import plots
from mtl_ranker.evaluation.blend import Point, pareto, propose, quality_of, search
from mtl_ranker.features.queries import LABEL
from mtl_ranker.training.batches import label_matrix
from mtl_ranker.training.suite import split_days
from mtl_ranker.workspace import Workspace


@dataclass(frozen=True)
class Blend:
    """The front over half of the test days' users; current and proposed weights on both halves."""

    how: str
    points: list[Point]
    current: Point
    proposed: Point
    current_on_test: Point
    proposed_on_test: Point


def find_blend(
    project: Project,
    workspace: Workspace,
    day: date,
    artifact: RankerArtifact,
    satisfaction_share: float = 0.5,
    how: str | None = None,
    tries: int = 200,
    on_point: Callable[[], None] | None = None,
) -> Blend:
    """Try weights on the test days of the split that ends with D, and propose one choice.

    Test days, because a winner that was refit has learned from the validation days. Weights are
    tried on every other user, and the proposal is then looked at once on the others.
    Raises ProjectError when the examples are not built or the objectives are of one group.
    """
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
    method = how or artifact.project.scoring.blend
    weights = artifact.project.blend_weights

    unbuilt = sorted(set(days.test) - set(workspace.days("examples")))
    if unbuilt:
        raise ProjectError(
            f"examples of {unbuilt[0]} are not built; run `mtl-ranker features` first"
        )
    frame = workspace.scan("examples", days.test).collect(engine="streaming")
    labels, user = label_matrix(frame, [LABEL + n for n in names]), frame["user_id"].to_numpy()
    predicted = artifact.predict(frame).select(names).to_numpy()
    even = np.unique(user, return_inverse=True)[1] % 2 == 0
    chosen_on, looked_at = ((labels[half], predicted[half], user[half]) for half in (even, ~even))
    points = search(project, *chosen_on, method, tries, on_point)
    current = quality_of(project, *chosen_on, weights, method)
    points = pareto([*points, current])
    proposed = propose(points, satisfaction_share)
    return Blend(
        method,
        points,
        points[-1],
        proposed,
        quality_of(project, *looked_at, weights, method),
        quality_of(project, *looked_at, proposed.weights, method),
    )


def write_blend(found: Blend, workspace: Workspace, version: str, day: date) -> Path:
    """The front as `blends/D.json` and `blends/D.png`; the picture's path."""
    title = f"model version {version}, test days up to {day}, {found.how}"
    figure = plots.pareto_front(
        found.points, {"now": found.current, "proposed": found.proposed}, title
    )
    content = asdict(found) | {"version": version, "day": str(day)}
    workspace.publish_file(f"blends/{day}.json", json.dumps(content, indent=1))
    return workspace.publish_file(f"blends/{day}.png", plots.png(figure))


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
