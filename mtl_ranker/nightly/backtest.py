"""A rolling-origin backtest: each day of a span is ranked by the model of the night before.

Three policies rank the same days: `kept` uses the first night's champion on all days; `champion`
changes the model only if a challenger is promoted (`promotion.py`); `retrained` uses the winner of
every night. The first champion is the first night's winner if it is better than the base rate and
item popularity, else item popularity, as on a first night.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta

import numpy as np
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.criterion import WORST, bounded
from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import (
    NO_VARIANCE,
    Judged,
    Part,
    compare,
    judge,
    model_quality,
    pooled_spread,
)
from mtl_ranker.evaluation.metrics import Metrics, evaluate_all, quality_metric
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.days import days_between, needed_days, split_days
from mtl_ranker.features.examples import build_examples, soft_objectives
from mtl_ranker.features.lists import list_ids
from mtl_ranker.logs.actions import final_day
from mtl_ranker.logs.contract import label_actions
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.models.objectives import Task
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.plan import Origin, PastNight, plan_training, with_prior
from mtl_ranker.nightly.popularity import name_of
from mtl_ranker.nightly.promotion import compare_artifacts, seed_values
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
        gains: (policy, objective) → quality over all days minus that of `kept` on the same rows
            (`gains_over_kept`), judged together.
    """

    days: list[date]
    replayed: list[Replayed]
    promotions: dict[date, str]
    gains: dict[tuple[str, str], Judged]

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
    def key(self) -> tuple[date, str]:
        """Differs between all models of a backtest."""
        return self.night, self.label

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
    ranked: dict[str, list[Ranked]] = {policy: [] for policy in POLICIES}
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
            ranked[policy].append(Ranked(model, predicted))
            metrics = evaluate_all(tasks, labels[-1], predicted, lists[-1])
            replayed.append(Replayed(day, policy, model.night, model.label, metrics))
        origin = "" if plan.start is None else f", continued from that {plan.start.version}"
        on_step(f"{day}: night of {night}, {suite.winner.label}{origin}")
    clusters = Clusters.of(np.concatenate(users), np.concatenate(lists))
    gains = gains_over_kept(project, labels, clusters, ranked)
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


@dataclass(frozen=True)
class Ranked:
    """One day under one policy: the model, and its predictions [n, T] for the day's rows."""

    model: NightModel
    prediction: np.ndarray


def gains_over_kept(
    project: Project,
    labels: Sequence[np.ndarray],
    clusters: Clusters,
    ranked: Mapping[str, Sequence[Ranked]],
) -> dict[tuple[str, str], Judged]:
    """The paired difference between each policy and `kept` over all days' rows.

    Of the measure by which models are compared (`LabelledRows.measure`). The variance of one
    training is that between the seeds of each night's winner, pooled over the nights; a model
    counts with the share of rows that it ranks under one policy and not under the other. One that
    has no seed, as item popularity, has none. Over all policies and objectives the false discovery
    rate is controlled.

    Args:
        labels: [n, T] of each day.
        clusters: users and lists of the N rows of all days.
        ranked: policy → each day.
    """
    together = np.concatenate(labels)
    predicted = {p: np.concatenate([day.prediction for day in ranked[p]]) for p in POLICIES}
    nights = {day.model.key: day.model for day in ranked["retrained"]}
    compared = {}
    for t, task in enumerate(tasks_of(project)):
        rows = LabelledRows.of(task.kind, together[:, t], clusters)
        # The spread over seeds follows below: a policy's days are of several trainings.
        quality = {
            p: bounded(model_quality(rows, [predicted[p][:, t]], fixed=True)) for p in POLICIES
        }
        spread = _spread(task, rows.measure, nights.values())
        known = np.array([np.count_nonzero(~np.isnan(day[:, t])) for day in labels])
        share = known / max(int(known.sum()), 1)
        for policy in POLICIES[1:]:
            trainings = _of_trainings(spread, ranked[policy], ranked["kept"], share)
            difference = compare(quality[policy], quality["kept"])
            compared[policy, task.name] = replace(difference, trainings=trainings)
    return judge(compared, project.promotion.confidence)


def _spread(task: Task, measure: str, models: Iterable[NightModel]) -> Part | None:
    """The variance of one training of the nights' models; None if each is known with one seed."""
    groups = [seed_values(task, measure, model.artifact.seed_metrics) for model in models]
    return pooled_spread(
        [np.maximum(values, WORST) if measure == "r2" else values for values in groups]
    )


def _of_trainings(
    spread: Part | None, policy: Sequence[Ranked], kept: Sequence[Ranked], share: np.ndarray
) -> Part | None:
    """The variance of a difference of policies over seeds: Σ_k w_k² · spread of the models k.

    w_k is the share of rows that the model ranks under `policy` minus that under `kept`. None if
    the spread is needed and unknown.

    Args:
        share: of each day's rows.
    """
    weights: dict[tuple[date, str], float] = {}
    for one, other, part in zip(policy, kept, share, strict=True):
        for model, signed in ((one.model, part), (other.model, -part)):
            if not model.artifact.fixed:
                weights[model.key] = weights.get(model.key, 0.0) + signed
    square = sum(weight**2 for weight in weights.values())
    if square == 0:
        return NO_VARIANCE
    return None if spread is None else Part(spread.variance * square, spread.df)


def measures(project: Project) -> dict[str, list[str]]:
    """Objective → the metrics that are plotted over days."""
    return {
        o.name: ["gauc", "auc"] if quality_metric(o.kind) == "auc" else ["r2"]
        for o in project.objectives
    }
