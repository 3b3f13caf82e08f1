"""Train one contender of a night, calibrate it on validation days, evaluate it on test days."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import torch

from mtl_ranker import __version__
from mtl_ranker.config import Calibrating, Project, Training
from mtl_ranker.evaluation.diagnostics import Diagnosis, diagnose
from mtl_ranker.evaluation.metrics import blended_quality, evaluate_all
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.encoders import Encoder, fit_encoder
from mtl_ranker.models.objectives import Task
from mtl_ranker.models.spec import RankerSpec
from mtl_ranker.nightly.results import REFIT, ModelRun
from mtl_ranker.nightly.trainers import THIS_HOST, Job, Running, Trainer, Work
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.calibration import Calibration, fit_calibration
from mtl_ranker.training.batches import (
    Examples,
    encode_examples,
    label_matrix,
    take,
    thin_negatives,
)
from mtl_ranker.training.boosting import fit_forest
from mtl_ranker.training.dataset import (
    SAMPLE_ROWS,
    Dataset,
    continued_examples,
    written_once,
)
from mtl_ranker.training.distillation import fit_teacher
from mtl_ranker.training.distributed import SINGLE_PROCESS, World
from mtl_ranker.training.loop import Design, Execution, Rows, Trained, sized, train_ranker
from mtl_ranker.training.network import tasks_of
from mtl_ranker.training.shards import ShardedExamples, write_shards
from mtl_ranker.training.state import FORMAT, Checkpoint, Epoch, StoredCheckpoint
from mtl_ranker.training.warm_start import WarmStart
from mtl_ranker.workspace import fingerprint

DIAGNOSED_ROWS = 8_192
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Contender:
    """A model of the project file with one seed.

    Attributes:
        start: what its training continues from; None for a training from scratch.
    """

    name: str
    spec: RankerSpec
    seed: int
    start: RankerArtifact | None = None


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
        start: see `Contender`.
    """

    name: str
    seed: int
    started: float
    ended: float
    trained: Trained
    artifact: RankerArtifact
    diagnosis: Diagnosis | None = None
    start: RankerArtifact | None = None


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
    """Train one model with one seed, and evaluate it on the held-out rows.

    The project's `[training]` may differ from the one that the data were read with.
    """
    tasks, seed, started = tasks_of(project), contender.seed, time.time()
    trained = train_ranker(
        Design(contender.spec, dataset.encoder, tasks, _warm_start(contender.start)),
        Rows(_thinned(project, tasks, dataset.train, seed), dataset.examples["validate"]),
        _settings(project, dataset, contender),
        seed,
        Execution(on_epoch, checkpoint=_checkpoint(project, dataset, contender), world=world),
    )
    fitted = Fitted(
        name=contender.name,
        seed=seed,
        started=started,
        ended=time.time(),
        trained=trained,
        artifact=RankerArtifact(
            project,
            dataset.encoder,
            tasks,
            trained.model,
            sql=dataset.sql,
            last_day=dataset.days.train[-1],
            moments=trained.moments,
        ),
        start=contender.start,
    )
    return _evaluate(dataset, *_calibrate(dataset, fitted))


def training_of(contender: Contender, callbacks: Callbacks = Callbacks()) -> Job:
    """The job that `train_model` does."""
    return Job(
        f"{contender.name} seed {contender.seed}",
        partial(_train, contender),
        partial(callbacks.on_epoch, contender.name, contender.seed),
        divisible=True,
    )


def _train(contender: Contender, project: Project, dataset: Dataset, running: Running) -> ModelRun:
    return train_model(project, dataset, contender, running.on_epoch, running.world)


def trees_job(run: ModelRun) -> Job:
    """The job that `with_trees` does."""
    return Job(f"{run.name}, trees seed {run.seed}", partial(_with_trees, run))


def _with_trees(run: ModelRun, project: Project, dataset: Dataset, running: Running) -> ModelRun:
    return with_trees(project, dataset, run)


def with_trees(project: Project, dataset: Dataset, run: ModelRun) -> ModelRun:
    """The model with its predictions averaged with those of boosted trees (training/boosting.py).

    The trees are fitted on a sample of at most `SAMPLE_ROWS` training rows; their number is chosen
    on the validation rows. Trees cannot be continued: beside a network that was, they are those of
    its start.
    """
    if run.start is not None:
        trees = run.start.trees
    else:
        rows = _thinned(project, dataset.tasks, dataset.examples["train"], run.seed)
        trees = fit_forest(
            dataset.tasks,
            rows.sample(SAMPLE_ROWS),
            [project.training.trees] * len(dataset.tasks),
            run.seed,
            dataset.examples["validate"],
        )
    return _with_artifact(dataset, run, f"{run.name}, trees", replace(run.artifact, trees=trees))


def trees_alone(dataset: Dataset, run: ModelRun) -> ModelRun:
    """The trees of a run of `with_trees`, without the network's predictions.

    Objectives that are not binary have no trees; the network predicts them.
    """
    return _with_artifact(dataset, run, "trees alone", replace(run.artifact, tree_share=1.0))


def _with_artifact(
    dataset: Dataset, run: ModelRun, name: str, artifact: RankerArtifact
) -> ModelRun:
    """The run with another artifact of the same network, calibrated and evaluated again."""
    fitted = Fitted(
        name=name,
        seed=run.seed,
        started=run.started,
        ended=time.time(),
        trained=run.trained,
        artifact=artifact,
        diagnosis=run.diagnosis,
        start=run.start,
    )
    return _evaluate(dataset, *_calibrate(dataset, fitted))


def refit(
    project: Project, dataset: Dataset, run: ModelRun, trainer: Trainer = THIS_HOST
) -> ModelRun:
    """The same model trained on training and validation days together, for its best epochs.

    The encoder and the trees are fitted on both as well. The run keeps the validation quality by
    which the model was chosen. Its calibration is cross-fitted over `calibration.refit_days` days
    (`held_out_predictions`); with 0, a part of the model's own map is applied
    (`calibration.refit_share`), which was fitted on days that its weights were not trained on.

    A model whose training was continued is continued once more on the validation days, with a
    replay of training days. With `refit_days` it then has the model's own map, of the validation
    days, as leaving out another day would take a training without that day.
    """
    jobs = refit_jobs(project, dataset, run)
    return refit_of(project, dataset, run, trainer.run(project, dataset, jobs))


def refit_jobs(
    project: Project, dataset: Dataset, run: ModelRun, callbacks: Callbacks = Callbacks()
) -> list[Job]:
    """The trainings of `refit`, whose results `refit_of` takes."""
    start = None if run.start is None else run.artifact
    days = [*dataset.days.train, *dataset.days.validate]
    again = Retraining(run, f"{run.name}{REFIT}", days, start)
    folds = left_out_jobs(dataset, run, _cross_fitted(project, dataset, run), callbacks)
    return [_job(again, partial(_retrain, again), callbacks), *folds]


def _cross_fitted(project: Project, dataset: Dataset, run: ModelRun) -> list[date]:
    """The days over which a refit run's calibration is cross-fitted."""
    days = [*dataset.days.train, *dataset.days.validate]
    count = project.calibration.refit_days if run.start is None else 0
    return days[-count:] if count else []


def refit_of(project: Project, dataset: Dataset, run: ModelRun, results: Sequence[Any]) -> ModelRun:
    """The refit of a run from the results of `refit_jobs`: calibrated and evaluated."""
    tasks, settings = dataset.tasks, project.calibration
    retrained: Retrained = results[0]
    again, start = retrained.artifact, None if run.start is None else run.artifact
    days = _cross_fitted(project, dataset, run)
    if days:
        calibration = fit_to(tasks, settings, folds_of(dataset, run, days, results[1:]))
    elif settings.refit_days:
        calibration = run.artifact.calibration
    else:
        calibration = run.artifact.calibration.part(settings.refit_share)
    fitted = Fitted(
        name=f"{run.name}{REFIT}",
        seed=run.seed,
        started=retrained.started,
        ended=retrained.ended,
        trained=retrained.trained,
        artifact=replace(
            again,
            calibration=calibration,
            last_day=dataset.days.validate[-1],
            before_refit=run.artifact if run.artifact.moments else None,
        ),
        start=start,
    )
    test = _encoded(dataset, again, dataset.frames["test"])
    dataset = replace(dataset, encoder=again.encoder, examples={"test": test})
    return _evaluate(dataset, fitted, Validation(run.validate_quality, run.validate_prediction))


@dataclass(frozen=True)
class Retraining:
    """A further training of a finished run's model for the same epochs: its name and its days.

    Attributes:
        run: the finished one.
        start: the run's ranker, to be continued on the validation days; None for a training from
            scratch.
    """

    run: ModelRun
    name: str
    days: list[date]
    start: RankerArtifact | None = None


@dataclass(frozen=True)
class Retrained:
    """The ranker of a `Retraining`, which is not calibrated.

    Attributes:
        started, ended: in seconds since 1970.
    """

    artifact: RankerArtifact
    trained: Trained
    started: float
    ended: float


def _job(again: Retraining, work: Work, callbacks: Callbacks) -> Job:
    on_epoch = partial(callbacks.on_epoch, again.name, again.run.seed)
    return Job(f"{again.name} seed {again.run.seed}", work, on_epoch, divisible=True)


def _retrain(again: Retraining, project: Project, dataset: Dataset, running: Running) -> Retrained:
    """The run's model, trained on other days without early stopping."""
    tasks, run, started = tasks_of(project), again.run, time.time()
    encoder, rows = _rows_of(project, dataset, again, running.world)
    contender = Contender(again.name, run.spec, run.seed, again.start)
    thinned = _thinned(project, tasks, rows.train, run.seed)
    trained = train_ranker(
        Design(run.spec, encoder, tasks, _warm_start(again.start)),
        Rows(thinned),
        _settings(project, dataset, contender),
        run.seed,
        Execution(
            running.on_epoch,
            run.trained.best_epochs,
            _checkpoint(project, dataset, contender),
            running.world,
        ),
    )
    trees = run.artifact.trees
    if trees is not None and again.start is None:
        if rows.labelled is not None:
            thinned = rows.labelled
        trees = fit_forest(tasks, thinned.sample(SAMPLE_ROWS), trees.trees, run.seed)
    artifact = RankerArtifact(
        project,
        encoder,
        tasks,
        trained.model,
        trees=trees,
        tree_share=run.artifact.tree_share,
        sql=dataset.sql,
    )
    return Retrained(artifact, trained, started, time.time())


@dataclass(frozen=True)
class Fold:
    """A day's raw examples, with labels and uncalibrated predictions [N, T] of a model that was
    not trained on that day."""

    frame: pl.DataFrame
    labels: np.ndarray
    prediction: np.ndarray


def held_out_predictions(
    project: Project,
    dataset: Dataset,
    run: ModelRun,
    days: Sequence[date],
    trainer: Trainer = THIS_HOST,
) -> list[Fold]:
    """Predictions for each day by the run's model, trained on all other training and validation
    days for its best epochs: cross-fitting with one day per fold.

    The only validation day is predicted by the run itself, which was not trained on it.
    """
    jobs = left_out_jobs(dataset, run, days)
    return folds_of(dataset, run, days, trainer.run(project, dataset, jobs))


def left_out_jobs(
    dataset: Dataset, run: ModelRun, days: Sequence[date], callbacks: Callbacks = Callbacks()
) -> list[Job]:
    """The trainings of `held_out_predictions`, each without a day and for that day."""
    known, jobs = [*dataset.days.train, *dataset.days.validate], []
    for day in days:
        if dataset.days.validate != [day]:
            others = [other for other in known if other != day]
            again = Retraining(run, f"{run.name}, without {day}", others)
            jobs.append(_job(again, partial(_predict_left_out, again, day), callbacks))
    return jobs


def _predict_left_out(
    again: Retraining, day: date, project: Project, dataset: Dataset, running: Running
) -> np.ndarray:
    """Uncalibrated predictions [N, T] for a day by a model that was trained without it."""
    artifact = _retrain(again, project, dataset, running).artifact
    return artifact.raw(_encoded(dataset, artifact, _frame_of(dataset, [day])))


def folds_of(
    dataset: Dataset, run: ModelRun, days: Sequence[date], predicted: Iterable[np.ndarray]
) -> list[Fold]:
    """The folds of days, from the predictions of `left_out_jobs`."""
    predictions, folds = iter(predicted), []
    for day in days:
        frame, labels = _frame_of(dataset, [day]), dataset.reading.labels
        if dataset.days.validate == [day]:
            prediction = run.artifact.raw(_encoded(dataset, run.artifact, frame))
        else:
            prediction = next(predictions)
        folds.append(Fold(frame, label_matrix(frame, labels), prediction))
    return folds


def _encoded(dataset: Dataset, artifact: RankerArtifact, frame: pl.DataFrame) -> Examples:
    labels = dataset.reading.labels
    return encode_examples(artifact.encoder, frame, labels, dataset.list_keys)


def fit_to(tasks: list[Task], settings: Calibrating, folds: Sequence[Fold]) -> Calibration:
    """The calibration fitted on the rows of all folds together."""
    surface = None
    if settings.by is not None:
        surface = pl.concat([fold.frame[settings.by] for fold in folds])
    labels, prediction = (
        np.concatenate([getattr(fold, part) for fold in folds]) for part in ("labels", "prediction")
    )
    return fit_calibration(tasks, labels, prediction, settings, surface)


@dataclass(frozen=True)
class _TrainingRows:
    """Rows of days of training and validation.

    Attributes:
        train: with the labels that a network is trained on.
        labelled: with a teacher, those in memory with the labels that trees are fitted on.
    """

    train: Examples | ShardedExamples
    labelled: Examples | None = None


def _rows_of(
    project: Project, dataset: Dataset, again: Retraining, world: World
) -> tuple[Encoder, _TrainingRows]:
    """The rows of days of training and validation, with an encoder fitted on them.

    Of a continued training the validation days are new, and the encoder is extended by them.
    """
    folder = dataset.scratch / fingerprint(again.name)
    if dataset.elsewhere:  # ranks of other hosts have temporary folders of their own
        world = SINGLE_PROCESS
    if again.start is not None:
        new = dataset.trained_on(dataset.frames["validate"]).lazy()
        # Of a streamed split `frames` has a sample.
        older = dataset.workspace.scan_files(dataset.files["train"])
        extended = again.start.encoder.extended(project.features, new)
        encoder = replace(extended, tables=dataset.encoder.tables)
        continued = continued_examples(project, encoder, new, older, folder)
        return encoder, _TrainingRows(continued)
    labels = [LABEL + task.name for task in dataset.tasks]
    distill = dataset.reading.project.training.distill
    if dataset.shards is not None:
        known = [*dataset.days.train, *dataset.days.validate]
        paths = [*dataset.files["train"], *dataset.files["validate"]]
        files = [path for day, path in zip(known, paths, strict=True) if day in again.days]
        lazy = dataset.workspace.scan_files(files)
        encoder = fit_encoder(project, lazy, SAMPLE_ROWS, dataset.encoder.tables)
        write = partial(write_shards, encoder, files, labels, list_keys=dataset.list_keys)
        if not distill:
            return encoder, _TrainingRows(written_once(write, folder, world))
    frame = dataset.trained_on(_frame_of(dataset, again.days))
    if dataset.shards is None:
        encoder = fit_encoder(project, frame, tables=dataset.encoder.tables)
    rows = encode_examples(encoder, frame, labels, dataset.list_keys)
    teacher = fit_teacher(dataset.tasks, rows, frame, distill)
    if teacher is None:
        return encoder, _TrainingRows(rows)
    if dataset.shards is None:
        return encoder, _TrainingRows(teacher.taught(rows, frame), rows)
    taught = partial(write, change=teacher.taught)
    return encoder, _TrainingRows(written_once(taught, folder, world), rows)


def _frame_of(dataset: Dataset, days: Sequence[date]) -> pl.DataFrame:
    """Raw examples of days of training and validation, of a streamed split a sample of them."""
    parts = [dataset.frames["train"], dataset.frames["validate"]]
    return pl.concat(parts, how="vertical_relaxed").filter(pl.col("date").is_in(list(days)))


def _calibrate(dataset: Dataset, fitted: Fitted) -> tuple[Fitted, Validation]:
    """The contender with a calibration fitted on the validation days, and its results there."""
    tasks, validate = dataset.tasks, dataset.examples["validate"]
    frame, settings = dataset.frames["validate"], fitted.artifact.project.calibration
    raw, labels = fitted.artifact.raw(validate), validate.labels.numpy()
    metrics = evaluate_all(tasks, labels, raw, dataset.validation.lists)
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
    raw = artifact.raw(test)
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
        metrics=evaluate_all(tasks, held_out.labels, prediction, held_out.lists),
        artifact=artifact,
        diagnosis=diagnosis,
        start=fitted.start,
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


def _warm_start(start: RankerArtifact | None) -> WarmStart | None:
    """The weights and moments of a ranker, for a training that continues from it."""
    if start is None:
        return None
    return WarmStart(
        encoder=start.encoder,
        weights=start.model.state_dict(),
        positions=start.model.positions,
        moments=start.moments,
    )


def _settings(project: Project, dataset: Dataset, contender: Contender) -> Training:
    """The settings of a training; a continued one has its own number of epochs.

    Trainings on other days of the split, such as a refit, take as many rows a step as the first.
    """
    settings = sized(project.training, len(dataset.train))
    if contender.start is None:
        return settings
    return settings.model_copy(update={"epochs": settings.continued_epochs})


def _checkpoint(project: Project, dataset: Dataset, contender: Contender) -> Checkpoint:
    """The checkpoint of one training of a suite; a finished suite removes it."""
    settings = project.digest("features", "objectives", "training")
    # The rows are the same for another split of the same days, but not what is validation.
    split = [dataset.days.train, dataset.days.validate]
    rows = (dataset.digest, split, settings, list(dataset.list_keys))
    start = None if contender.start is None else contender.start.weights_digest
    key = fingerprint(__version__, FORMAT, *rows, contender.spec, contender.name, start)
    name = fingerprint(contender.name, contender.seed)
    place, seconds = f"{CHECKPOINTS}/{name}.pt", project.training.checkpoint_seconds
    workspace = dataset.workspace
    if dataset.elsewhere and workspace.store is not None:
        address = str(workspace.where(place))
        return StoredCheckpoint(dataset.scratch / place, key, seconds, address=address)
    return Checkpoint(workspace.root / place, key, seconds)
