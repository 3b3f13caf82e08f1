"""A rolling-origin backtest: each day of a span is ranked by the model of the night before.

Three policies rank the same days: `kept` uses the first night's champion on all days; `champion`
changes the model only if a challenger is promoted (`promotion.py`); `retrained` uses the winner of
every night. The first champion is the first night's winner if it is better than the base rate and
item popularity, else item popularity, as on a first night.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import Interval, compare, model_quality
from mtl_ranker.evaluation.metrics import Metrics, evaluate_all, quality_metric
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.days import days_between, needed_days, split_days
from mtl_ranker.features.examples import build_examples, soft_objectives
from mtl_ranker.features.lists import list_ids
from mtl_ranker.logs.actions import final_day
from mtl_ranker.logs.contract import label_actions
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.plan import Origin, PastNight, plan_training, with_prior
from mtl_ranker.nightly.popularity import name_of
from mtl_ranker.nightly.promotion import compare_artifacts
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.training.batches import label_matrix
from mtl_ranker.training.network import tasks_of

POLICIES = ("kept", "champion", "retrained")


@dataclass(frozen=True)
class Replayed:
    """The metrics of one policy on one day.

    Attributes:
        night: the night whose model ranked the day.
        model: that model's name and seed.
    """

    day: date
    policy: str
    night: date
    model: str
    metrics: Metrics


@dataclass(frozen=True)
class Backtest:
    """Every policy on every day.

    Attributes:
        promotions: day → the reason of the promotion decision of the night before.
        gains: (policy, objective) → quality over all days minus that of `kept` on the same rows,
            with intervals over users.
    """

    days: list[date]
    replayed: list[Replayed]
    promotions: dict[date, str]
    gains: dict[tuple[str, str], Interval]

    def curve(self, policy: str, objective: str, metric: str) -> list[float]:
        """A policy's metric on each day."""
        return [r.metrics[objective][metric] for r in self.replayed if r.policy == policy]


@dataclass(frozen=True)
class NightModel:
    """A night's winner, or item popularity."""

    night: date
    label: str
    artifact: RankerArtifact

    @property
    def as_champion(self) -> Origin:
        """For a night that continues from it."""
        return Origin(f"of {self.night}", self.artifact.fixed, self.artifact.start)


def backtest(
    context: Context,
    first: date,
    last: date,
    on_step: Callable[[str], None] = lambda message: None,
) -> Backtest:
    """Train on the nights before `first`..`last`, and evaluate each day after its night.

    The night of D - 1 trains on the split that ends with D - 1, as `nightly` does; its winner on
    validation ranks day D. With `training.start = "champion"` it continues from the champion of the
    policy `champion`. `on_step` is called with a message after each day. Raises ProjectError if a
    day is missing or its night has no split.
    """
    project = context.project
    days = days_between(context.source.days(), first, last)
    nights = [day - timedelta(days=1) for day in days]
    _check_final(context, days[-1])
    _check_nights(context, first, nights)
    tasks = tasks_of(project)
    names = [task.name for task in tasks]
    policies: dict[str, NightModel] = {}
    replayed: list[Replayed] = []
    promotions: dict[date, str] = {}
    history: list[PastNight] = []
    predictions: dict[str, list[np.ndarray]] = {policy: [] for policy in POLICIES}
    labels, users, lists = [], [], []
    for day, night in zip(days, nights, strict=True):
        build_split(context, night)
        previous = policies.get("champion")
        known = None if previous is None else previous.as_champion
        plan = plan_training(context, night, known, history)
        if previous is not None and soft_objectives(project):
            plan = with_prior(plan, context, f"of {previous.night}", previous.artifact)
        suite = train_suite(context, night, plan=plan)
        history.append(PastNight(suite.days.test[-1], plan.full, suite.behind))
        newest = NightModel(night, suite.winner.label, suite.winner.artifact)
        champion = previous
        current = None if champion is None else champion.artifact
        decision = compare_artifacts(context, night, newest.artifact, current)
        promotions[day] = decision.reason
        if decision.promoted:
            champion = newest
        elif decision.fallback is not None:
            champion = NightModel(night, name_of(decision.fallback), decision.fallback)
        assert champion is not None  # a first model that is not promoted comes with a fallback
        kept = policies.get("kept", champion)
        policies = dict(zip(POLICIES, (kept, champion, newest), strict=True))
        frame = _examples_of(context, day)
        labels.append(label_matrix(frame, [LABEL + n for n in names]))
        users.append(frame["user_id"].to_numpy())
        lists.append(list_ids(frame, project.log.list_keys))
        for policy, model in policies.items():
            found = model.artifact.predict_examples(context.workspace, frame)
            predicted = found.select(names).to_numpy()
            predictions[policy].append(predicted)
            metrics = evaluate_all(tasks, labels[-1], predicted, lists[-1])
            replayed.append(Replayed(day, policy, model.night, model.label, metrics))
        origin = "" if plan.start is None else f", continued from that {plan.start.version}"
        on_step(f"{day}: night of {night}, {suite.winner.label}{origin}")
    clusters = Clusters.of(np.concatenate(users), np.concatenate(lists))
    gains = _gains(project, np.concatenate(labels), clusters, predictions)
    return Backtest(days, replayed, promotions, gains)


def _check_nights(context: Context, first: date, nights: Sequence[date]) -> None:
    """Raises ProjectError unless every night is a day of the log with a split that ends there."""
    available = context.source.days()
    for night in nights:
        if night not in available:
            raise ProjectError(
                f"--from {first}: the night before needs {night}, which the log lacks; "
                f"days found: {available[0]} to {available[-1]}"
            )
        split_days(context.project, needed_days(context.project, available, night), night)


def _check_final(context: Context, day: date) -> None:
    """Raises ProjectError unless the labels of the day are final on a day of the log."""
    final = final_day(context.project, label_actions(context.project), day)
    last = context.source.days()[-1]
    if final > last:
        raise ProjectError(
            f"--to {day}: its labels are final on {final}, and the log ends on {last}; allowed: an "
            "earlier day"
        )


def _examples_of(context: Context, day: date) -> pl.DataFrame:
    """The examples of a day after a night's split, with final labels, built if they are missing."""
    final = final_day(context.project, label_actions(context.project), day)
    for each in days_between(context.source.days(), day, final):
        ingest_day(context, each)
        aggregate_day(context, each)
    build_examples(context, day, final)
    return context.workspace.scan("examples", [day]).collect(engine="streaming")


def _gains(
    project: Project,
    labels: np.ndarray,
    clusters: Clusters,
    predictions: Mapping[str, Sequence[np.ndarray]],
) -> dict[tuple[str, str], Interval]:
    """The paired difference between each policy and `kept` over all days' rows.

    Of the measure by which models are compared (`LabelledRows.measure`).

    Args:
        labels: [N, T] of all days.
        clusters: users and lists of the N rows.
        predictions: policy → [n, T] of each day.
    """
    predicted = {policy: np.concatenate(predictions[policy]) for policy in POLICIES}
    gains = {}
    for t, objective in enumerate(project.objectives):
        rows = LabelledRows.of(objective.kind, labels[:, t], clusters)
        quality = {p: model_quality(rows, [predicted[p][:, t]]) for p in POLICIES}
        for policy in POLICIES[1:]:
            difference = compare(quality[policy], quality["kept"])
            gains[policy, objective.name] = difference.interval(project.promotion.confidence)
    return gains


def measures(project: Project) -> dict[str, list[str]]:
    """Objective → the metrics that are plotted over days."""
    return {
        o.name: ["gauc", "auc"] if quality_metric(o.kind) == "auc" else ["r2"]
        for o in project.objectives
    }
