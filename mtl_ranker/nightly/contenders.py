"""Train one contender of a night, calibrate it on validation days, evaluate it on test days."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import polars as pl
import torch

from mtl_ranker import __version__
from mtl_ranker.config import Project
from mtl_ranker.evaluation.diagnostics import Diagnosis, diagnose
from mtl_ranker.evaluation.metrics import blended_quality, evaluate_all
from mtl_ranker.features.columns import LABEL, numeric_features
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.models.objectives import Task
from mtl_ranker.models.spec import RankerSpec
from mtl_ranker.nightly.results import ModelRun
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.calibration import fit_calibration
from mtl_ranker.training.batches import Examples, encode_examples, take, thin_negatives
from mtl_ranker.training.boosting import fit_forest
from mtl_ranker.training.dataset import ENCODED, SAMPLE_ROWS, Dataset, encode_to_files
from mtl_ranker.training.distributed import SINGLE_PROCESS, World
from mtl_ranker.training.loop import Design, Execution, Rows, Trained, train_ranker
from mtl_ranker.training.shards import ShardedExamples
from mtl_ranker.training.state import Checkpoint, Epoch
from mtl_ranker.workspace import fingerprint

DIAGNOSED_ROWS = 8_192
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Contender:
    """A model of the project file with one seed."""

    name: str
    spec: RankerSpec
    seed: int


@dataclass(frozen=True)
class Callbacks:
    """Functions called with the progress of trainings.

    Attributes:
        on_epoch: called with model, seed and epoch after each epoch.
        on_step: called with a message before each step without epochs.
    """

    on_epoch: Callable[[str, int, Epoch], None] = lambda name, seed, epoch: None
    on_step: Callable[[str], None] = lambda message: None


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A trained contender before evaluation.

    Attributes:
        started, ended: when it was trained, in seconds since 1970.
        diagnosis: of its network; None if it has yet to be made.
    """

    name: str
    seed: int
    started: float
    ended: float
    trained: Trained
    artifact: RankerArtifact
    diagnosis: Diagnosis | None = None


@dataclass(frozen=True)
class Validation:
    """Quality and predictions [N, T] on the validation days."""

    quality: float
    prediction: np.ndarray


def train_model(
    project: Project,
    dataset: Dataset,
    contender: Contender,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    world: World = SINGLE_PROCESS,
) -> ModelRun:
    """Train one model with one seed, and evaluate it on the held-out rows."""
    tasks, seed, started = dataset.tasks, contender.seed, time.time()
    trained = train_ranker(
        Design(contender.spec, dataset.encoder, tasks),
        Rows(_thinned(project, tasks, dataset.train, seed), dataset.examples["validate"]),
        project.training,
        seed,
        Execution(on_epoch, checkpoint=_checkpoint(project, dataset, contender), world=world),
    )
    fitted = Fitted(
        name=contender.name,
        seed=seed,
        started=started,
        ended=time.time(),
        trained=trained,
        artifact=RankerArtifact(project, dataset.encoder, tasks, trained.model, sql=dataset.sql),
    )
    return _evaluate(dataset, *_calibrate(dataset, fitted))


def with_trees(project: Project, dataset: Dataset, run: ModelRun) -> ModelRun:
    """The model with its predictions averaged with those of boosted trees (training/boosting.py).

    The trees are fitted on a sample of at most `SAMPLE_ROWS` training rows; their number is chosen
    on the validation rows.
    """
    trees = fit_forest(
        dataset.tasks,
        _thinned(project, dataset.tasks, dataset.examples["train"], run.seed).sample(SAMPLE_ROWS),
        [project.training.trees] * len(dataset.tasks),
        run.seed,
        dataset.examples["validate"],
    )
    fitted = Fitted(
        name=f"{run.name}, trees",
        seed=run.seed,
        started=run.started,
        ended=time.time(),
        trained=run.trained,
        artifact=replace(run.artifact, trees=trees),
        diagnosis=run.diagnosis,
    )
    return _evaluate(dataset, *_calibrate(dataset, fitted))


def refit(
    project: Project,
    dataset: Dataset,
    run: ModelRun,
    callbacks: Callbacks = Callbacks(),
    world: World = SINGLE_PROCESS,
) -> ModelRun:
    """The same model trained on training and validation days together, for its best epochs.

    The encoder and the trees are fitted on both as well. The calibration was fitted on predictions
    for days that the weights were not trained on; as the new weights are, only a part of it is
    applied (`calibration.refit_share`). The run keeps the validation quality by which the model
    was chosen.
    """
    tasks, training, started = dataset.tasks, project.training, time.time()
    encoder, rows = _training_and_validation_rows(project, dataset, world)
    contender = Contender(f"{run.name}, refit", run.spec, run.seed)
    on_epoch = partial(callbacks.on_epoch, contender.name, contender.seed)
    thinned = _thinned(project, tasks, rows, run.seed)
    trained = train_ranker(
        Design(run.spec, encoder, tasks),
        Rows(thinned),
        training,
        run.seed,
        Execution(
            on_epoch, run.trained.best_epochs, _checkpoint(project, dataset, contender), world
        ),
    )
    trees = run.artifact.trees
    if trees is not None:
        callbacks.on_step(f"boosted trees beside {contender.name}")
        sample = thinned.sample(SAMPLE_ROWS)
        trees = fit_forest(tasks, sample, trees.trees, run.seed)
    calibration = run.artifact.calibration.part(project.calibration.refit_share)
    fitted = Fitted(
        name=contender.name,
        seed=run.seed,
        started=started,
        ended=time.time(),
        trained=trained,
        artifact=RankerArtifact(
            project, encoder, tasks, trained.model, calibration, trees, dataset.sql
        ),
    )
    labels = [LABEL + task.name for task in tasks]
    test = encode_examples(encoder, dataset.frames["test"], labels)
    dataset = replace(dataset, encoder=encoder, examples={"test": test})
    return _evaluate(dataset, fitted, Validation(run.validate_quality, run.validate_prediction))


def _training_and_validation_rows(
    project: Project, dataset: Dataset, world: World
) -> tuple[Encoder, Examples | ShardedExamples]:
    """The rows of both parts, encoded with an encoder fitted on both."""
    labels, numerics = [LABEL + task.name for task in dataset.tasks], numeric_features(project)
    if dataset.shards is not None:
        files = [*dataset.files["train"], *dataset.files["validate"]]
        lazy = pl.scan_parquet(files, missing_columns="insert", glob=False)
        encoder = Encoder.fit(project.features, numerics, lazy, SAMPLE_ROWS)
        folder = dataset.workspace.root / ENCODED / "refit"
        return encoder, encode_to_files(encoder, files, labels, folder, world)
    parts = [dataset.frames["train"], dataset.frames["validate"]]
    frame = pl.concat(parts, how="vertical_relaxed")
    encoder = Encoder.fit(project.features, numerics, frame)
    return encoder, encode_examples(encoder, frame, labels)


def _calibrate(dataset: Dataset, fitted: Fitted) -> tuple[Fitted, Validation]:
    """The contender with a calibration fitted on the validation days, and its results there."""
    tasks, validate = dataset.tasks, dataset.examples["validate"]
    frame, settings = dataset.frames["validate"], fitted.artifact.project.calibration
    raw, labels = fitted.artifact.raw(validate.inputs), validate.labels.numpy()
    metrics = evaluate_all(tasks, labels, raw, frame["user_id"].to_numpy())
    surface = None if settings.by is None else frame[settings.by]
    calibration = fit_calibration(tasks, labels, raw, settings, surface)
    prediction = calibration.apply([task.name for task in tasks], raw, surface)
    artifact = replace(fitted.artifact, calibration=calibration)
    quality = blended_quality(tasks, metrics)
    return replace(fitted, artifact=artifact), Validation(quality, prediction)


def _evaluate(dataset: Dataset, fitted: Fitted, validation: Validation) -> ModelRun:
    """The contender's predictions and metrics on the test days, and a diagnosis of its network."""
    tasks, held_out, test = dataset.tasks, dataset.held_out, dataset.examples["test"]
    artifact, diagnosis = fitted.artifact, fitted.diagnosis
    by = artifact.calibration.by
    raw = artifact.raw(test.inputs)
    names = [task.name for task in tasks]
    prediction = artifact.calibration.apply(names, raw, held_out.frame[by] if by else None)
    if diagnosis is None:
        rows = take(test, torch.arange(min(DIAGNOSED_ROWS, len(test))))
        diagnosis = diagnose(fitted.trained.model, rows.inputs, rows.labels.numpy(), tasks)
    return ModelRun(
        name=fitted.name,
        seed=fitted.seed,
        trained=fitted.trained,
        started=fitted.started,
        ended=fitted.ended,
        validate_quality=validation.quality,
        validate_prediction=validation.prediction,
        raw_prediction=raw,
        test_prediction=prediction,
        metrics=evaluate_all(tasks, held_out.labels, prediction, held_out.user),
        artifact=artifact,
        diagnosis=diagnosis,
    )


def _thinned(
    project: Project, tasks: list[Task], rows: Examples | ShardedExamples, seed: int
) -> Examples | ShardedExamples:
    """The rows; of those without a positive label only a share `training.negative_keep`."""
    if project.training.negative_keep == 1.0:
        return rows
    binary = [t for t, task in enumerate(tasks) if task.kind == "binary"]
    return rows.thinned(
        partial(thin_negatives, binary=binary, keep=project.training.negative_keep), seed
    )


def _checkpoint(project: Project, dataset: Dataset, contender: Contender) -> Checkpoint:
    """The checkpoint of one training of a suite; a finished suite removes it."""
    settings = project.digest("features", "objectives", "training")
    key = fingerprint(__version__, dataset.digest, settings, contender.spec, contender.name)
    name = fingerprint(contender.name, contender.seed)
    path = dataset.workspace.root / CHECKPOINTS / f"{name}.pt"
    return Checkpoint(path, key, project.training.checkpoint_seconds)
