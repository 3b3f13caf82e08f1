"""Search of blend weights: the quality of each choice, and the choice that a trade-off selects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from math import isfinite

import numpy as np
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.evaluation.metrics import PredictedRows
from mtl_ranker.evaluation.pareto import (
    Point,
    best_on_both,
    keeping,
    paired_gains,
    pareto,
    propose,
    quality_of,
    try_weights,
)
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.days import span, split_days
from mtl_ranker.features.lists import list_ids
from mtl_ranker.nightly.build import model_examples
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.blend import BlendChoice
from mtl_ranker.training.batches import label_matrix

GROUPS = ("engagement", "satisfaction")


@dataclass(frozen=True)
class Blend:
    """The Pareto front on half of the test days' users, and two choices on both halves.

    Attributes:
        points: all choices, on the users that weights are chosen on.
        current, proposed: on the same users.
        current_on_test, proposed_on_test: on the other users.
        better: another choice that is better than the current one for both groups of objectives, on
            both halves of the users, if there is one.
        test_days: the days of the rows.
    """

    how: str
    points: list[Point]
    current: Point
    proposed: Point
    current_on_test: Point
    proposed_on_test: Point
    better: BothBetter | None = None
    test_days: str = ""

    @property
    def worse_on_test(self) -> bool:
        """Whether the proposal is worse for both groups on the other users."""
        proposed, current = self.proposed_on_test, self.current_on_test
        return all(getattr(proposed, group) < getattr(current, group) for group in GROUPS)


@dataclass(frozen=True)
class BothBetter:
    """A choice of weights, with its gains over the current one on users it was not chosen on."""

    point: Point
    current: dict[str, float]
    engagement: Interval
    satisfaction: Interval

    def __str__(self) -> str:
        def words(weights: Mapping[str, float]) -> str:
            return ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())

        return (
            f"the weights {words(self.point.weights)} are better than {words(self.current)} for "
            f"both groups: NDCG@10 by list of engagement {self.engagement.signed}, of satisfaction "
            f"{self.satisfaction.signed}, on users that they were not chosen on; "
            "`mtl-ranker blend` proposes weights"
        )


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
    rows = predicted_by(artifact, model_examples(context, artifact, days.test), context)
    missing = unmeasured_groups(artifact.project, rows)
    if missing:
        raise ProjectError(
            f"no objective of {' and '.join(missing)} can be measured on {span(days.test)}, so "
            "weights cannot be compared; allowed: a --date with positive labels of both groups"
        )
    asked = project.scoring.model_dump(include={"maximise", "keep"})
    scoring = artifact.project.scoring.model_copy(update=asked)
    own = artifact.project.model_copy(update={"scoring": scoring})
    found = trade_off(own, rows, search, on_point, project.blend_weights)
    return replace(found, test_days=span(days.test))


def unmeasured_groups(project: Project, rows: PredictedRows) -> list[str]:
    """Groups of objectives without a list that has two rows and a positive label to rank by."""
    point = quality_of(project, rows, project.blend_weights, project.scoring.blend)
    return [group for group in GROUPS if np.isnan(getattr(point, group))]


def trade_off(
    project: Project,
    rows: PredictedRows,
    search: BlendSearch = BlendSearch(),
    on_point: Callable[[], None] | None = None,
    base: Mapping[str, float] | None = None,
) -> Blend:
    """The front on every second user, and the current and the proposed choice on all others.

    Args:
        rows: held out, with calibrated predictions.
        base: weights of whose quality `[scoring] keep` is a share; the project's by default.
    """
    method, weights = search.how or project.scoring.blend, project.blend_weights
    even = np.unique(rows.user, return_inverse=True)[1] % 2 == 0
    chosen_on, evaluated_on = rows.where(even), rows.where(~even)
    points = try_weights(project, chosen_on, method, search.tries, on_point)
    points = pareto([*points, quality_of(project, chosen_on, weights, method)])
    current = points[-1]
    if project.scoring.maximise is None:
        proposed = propose(points, search.satisfaction_share)
    else:
        kept_from = quality_of(project, chosen_on, dict(base or weights), method)
        proposed = _kept(project, points, kept_from)
    better = None
    promising = best_on_both(points, current)
    if promising is not None:
        choices = (promising.weights, weights)
        engagement, satisfaction = paired_gains(
            project, evaluated_on, choices, method, project.promotion.confidence
        )
        if engagement.low > 0 and satisfaction.low > 0:
            better = BothBetter(promising, weights, engagement, satisfaction)
    return Blend(
        how=method,
        points=points,
        current=current,
        proposed=proposed,
        current_on_test=quality_of(project, evaluated_on, weights, method),
        proposed_on_test=quality_of(project, evaluated_on, proposed.weights, method),
        better=better,
    )


def _kept(project: Project, points: list[Point], current: Point) -> Point:
    """The point that `[scoring] maximise` and `keep` ask for."""
    assert project.scoring.maximise is not None
    (share,) = project.scoring.keep.values()
    return keeping(points, current, project.scoring.maximise, share)


@dataclass(frozen=True)
class KeptBlend:
    """The weights that `[scoring] maximise` and `keep` choose on validation days.

    Attributes:
        engagement, satisfaction: gains over the project's weights on the test days.
    """

    choice: BlendChoice
    engagement: Interval
    satisfaction: Interval

    def __str__(self) -> str:
        words = ", ".join(f"{name} {weight:.3g}" for name, weight in self.choice.weights.items())
        return (
            f"the model blends with {words} (scoring.maximise); NDCG@10 against scoring.weights on "
            f"the test days: engagement {_with_note(self.engagement)}, satisfaction "
            f"{_with_note(self.satisfaction)}"
        )


def _with_note(gain: Interval) -> str:
    return f"{gain.signed} ({gain.note})" if gain.note else gain.signed


def kept_blend(
    project: Project, validation: PredictedRows, test: PredictedRows, tries: int
) -> KeptBlend | None:
    """Weights chosen on the validation rows, and their gains on the test rows.

    None without `scoring.maximise`, or where a group cannot be measured on either.
    """
    if project.scoring.maximise is None:
        return None
    if unmeasured_groups(project, validation) or unmeasured_groups(project, test):
        return None
    method, weights = project.scoring.blend, project.blend_weights
    current = quality_of(project, validation, weights, method)
    points = try_weights(project, validation, method, tries)
    chosen = _kept(project, points, current).weights
    gains = paired_gains(project, test, (chosen, weights), method, project.promotion.confidence)
    return KeptBlend(BlendChoice(method, chosen, project.scoring.conditional), *gains)


def predicted_by(artifact: RankerArtifact, frame: pl.DataFrame, context: Context) -> PredictedRows:
    """Labels and predictions of raw examples, with the project's lists."""
    names = [task.name for task in artifact.tasks]
    return PredictedRows(
        labels=label_matrix(frame, [LABEL + n for n in names]),
        prediction=artifact.predict_examples(context.workspace, frame).select(names).to_numpy(),
        user=frame["user_id"].to_numpy(),
        lists=list_ids(frame, context.project.log.list_keys),
    )


def check_weights(project: Project, given: Mapping[str, float]) -> dict[str, float]:
    """Weights from the command line, 0 for other objectives.

    Weights of objectives with `good = false` count against, whatever their sign.

    Raises ProjectError for an unknown objective, a weight that is no number, or if all are 0.
    """
    names = [o.name for o in project.objectives]
    for name, weight in given.items():
        if name not in names:
            raise ProjectError(f"--set {name}: no such objective; allowed: {', '.join(names)}")
        if not isfinite(weight):
            raise ProjectError(f"--set {name}: weight {weight:g}; allowed: a number")
    if not any(given.values()):
        raise ProjectError("--set: at least one weight must differ from 0")
    found = {name: float(given.get(name, 0.0)) for name in names}
    return {o.name: found[o.name] if o.good else -abs(found[o.name]) for o in project.objectives}
