"""A night's training: every model × seed on the same rows, and the choice of the winner."""

from __future__ import annotations

import shutil
from datetime import date
from functools import partial

import numpy as np
import torch

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.drift import Drift, health
from mtl_ranker.evaluation.metrics import PredictedRows, quality_metric
from mtl_ranker.evaluation.off_policy import off_policy
from mtl_ranker.evaluation.sharing import label_correlation, sharing_gains
from mtl_ranker.evaluation.slices import divide, slice_metrics
from mtl_ranker.models.matmul import cores
from mtl_ranker.nightly.contenders import (
    CHECKPOINTS,
    Callbacks,
    Contender,
    refit,
    train_model,
    with_trees,
)
from mtl_ranker.nightly.results import ModelRun, Suite, baselines, qualities
from mtl_ranker.ranking.blend import blended
from mtl_ranker.training.dataset import ENCODED, Dataset, load_dataset
from mtl_ranker.training.distributed import SINGLE_PROCESS, World
from mtl_ranker.training.process_pool import side_by_side
from mtl_ranker.training.specs import model_specs

PARALLEL_FROM = 200_000  # rows x epochs of one training


def train_suite(
    context: Context, day: date, callbacks: Callbacks = Callbacks(), world: World = SINGLE_PROCESS
) -> Suite:
    """Train and evaluate every model × seed; the winner is chosen on validation, never on test.

    With a `world` of several ranks every rank calls this, and each training is data-parallel over
    them. Raises ProjectError as `load_dataset` does, for an unknown model setting, and for drift
    beyond a failing threshold.
    """
    project, workspace = context.project, context.workspace
    model_specs(project)
    dataset = load_dataset(context, day, world)
    refuse_drift(health(project, dataset.frames))
    runs = train_all(project, dataset, callbacks, world)
    winner, improved = _winner(project, dataset, runs, callbacks, world)
    callbacks.on_step("comparing the models")
    suite = _suite(project, dataset, [*runs, *improved], winner)
    world.wait()
    for scratch in (ENCODED, CHECKPOINTS):
        shutil.rmtree(workspace.root / scratch, ignore_errors=True)
    return suite


def train_all(
    project: Project,
    dataset: Dataset,
    callbacks: Callbacks = Callbacks(),
    world: World = SINGLE_PROCESS,
) -> list[ModelRun]:
    """Every model × seed, in parallel processes if that is faster (`training.jobs`).

    With the same number of threads per training (`training.threads`) the results do not depend on
    the number of processes.
    """
    contenders = [
        Contender(name, spec, seed)
        for name, spec in model_specs(project).items()
        for seed in project.training.seeds
    ]
    available = cores()
    jobs = project.training.jobs or (available if _parallel_is_faster(project, dataset) else 1)
    jobs = jobs if world.size == 1 else 1
    processes = min(len(contenders), jobs)
    threads = project.training.threads or max(1, available // processes)
    torch.set_num_threads(threads)
    on_epochs = [partial(callbacks.on_epoch, each.name, each.seed) for each in contenders]
    try:
        if processes > 1:
            train = partial(train_model, project, dataset)
            arguments = list(zip(contenders, on_epochs, strict=True))
            return side_by_side(train, arguments, processes, threads)
        return [
            train_model(project, dataset, contender, on_epoch, world)
            for contender, on_epoch in zip(contenders, on_epochs, strict=True)
        ]
    finally:
        torch.set_num_threads(project.training.threads or available)


def _parallel_is_faster(project: Project, dataset: Dataset) -> bool:
    """Starting a process takes seconds, longer than a small training."""
    return len(dataset.train) * project.training.epochs >= PARALLEL_FROM


def _winner(
    project: Project,
    dataset: Dataset,
    runs: list[ModelRun],
    callbacks: Callbacks,
    world: World,
) -> tuple[ModelRun, list[ModelRun]]:
    """The winner, and the runs derived from the best one: with trees, refit.

    Chosen on validation: the best seed of the model with the best mean, with trees if they are
    better, refit if `training.refit`.
    """
    by_model = _by_model(runs)
    mean = {n: float(np.mean([r.validate_quality for r in rs])) for n, rs in by_model.items()}
    best = max(mean, key=lambda n: mean[n])
    winner = max(by_model[best], key=lambda r: r.validate_quality)
    improved = []
    if project.training.trees:
        callbacks.on_step(f"boosted trees beside {winner.name}")
        averaged = with_trees(project, dataset, winner)
        improved.append(averaged)
        if averaged.validate_quality > winner.validate_quality:
            winner = averaged
    if project.training.refit:
        winner = refit(project, dataset, winner, callbacks, world)
        improved.append(winner)
    return winner, improved


def _suite(project: Project, dataset: Dataset, runs: list[ModelRun], winner: ModelRun) -> Suite:
    """All runs, with the intervals, gains, slices, off-policy estimates and drift of the night."""
    tasks, held_out = dataset.tasks, dataset.held_out
    confidence = project.promotion.confidence
    quality = qualities(project.promotion, tasks, _by_model(runs), held_out)
    specs = model_specs(project)
    reference = next((name for name, spec in specs.items() if spec.unshared), None)
    # A run with trees or more training days differs from the reference by more than sharing.
    comparable = {key: value for key, value in quality.items() if key[0] in specs}
    measures = {task.name: quality_metric(task.kind) for task in tasks}
    names = [task.name for task in tasks]
    scores = {
        "train": winner.artifact.predict(dataset.frames["train"]).select(names).to_numpy(),
        "validate": winner.validate_prediction,
        "test": winner.test_prediction,
    }
    blend_score = blended_score(project, winner.test_prediction)
    predicted = PredictedRows(held_out.labels, winner.test_prediction, held_out.user)
    slices = divide(held_out.frame, project.log.context, exposure_columns(project))
    return Suite(
        days=dataset.days,
        tasks=tasks,
        runs=runs,
        baselines=baselines(tasks, dataset.frames["train"], held_out),
        intervals={key: value.interval(confidence) for key, value in quality.items()},
        gains=(
            sharing_gains(comparable, reference, measures, confidence)
            if reference is not None
            else []
        ),
        label_correlation=label_correlation(dataset.examples["train"].labels.numpy()),
        slices=slice_metrics(tasks, predicted, slices),
        off_policy=off_policy(project, held_out.frame, held_out.labels, blend_score),
        drift=health(project, dataset.frames, scores),
        unlabelled=dataset.unlabelled,
        held_out=held_out,
        train_rows=len(dataset.train),
        winner=winner,
    )


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
    return blended(project.scoring.blend, weights, prediction)


def exposure_columns(project: Project) -> dict[str, str]:
    """`user` and `item` → the feature of their impressions per day in the longest window."""
    longest = project.features.windows[-1]
    return {
        who: f"{who}_daily_impressions_{longest}d"
        for who in ("user", "item")
        if [f"{who}_id"] in project.features.entities
    }
