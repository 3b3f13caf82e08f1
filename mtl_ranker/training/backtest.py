"""A rolling-origin back-test: every day of a span, ranked by what the night before knew.

Three policies live the same days: the first night's model `kept` for ever; the `champion`, which a
challenger replaces only on evidence (`promotion.py`); and the model `retrained` every night.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np

from mtl_ranker.artifact import RankerArtifact
from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.comparison import compare_artifacts
from mtl_ranker.evaluation.intervals import Interval, interval, quality_draws, user_draws
from mtl_ranker.evaluation.metrics import quality_metric
from mtl_ranker.features.queries import LABEL, aggregate_day, build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import Source
from mtl_ranker.training.batches import label_matrix
from mtl_ranker.training.suite import (
    Metrics,
    evaluate_all,
    needed_days,
    split_days,
    tasks_of,
    train_suite,
)
from mtl_ranker.workspace import Workspace

POLICIES = ("kept", "champion", "retrained")


@dataclass(frozen=True)
class Lived:
    """One policy on one day: which night's model ranked it, and how well."""

    day: date
    policy: str
    night: date
    model: str
    metrics: Metrics


@dataclass(frozen=True)
class Backtest:
    """Every policy on every day.

    Attributes:
        promotions: day → the promotion decision of the night before, in words.
        gains: (policy, objective) → quality over all days minus that of `kept`, on the same rows,
            users drawn anew.
    """

    days: list[date]
    lived: list[Lived]
    promotions: dict[date, str]
    gains: dict[tuple[str, str], Interval]

    def curve(self, policy: str, objective: str, metric: str) -> list[float]:
        return [r.metrics[objective][metric] for r in self.lived if r.policy == policy]


def backtest(
    project: Project,
    source: Source,
    workspace: Workspace,
    first: date,
    last: date,
    on_step: Callable[[str], None] | None = None,
) -> Backtest:
    """Live the nights before `first`..`last`, and look at each day once, after it.

    The night of D - 1 trains on the split that ends with D - 1, as `nightly` does; its winner on
    validation ranks day D. Raises ProjectError when a day is missing or its night has no split.
    """
    available = source.days()
    days = source.days_between(first, last)
    nights = [day - timedelta(days=1) for day in days]
    for night in nights:
        if night not in available:
            raise ProjectError(
                f"--from {first}: the night before needs {night}, which the log lacks; "
                f"days found: {available[0]} to {available[-1]}"
            )
        split_days(project, needed_days(project, available, night), night)
    tell = on_step or (lambda words: None)
    for day in sorted({d for at in [*nights, *days] for d in needed_days(project, available, at)}):
        ingest_day(project, source, workspace, day)
        aggregate_day(project, source, workspace, day)
    tasks = tasks_of(project)
    names = [task.name for task in tasks]
    kept: tuple[date, str, RankerArtifact] | None = None
    champion: tuple[date, str, RankerArtifact] | None = None
    lived: list[Lived] = []
    promotions: dict[date, str] = {}
    seen: dict[str, list[np.ndarray]] = {policy: [] for policy in POLICIES}
    labels, users = [], []
    for day, night in zip(days, nights, strict=True):
        split = split_days(project, needed_days(project, available, night), night)
        for row_day in [*split.train, *split.validate, *split.test, day]:
            build_examples(project, source, workspace, row_day)
        suite = train_suite(project, workspace, night)
        fresh = (night, suite.winner.label, suite.winner.artifact)
        if kept is None or champion is None:
            kept = champion = fresh
            promotions[day] = "the first model is champion"
        else:
            decision = compare_artifacts(project, workspace, night, fresh[2], champion[2])
            promotions[day] = decision.reason
            champion = fresh if decision.promoted else champion
        frame = workspace.scan("examples", [day]).collect(engine="streaming")
        label = label_matrix(frame, [LABEL + n for n in names])
        user = frame["user_id"].to_numpy()
        labels.append(label)
        users.append(user)
        for policy, (at, model, artifact) in zip(POLICIES, (kept, champion, fresh), strict=True):
            predicted = artifact.predict(frame).select(names).to_numpy()
            seen[policy].append(predicted)
            metrics = evaluate_all(tasks, label, predicted, user)
            lived.append(Lived(day, policy, at, model, metrics))
        tell(f"{day}: night of {night}, {suite.winner.label}")
    gains = _gains(project, np.concatenate(labels), np.concatenate(users), seen)
    return Backtest(days, lived, promotions, gains)


def _gains(
    project: Project,
    labels: np.ndarray,
    users: np.ndarray,
    seen: Mapping[str, Sequence[np.ndarray]],
) -> dict[tuple[str, str], Interval]:
    """Each policy against `kept` over all days' rows: AUC (or R²), paired, users drawn anew."""
    weights = user_draws(users, project.promotion.bootstrap)
    ones = np.ones((1, len(users)), np.float32)
    found = {}
    base = np.concatenate(seen["kept"])
    for policy in POLICIES[1:]:
        own = np.concatenate(seen[policy])
        for t, objective in enumerate(project.objectives):
            args = objective.kind, labels[:, t]
            draws = quality_draws(*args, own[:, t], weights)
            draws = draws - quality_draws(*args, base[:, t], weights)
            value = quality_draws(*args, own[:, t], ones) - quality_draws(*args, base[:, t], ones)
            found[policy, objective.name] = interval(
                float(value[0]), draws, project.promotion.confidence
            )
    return found


def measures(project: Project) -> dict[str, list[str]]:
    """The curves worth drawing of each objective."""
    return {
        o.name: ["auc", "gauc"] if quality_metric(o.kind) == "auc" else ["r2"]
        for o in project.objectives
    }
