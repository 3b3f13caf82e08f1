"""A night's training: every model × seed on the same rows, and the choice of the winner."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date

import numpy as np

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.calibration_bounds import calibrated, unsupported
from mtl_ranker.evaluation.criterion import Criterion
from mtl_ranker.evaluation.drift import Drift, health
from mtl_ranker.evaluation.metrics import PredictedRows, count_lists, evaluate_all
from mtl_ranker.evaluation.off_policy import off_policy
from mtl_ranker.evaluation.sharing import label_correlation, sharing_gains
from mtl_ranker.evaluation.slices import divide, slice_metrics
from mtl_ranker.evaluation.suspicious import suspicious
from mtl_ranker.nightly.blend_search import (
    Blend,
    BlendSearch,
    kept_blend,
    trade_off,
    unmeasured_groups,
)
from mtl_ranker.nightly.contenders import (
    CHECKPOINTS,
    Callbacks,
    Contender,
    refit_jobs,
    refit_of,
    training_of,
    trees_alone,
    trees_job,
)
from mtl_ranker.nightly.plan import FROM_SCRATCH, TrainingPlan
from mtl_ranker.nightly.refitting import harm_of_refit
from mtl_ranker.nightly.results import (
    ModelRun,
    Suite,
    baselines,
    predicted_rows,
    qualities,
    qualities_of,
    still_improving,
)
from mtl_ranker.nightly.trainers import THIS_HOST, Trainer
from mtl_ranker.ranking.blend import blended, value_matrix
from mtl_ranker.training.dataset import ENCODED, Dataset, load_dataset
from mtl_ranker.training.specs import contender_specs, model_specs

BLEND_TRIES = 60  # choices of weights in a night


def train_suite(
    context: Context,
    day: date,
    callbacks: Callbacks = Callbacks(),
    trainer: Trainer = THIS_HOST,
    plan: TrainingPlan = FROM_SCRATCH,
) -> Suite:
    """Train and evaluate every model × seed of the plan; the winner is chosen on validation.

    With `OneProcess` of several ranks every rank calls this, and each training is data-parallel
    over them. Raises ProjectError as `load_dataset` does, for an unknown model setting, and for
    drift beyond a failing threshold.
    """
    project, workspace = context.project, context.workspace
    model_specs(project)
    continuing = None if plan.start is None else plan.start.continuing
    share = project.training.distill
    if share:
        callbacks.on_step("boosted trees for training.distill")
    dataset = load_dataset(context, day, trainer.world, continuing, plan.prior)
    refuse_drift(_health(project, dataset))
    runs = train_all(project, dataset, callbacks, trainer, plan)
    choice = _winner(project, dataset, runs, callbacks, trainer)
    callbacks.on_step("comparing the models")
    suite = _suite(project, dataset, choice, day)
    notes = [*plan.notes, *choice.notes, *suite.notes]
    if share:
        notes.append(
            f"training.distill = {share:g}: networks and linear models learn binary labels mixed "
            f"with predictions of boosted trees, {share:.0%} of each mixed label"
        )
    suite = replace(suite, notes=notes, plan=plan, behind=choice.behind)
    trainer.world.wait()
    for scratch in (ENCODED, CHECKPOINTS):
        shutil.rmtree(workspace.root / scratch, ignore_errors=True)
    if trainer.elsewhere:
        workspace.refresh()
        workspace.remove(CHECKPOINTS)
    return suite


def train_all(
    project: Project,
    dataset: Dataset,
    callbacks: Callbacks = Callbacks(),
    trainer: Trainer = THIS_HOST,
    plan: TrainingPlan = FROM_SCRATCH,
) -> list[ModelRun]:
    """Every model × seed of the plan, trained by a trainer."""
    jobs = [training_of(each, callbacks) for each in contenders_of(project, plan)]
    return trainer.run(project, dataset, jobs)


def contenders_of(project: Project, plan: TrainingPlan = FROM_SCRATCH) -> list[Contender]:
    """The plan's models with each seed, after a linear model with one, if the project names none.

    Continued is the plan's start alone.
    """
    start = None if plan.start is None else plan.start.artifact
    named = model_specs(project)
    return [
        Contender(name, spec, seed, start)
        for name, spec in contender_specs(project).items()
        if name not in plan.left_out
        for seed in (project.training.seeds if name in named else project.training.seeds[:1])
    ]


@dataclass(frozen=True)
class Choice:
    """The winner, all runs with those derived from the best one (with trees, refit), and notes.

    Attributes:
        behind: see `Suite`.
    """

    winner: ModelRun
    runs: list[ModelRun]
    notes: list[str]
    behind: dict[str, float]


def _winner(
    project: Project,
    dataset: Dataset,
    runs: list[ModelRun],
    callbacks: Callbacks,
    trainer: Trainer,
) -> Choice:
    """Choose the winner, and train what is derived from it.

    Chosen on validation by `Criterion`, guarded by the log loss of the first model: the best seed
    of the model with the best mean, with trees or trees alone if they are better. With
    `training.refit` it is refit, where the test days exclude a loss above the margin. Its artifact
    keeps the test metrics of the model's seeds, whose spread promotion needs. The notes say what
    was decided on the test days.
    """
    by_model = _by_model(runs)
    reference = predicted_rows(dataset.validation, runs[0].validate_prediction)
    criterion = Criterion.fit(dataset.tasks, reference)

    def order(*seeds: ModelRun) -> tuple[bool, float]:
        return criterion.order([run.validate_prediction for run in seeds])

    of_model = {name: order(*seeds) for name, seeds in by_model.items()}
    best = max(of_model, key=lambda name: of_model[name])
    winner = max(by_model[best], key=order)
    improved: list[ModelRun] = []
    notes: list[str] = []
    if project.training.trees and (winner.start is None or winner.start.trees is not None):
        callbacks.on_step(f"boosted trees beside {winner.name}")
        (averaged,) = trainer.run(project, dataset, [trees_job(winner)])
        improved += [averaged, trees_alone(dataset, averaged)]
        others = [task.name for task in dataset.tasks if task.kind != "binary"]
        if others:
            notes.append(
                "boosted trees are of binary objectives: with trees and in 'trees alone', "
                f"{', '.join(others)} {'is' if len(others) == 1 else 'are'} the network's"
            )
        winner = max([winner, *improved], key=order)
    of_refit = refit_jobs(project, dataset, winner, callbacks) if project.training.refit else []
    of_spread = []
    if len(by_model[best]) == 1:
        for seed in range(winner.seed + 1, winner.seed + 1 + project.training.spread_seeds):
            other = Contender(best, winner.spec, seed, by_model[best][0].start)
            of_spread.append(training_of(other, callbacks))
    if of_refit or of_spread:
        callbacks.on_step(f"{best}: refit, and other seeds for the spread of trainings")
    results = trainer.run(project, dataset, [*of_refit, *of_spread])
    if of_refit:
        again = refit_of(project, dataset, winner, results[: len(of_refit)])
        improved.append(again)
        harm = harm_of_refit(project, dataset.tasks, dataset.held_out, winner, again)
        if harm:
            notes.append(
                f"{again.label} does not replace {winner.label}, as the test days do not exclude "
                "a loss: " + "; ".join(harm)
            )
        else:
            winner = again
    everything, spread = [*runs, *improved], [run.metrics for run in by_model[best]]
    spread += [run.metrics for run in results[len(of_refit) :]]
    if len(spread) > 1:
        chosen, artifact = winner, replace(winner.artifact, seed_metrics=spread)
        winner = replace(chosen, artifact=artifact)
        everything = [winner if run is chosen else run for run in everything]
    behind = {name: of_model[best][1] - value for name, (_, value) in of_model.items()}
    return Choice(winner, everything, notes, behind)


def _suite(project: Project, dataset: Dataset, choice: Choice, night: date) -> Suite:
    """All runs, with the intervals, gains, slices, off-policy estimates and drift of the night."""
    tasks, held_out = dataset.tasks, dataset.held_out
    runs, winner = choice.runs, choice.winner
    confidence = project.promotion.confidence
    by_model = _by_model(runs)
    quality = qualities(tasks, by_model, held_out)
    simple = baselines(tasks, dataset.frames["train"], held_out)
    trivial = {name: [prediction] for name, prediction in simple.items()}
    specs = model_specs(project)
    reference = next((name for name, spec in specs.items() if spec.unshared), None)
    # A run with trees or more training days differs from the reference by more than sharing.
    comparable = {key: value for key, value in quality.items() if key[0] in specs}
    names = [task.name for task in tasks]
    scores = {
        "train": winner.artifact.predict(dataset.frames["train"]).select(names).to_numpy(),
        # Of the winner itself: a refit run keeps the validation predictions before the refit.
        "validate": winner.artifact.predict(dataset.frames["validate"]).select(names).to_numpy(),
        "test": winner.test_prediction,
    }
    blend_score = blended_score(project, winner.test_prediction)
    predicted = predicted_rows(held_out, winner.test_prediction)
    support = unsupported(calibrated(tasks, predicted, confidence))
    choices = _blend_of(project, predicted)
    better = [] if choices is None or choices.better is None else [str(choices.better)]
    validated = predicted_rows(dataset.validation, winner.validate_prediction)
    kept = kept_blend(project, validated, predicted, BLEND_TRIES)
    if kept is not None:
        better = [str(kept)]
    slices = divide(held_out.frame, project.log.context, exposure_columns(project))
    return Suite(
        night=night,
        days=dataset.days,
        tasks=tasks,
        runs=runs,
        baselines={
            name: evaluate_all(tasks, held_out.labels, prediction, held_out.lists)
            for name, prediction in simple.items()
        },
        lists={
            task.name: count_lists(held_out.labels[:, t], held_out.lists)
            for t, task in enumerate(tasks)
            if task.kind == "binary"
        },
        measures={objective: found.measure for (_, objective), found in quality.items()},
        intervals={
            key: value.interval(confidence)
            for key, value in (quality | qualities_of(tasks, trivial, held_out, fixed=True)).items()
        },
        gains=(
            sharing_gains(comparable, reference, confidence, still_improving(by_model))
            if reference in by_model
            else []
        ),
        label_correlation=label_correlation(dataset.examples["train"].labels.numpy()),
        slices=slice_metrics(tasks, predicted, slices),
        off_policy=off_policy(project, held_out.frame, predicted, blend_score),
        drift=_health(project, dataset, scores),
        suspicious=suspicious(tasks, held_out.labels, {run.label: run.metrics for run in runs}),
        unlabelled=dataset.unlabelled,
        held_out=held_out,
        train_rows=len(dataset.train),
        winner=winner,
        blend=choices,
        kept_blend=kept,
        notes=[*support, *better],
    )


def _health(
    project: Project, dataset: Dataset, scores: Mapping[str, np.ndarray] | None = None
) -> Drift:
    """Drift of the split's held-out days from its training days."""
    facts = dataset.facts
    history = (dataset.days.train[0] - facts.first_day).days
    return health(project, dataset.frames, scores, facts.day_rows, history)


def _blend_of(project: Project, rows: PredictedRows) -> Blend | None:
    """Choices of blend weights, if both groups of objectives can be measured."""
    if unmeasured_groups(project, rows):
        return None
    return trade_off(project, rows, BlendSearch(tries=BLEND_TRIES))


def _by_model(runs: list[ModelRun]) -> dict[str, list[ModelRun]]:
    names = dict.fromkeys(run.name for run in runs)
    return {name: [run for run in runs if run.name == name] for name in names}


def refuse_drift(drift: Drift) -> None:
    """Raises ProjectError if a day crosses a failing threshold of `[drift]`."""
    if drift.failures:
        raise ProjectError(
            "the data drifted too far to train on:\n  " + "\n  ".join(drift.failures)
        )


def blended_score(project: Project, prediction: np.ndarray) -> np.ndarray:
    """The project's blend of predictions [N, T], up to a monotone map: [N]."""
    weights = list(project.blend_weights.values())
    return blended(project.scoring.blend, weights, value_matrix(project, prediction))


def exposure_columns(project: Project) -> dict[str, str]:
    """`user` and `item` → the feature of their impressions per day in the longest window."""
    longest = project.features.windows[-1]
    return {
        who: f"{who}_daily_impressions_{longest}d"
        for who in ("user", "item")
        if [f"{who}_id"] in project.features.entities
    }
