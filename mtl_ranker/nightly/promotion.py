"""Promotion: whether a challenger replaces the champion, from evidence on the same test rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.calibration_bounds import calibrated, out_of_bounds
from mtl_ranker.evaluation.criterion import LOSS, bounded, comparison_weights
from mtl_ranker.evaluation.influence import MEASURE_NAMES, Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import (
    ONE_SEED,
    Interval,
    Quality,
    compare,
    model_quality,
    weighted_mean,
)
from mtl_ranker.evaluation.metrics import Metrics, PredictedRows
from mtl_ranker.features.columns import EVENT, LABEL
from mtl_ranker.features.days import span, split_days
from mtl_ranker.features.lists import list_ids
from mtl_ranker.logs.contract import label_definition
from mtl_ranker.models.objectives import Task
from mtl_ranker.nightly.build import model_examples, scan_model_examples
from mtl_ranker.nightly.popularity import fit_base_rate, fit_popularity
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.load_test import MEASURED_ROWS, Serving, try_serving
from mtl_ranker.training.batches import label_matrix


@dataclass(frozen=True)
class Decision:
    """Whether the challenger is promoted, and why.

    Attributes:
        blended: difference of the blended quality, challenger minus `against`.
        differences: objective → difference of GAUC by list, AUC or R², challenger minus `against`.
        against: the champion, or the name of a baseline for a first model.
        serving: how the saved challenger was served, if that was measured.
        fallback: a ranker without a trained model that becomes champion, as there is none and the
            challenger was not promoted.
    """

    promoted: bool
    reason: str
    blended: Interval | None = None
    differences: dict[str, Interval] | None = None
    serving: Serving | None = None
    fallback: RankerArtifact | None = None
    against: str = "champion"


@dataclass(frozen=True, kw_only=True)
class ChallengerEvidence:
    """The challenger's predictions on N test rows, and how it was served.

    Attributes:
        labels: [N, T], NaN = missing.
        user: [N].
        lists: [N], equal for rows of the same list.
        challenger: predictions [N, T].
        serving: the saved challenger in a fresh process, if that was measured.
    """

    tasks: Sequence[Task]
    labels: np.ndarray
    user: np.ndarray
    lists: np.ndarray
    challenger: np.ndarray
    serving: Serving | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence(ChallengerEvidence):
    """Both models' predictions on the same test rows.

    Attributes:
        champion: predictions [N, T].
        challenger_fixed: the challenger is this training, not any training with another seed.
        champion_fixed: the champion has no training seed, as item popularity.
        challenger_seeds, champion_seeds: metrics of trainings of the same model with two seeds or
            more, from which the variance of one training is estimated; empty if unknown.
    """

    champion: np.ndarray
    challenger_fixed: bool = False
    champion_fixed: bool = False
    challenger_seeds: Sequence[Metrics] = ()
    champion_seeds: Sequence[Metrics] = ()


@dataclass(frozen=True)
class Baseline:
    """A ranker without a trained model.

    Attributes:
        name: in words.
        prediction: [N, T] on the test rows.
    """

    name: str
    artifact: RankerArtifact
    prediction: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """How much better the challenger is than another model on the same rows.

    Attributes:
        blended: difference of the blended quality: the mean of GAUC by list, AUC and R²
            (`LabelledRows.measure`), each with the objective's weight over the standard error of
            its difference, so that no objective decides by its unit or its noise. NaN if no
            objective can be compared.
        differences: objective → difference of its measure.
        lower: one-sided lower bound of the blended difference, at the same confidence.
        measures: objective → the measure that is compared.
        losses: binary objective → difference of log loss, the guard.
        thin: objectives without enough labels, with what they have and what it takes.
    """

    blended: Interval
    lower: float
    differences: dict[str, Interval]
    measures: dict[str, str]
    losses: dict[str, Interval]
    thin: list[str]

    @property
    def worse(self) -> list[str]:
        """Objectives on which the challenger is significantly worse, or its log loss is."""
        found = [name for name, difference in self.differences.items() if difference.high < 0]
        return found + [
            f"{name} (log loss {difference.signed})"
            for name, difference in self.losses.items()
            if difference.low > 0 and name not in found
        ]


def compare_models(evidence: Evidence, confidence: float) -> Comparison:
    """The differences between challenger and champion, with intervals over users and seeds."""
    tasks, clusters = evidence.tasks, Clusters.of(evidence.user, evidence.lists)
    challenger, champion, losses = [], [], {}
    for t, task in enumerate(tasks):
        rows = LabelledRows.of(task.kind, evidence.labels[:, t], clusters)
        own, other = _both(evidence, t, rows, rows.measure)
        challenger.append(bounded(own))
        champion.append(bounded(other))
        if task.kind == "binary":
            loss = compare(*_both(evidence, t, rows, LOSS))
            losses[task.name] = loss.interval(confidence)
    compared = [compare(a, b) for a, b in zip(challenger, champion, strict=True)]
    weights = comparison_weights(tasks, compared)
    overall = compare(
        weighted_mean(list(zip(weights, challenger, strict=True))),
        weighted_mean(list(zip(weights, champion, strict=True))),
    )
    by_name = {task.name: each for task, each in zip(tasks, compared, strict=True)}
    return Comparison(
        blended=overall.interval(confidence),
        lower=overall.interval(2 * confidence - 1).low,
        differences={name: each.interval(confidence) for name, each in by_name.items()},
        measures={task.name: each.measure for task, each in zip(tasks, challenger, strict=True)},
        losses=losses,
        thin=[
            f"{name} ({each.support})" for name, each in by_name.items() if not each.support.enough
        ],
    )


def decide(project: Project, evidence: Evidence) -> Decision:
    """Compare challenger and champion on the same test rows.

    The challenger is promoted only if the blended quality (`Comparison`) is significantly better,
    no objective is significantly worse, nor its log loss, predictions are calibrated within bounds
    on average, and the saved challenger was served within its limits. With
    `promotion.require_significance = false` the blended quality's interval must lie above
    -`promotion.tolerance`, and no objective's difference below it: an objective that hardly changes
    has so much weight in the blend that it hides what another one loses.
    """
    rule = project.promotion
    found = compare_models(evidence, rule.confidence)
    overall, worse = found.blended, found.worse
    remark = f"; not counted: {', '.join(found.thin)}" if found.thin else ""
    if overall.note == ONE_SEED:
        remark += f"; the intervals cover users only ({ONE_SEED})"
    objections = []
    if worse:
        objections.append(f"the challenger is significantly worse on {', '.join(worse)}")
    objections += unfit(project, evidence)
    if rule.require_spread and overall.note == ONE_SEED:
        objections.append(
            "the spread of training seeds is unknown (promotion.require_spread); it takes two "
            "training.seeds, or training.spread_seeds of 1 or more, or "
            "promotion.require_spread = false to judge by users only"
        )
    lowest = 0.0 if rule.require_significance else 0.0 - rule.tolerance
    enough = overall.low > lowest
    if not worse and np.isnan(overall.value):
        objections.append("no objective can be compared")
    elif not worse and not enough:
        limit = "significant" if rule.require_significance else f"above {lowest:g}"
        objections.append(
            f"the challenger's blended quality differs by {overall.signed}, not {limit}"
        )
    if not rule.require_significance:
        objections += [
            f"the challenger's {MEASURE_NAMES[found.measures[name]]} of {name} differs by "
            f"{each.signed}, below {lowest:g} (promotion.tolerance)"
            for name, each in found.differences.items()
            if each.value < lowest and name not in worse
        ]
    if objections:
        reason = "kept the champion: " + "; ".join(objections) + remark
    else:
        how = "better" if overall.value > 0 else "differs"
        reason = (
            f"promoted: blended quality {how} by {overall.signed} "
            f"and no objective significantly worse{remark}"
        )
    return Decision(not objections, reason, overall, found.differences, evidence.serving)


def _both(evidence: Evidence, t: int, rows: LabelledRows, measure: str) -> tuple[Quality, Quality]:
    """A measure of challenger and champion on objective number t, with their spreads over seeds."""
    task = evidence.tasks[t]
    known, of_champion = (
        seed_values(task, measure, seeds)
        for seeds in (evidence.challenger_seeds, evidence.champion_seeds)
    )
    challenger, champion = [evidence.challenger[:, t]], [evidence.champion[:, t]]
    if evidence.challenger_fixed:
        own = model_quality(rows, challenger, measure, fixed=True)
    else:
        own = _quality(model_quality(rows, challenger, measure), known, of_champion)
    if evidence.champion_fixed:
        return own, model_quality(rows, champion, measure, fixed=True)
    return own, _quality(model_quality(rows, champion, measure), of_champion, known)


def seed_values(task: Task, measure: str, seeds: Sequence[Metrics]) -> np.ndarray:
    """The trainings' values [S] of an objective's measure, without those that are unknown."""
    values = np.array([metrics.get(task.name, {}).get(measure, np.nan) for metrics in seeds])
    return values[~np.isnan(values)]


def _quality(found: Quality, own: np.ndarray, other: np.ndarray) -> Quality:
    """The quality of one training; its variance over seeds is that of two known values or more.

    Args:
        own, other: values of trainings of this model, and of the one it is compared with.
    """
    for values in (own, other):
        if len(values) > 1:
            return replace(found, trainings=values)
    return found


def unfit(project: Project, evidence: ChallengerEvidence) -> list[str]:
    """Objections to a challenger that do not depend on the champion: calibration and serving."""
    rule = project.promotion
    invalid = [
        task.name
        for t, task in enumerate(evidence.tasks)
        if not np.isfinite(evidence.challenger[:, t]).all()
    ]
    if invalid:
        return [f"its predictions of {', '.join(invalid)} are not all finite numbers"]
    rows = PredictedRows(evidence.labels, evidence.challenger, evidence.user, evidence.lists)
    found = calibrated(evidence.tasks, rows, rule.confidence)
    objections = [f"it is not calibrated on {each}" for each in out_of_bounds(found, rule)]
    serving = evidence.serving
    if serving is not None:
        if serving.failed is not None:
            objections.append(f"its artifact does not serve in a fresh process: {serving.failed}")
        if serving.seconds_per_million > rule.max_seconds_per_million:
            objections.append(
                f"it takes {serving.seconds_per_million:,.0f} s to score a million rows, allowed "
                f"{rule.max_seconds_per_million:,.0f} (promotion.max_seconds_per_million)"
            )
        if serving.megabytes > rule.max_megabytes:
            objections.append(
                f"it is {serving.megabytes:,.3g} MB, allowed {rule.max_megabytes:,g} "
                "(promotion.max_megabytes)"
            )
    return objections


def compare_artifacts(
    context: Context,
    day: date,
    challenger: RankerArtifact,
    champion: RankerArtifact | None,
    folder: Path | None = None,
) -> Decision:
    """Predict the test days that end with D with both models, and decide.

    Each model is judged with its own features, on the objectives that both have. Where there is no
    champion, the challenger becomes champion if it is calibrated, serves and is better than the
    base rate and item popularity; else popularity does, or the base rate where popularity is worse.
    A later challenger must not be significantly worse than either.

    Args:
        folder: the saved challenger, to be loaded and timed in a fresh process; None to skip that.

    Raises ProjectError if the test days have no examples.
    """
    project = context.project
    split = split_days(project, context.workspace.days("events"), day)
    frame = _test_rows(context, challenger, split.test, day)
    alone = _evidence(context, challenger, frame, folder)
    tasks, serving = list(alone.tasks), alone.serving
    names = [task.name for task in tasks]
    if champion is None:
        return decide_first(
            project, alone, baselines_of(context, challenger, frame, (split.train, day))
        )
    objections = unfit(project, alone)
    current, new = label_definitions(champion), label_definitions(challenger)
    common = [task for task in tasks if current.get(task.name) == new[task.name]]
    if not common:
        reason = (
            "kept the champion: it has no objective in common with the challenger "
            f"({', '.join(current)} and {', '.join(names)}) with the same label, so they cannot be "
            "compared; "
            "`mtl-ranker promote --accept` makes the challenger champion"
        )
        return Decision(False, reason, serving=serving)
    shared = [task.name for task in common]
    kept = [names.index(name) for name in shared]
    of_champion = _predictions_on(context, champion, frame, (split.test, day))
    evidence = Evidence(
        tasks=common,
        labels=alone.labels[:, kept],
        user=alone.user,
        lists=alone.lists,
        challenger=alone.challenger[:, kept],
        champion=of_champion.select(shared).to_numpy(),
        champion_fixed=champion.fixed,
        challenger_seeds=challenger.seed_metrics,
        champion_seeds=champion.seed_metrics,
        serving=serving,
    )
    decision = decide(project, evidence)
    if decision.promoted:
        baselines = baselines_of(context, challenger, frame, (split.train, day))
        objections += below(project, alone, baselines)
    if decision.promoted and objections:
        reason = "kept the champion: " + "; ".join(objections)
        decision = replace(decision, promoted=False, reason=reason)
    others = [n for n in dict.fromkeys([*names, *current]) if n not in shared]
    if others:
        note = (
            f"; compared on {', '.join(shared)} only, as not both have {', '.join(others)} "
            "with the same label"
        )
        decision = replace(decision, reason=decision.reason + note)
    return decision


def decide_first(
    project: Project, evidence: ChallengerEvidence, baselines: Sequence[Baseline]
) -> Decision:
    """Whether the first model is better than every baseline; else one becomes champion.

    It must be calibrated and be served as in `decide`. Against each baseline its blended quality
    must be higher, or lower by less than `promotion.tolerance`, and no objective significantly
    worse, nor its log loss. The difference need not be significant: baselines are no champions that
    were chosen.

    Args:
        baselines: the last becomes champion, or an earlier one if the last is significantly worse.
    """
    objections, remarks = unfit(project, evidence), []
    thin: dict[str, None] = {}
    decision = Decision(False, "", serving=evidence.serving)
    for baseline in baselines:
        name, found = baseline.name, _against(project, evidence, baseline)
        gain = found.blended
        thin |= dict.fromkeys(found.thin)
        if np.isnan(gain.value):
            objections.append(f"no objective has enough labels to compare it with {name}")
            continue
        remarks.append(f"from {name}'s by {gain.signed}")
        lower = gain.value <= -project.promotion.tolerance
        worse, differs = ", ".join(found.worse), f"its blended quality differs by {gain.signed}"
        if lower or (worse and gain.value <= 0):
            on = f", and it is significantly worse on {worse}" if worse else ""
            objections.append(f"it is not better than {name}: {differs}{on}")
        elif worse:
            objections.append(
                f"it is significantly worse than {name} on {worse}, although its blended quality "
                f"is higher ({gain.signed})"
            )
        decision = replace(decision, blended=gain, differences=found.differences, against=name)
    remark = f"; not counted: {', '.join(thin)}" if thin else ""
    if objections:
        *others, fallback = baselines
        of_fallback = replace(evidence, challenger=fallback.prediction)
        for other in others:
            if below(project, of_fallback, [other]):
                fallback = other
        reason = f"not promoted: {'; '.join(objections)}; {fallback.name} becomes champion{remark}"
        return replace(decision, reason=reason, fallback=fallback.artifact)
    reason = (
        "promoted: the first model becomes champion; its blended quality differs "
        f"{' and '.join(remarks)}, which need not be significant{remark}"
    )
    return replace(decision, promoted=True, reason=reason)


def below(
    project: Project, evidence: ChallengerEvidence, baselines: Sequence[Baseline]
) -> list[str]:
    """Baselines than which the challenger is significantly worse, and on what, in words.

    On an objective, its log loss or the blended quality. Over users only: the training that would
    serve is the one that is compared.
    """
    found = []
    for baseline in baselines:
        compared = _against(project, evidence, baseline)
        worse = list(compared.worse)
        if compared.blended.high < 0:
            worse.append(f"the blended quality ({compared.blended.signed})")
        if worse:
            found.append(
                f"it is significantly worse than {baseline.name} on {', '.join(worse)} "
                "(this training, over users)"
            )
    return found


def _against(project: Project, evidence: ChallengerEvidence, baseline: Baseline) -> Comparison:
    """This training beside a baseline: intervals over users."""
    compared = Evidence(
        **vars(evidence),
        champion=baseline.prediction,
        challenger_fixed=True,
        champion_fixed=True,
    )
    return compare_models(compared, project.promotion.confidence)


def baselines_of(
    context: Context,
    challenger: RankerArtifact,
    frame: pl.DataFrame,
    when: tuple[list[date], date],
) -> list[Baseline]:
    """The base rate and item popularity of these days, for a challenger's objectives.

    Args:
        frame: test rows.
        when: the training days, and the night on which their labels are known.

    Raises ProjectError if the training days have no examples.
    """
    days, night = when
    rows = scan_model_examples(context, challenger, days, night)
    fitted = {
        "the base rate": fit_base_rate(challenger.project, rows, challenger.sql),
        "item popularity": fit_popularity(challenger.project, rows, challenger.sql),
    }
    names = [task.name for task in challenger.tasks]
    return [
        Baseline(name, artifact, artifact.predict(frame).select(names).to_numpy())
        for name, artifact in fitted.items()
    ]


def label_definitions(artifact: RankerArtifact) -> dict[str, tuple[object, ...]]:
    """Objective → what decides its label, its actions included; only equal ones can be compared."""
    project = artifact.project
    return {o.name: label_definition(project, o) for o in project.objectives}


def accept_by_hand(
    context: Context, day: date, challenger: RankerArtifact, folder: Path | None = None
) -> Decision:
    """The decision to make the challenger champion without a comparison, if it serves.

    The reason warns of each baseline than which it is significantly worse.
    """
    split = split_days(context.project, context.workspace.days("events"), day)
    frame = _test_rows(context, challenger, split.test, day)
    evidence = _evidence(context, challenger, frame, folder)
    objections = unfit(context.project, evidence)
    if objections:
        return Decision(False, "not promoted: " + "; ".join(objections), serving=evidence.serving)
    baselines = baselines_of(context, challenger, frame, (split.train, day))
    warnings = [f"; warning: {each}" for each in below(context.project, evidence, baselines)]
    return Decision(
        True, "promoted: accepted by hand" + "".join(warnings), serving=evidence.serving
    )


def _test_rows(
    context: Context, model: RankerArtifact, days: list[date], night: date
) -> pl.DataFrame:
    """The examples of these days with a model's own features, and labels as known on a night."""
    frame = model_examples(context, model, days, night)
    if frame.is_empty():
        raise ProjectError(f"split.test_days: no examples on {span(days)}")
    return frame


def _evidence(
    context: Context, challenger: RankerArtifact, frame: pl.DataFrame, folder: Path | None
) -> ChallengerEvidence:
    """The challenger's predictions for these rows; with a folder, also how it is served."""
    challenger = challenger.with_vectors(context.workspace, frame)
    names = [task.name for task in challenger.tasks]
    prediction = challenger.predict(frame)
    serving = None
    if folder is not None:
        rows = frame.select(challenger.columns).head(MEASURED_ROWS)
        rows = challenger.encoder.with_vectors(rows)
        serving = try_serving(folder, rows, prediction.head(MEASURED_ROWS))
    return ChallengerEvidence(
        tasks=challenger.tasks,
        labels=label_matrix(frame, [LABEL + name for name in names]),
        user=frame["user_id"].to_numpy(),
        lists=list_ids(frame, context.project.log.list_keys),
        challenger=prediction.select(names).to_numpy(),
        serving=serving,
    )


def _predictions_on(
    context: Context, model: RankerArtifact, frame: pl.DataFrame, when: tuple[list[date], date]
) -> pl.DataFrame:
    """A model's predictions with its own features for the same events as `frame`, in its order.

    Args:
        when: the days of the events, and the night on which their labels are known.
    """
    days, night = when
    own = model_examples(context, model, days, night)
    event = ["date", EVENT]
    if not own.select(event).equals(frame.select(event)):
        raise RuntimeError(f"examples of {span(days)} are not of the same events")
    return model.predict_examples(context.workspace, own)
