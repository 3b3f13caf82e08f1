"""Comparison of settings on rolling validation days and training seeds.

The best of many trials on one validation day has partly been lucky, with that day and with its
seed. Its settings replace others only where they are also better over several validation days, each
predicted by trainings on earlier days only, and several seeds. Of settings that are equally good
within one standard error, the simplest are chosen (the one-standard-error rule; Breiman et al.,
Classification and Regression Trees, 1984, section 3.4.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.evaluation.criterion import Criterion
from mtl_ranker.evaluation.intervals import Interval, compare
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.encoders import Encoder, fit_encoder
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.results import predicted_rows
from mtl_ranker.training.batches import Examples, encode_examples
from mtl_ranker.training.dataset import Dataset, HeldOut
from mtl_ranker.training.distillation import fit_teacher
from mtl_ranker.training.loop import Design, Rows, train_ranker
from mtl_ranker.training.network import predict
from mtl_ranker.training.shards import ShardedExamples


@dataclass(frozen=True)
class Settings:
    """Settings of `[training]` and of a `[models.NAME]`."""

    training: Mapping[str, Any]
    model: Mapping[str, Any]


@dataclass(frozen=True)
class Rolling:
    """How settings are compared.

    Attributes:
        folds: validation days, at most.
        seeds: trainings of each settings on each of them.
    """

    folds: int
    seeds: int


@dataclass(frozen=True)
class Fold:
    """A validation day and the earlier days.

    Attributes:
        validate: the validation rows as tensors.
        held_out: the same rows with their keys.
    """

    train: Examples | ShardedExamples
    encoder: Encoder
    validate: Examples
    held_out: HeldOut


@dataclass(frozen=True)
class Confirmed:
    """Settings compared with the project file's over all folds and seeds.

    Attributes:
        trial: its number in the search.
        gain: difference of the criterion, in the qualities' unit, over users and seeds.
        standard_error: of the gain.
        worse: objectives whose log loss is significantly worse.
        parameters: number of trained parameters.
    """

    trial: int
    gain: Interval
    standard_error: float
    worse: Sequence[str]
    parameters: int

    @property
    def better(self) -> bool:
        """Whether the gain's interval is above zero and no log loss is worse."""
        return bool(self.gain.low > 0) and not self.gain.note and not self.worse

    def __str__(self) -> str:
        words = f"trial {self.trial}: {self.gain.signed} over the project file"
        if self.gain.note:
            words += f" ({self.gain.note})"
        if self.worse:
            words += f"; log loss of {', '.join(self.worse)} significantly worse"
        return f"{words}; {self.parameters:,} parameters"


def folds_of(project: Project, dataset: Dataset, count: int) -> list[Fold]:
    """The dataset's own validation days, and before them up to `count` - 1 training days, latest
    first.

    A fold trains on the days before its validation day, of which it keeps at least half of the
    split's. Where training rows are streamed, the folds before the first have the sample that is in
    memory.
    """
    found = [Fold(dataset.train, dataset.encoder, dataset.examples["validate"], dataset.validation)]
    labels, keys = [LABEL + task.name for task in dataset.tasks], dataset.list_keys
    known = dataset.frames["train"]
    days = sorted(known["date"].unique())
    for day in reversed(days[-(-len(days) // 2) :]):
        if len(found) == count:
            break
        before, rows = known.filter(pl.col("date") < day), known.filter(pl.col("date") == day)
        encoder = fit_encoder(project, before, tables=dataset.encoder.tables)
        trained_on = dataset.trained_on(before)
        train = encode_examples(encoder, trained_on, labels, keys)
        distill = dataset.reading.project.training.distill
        teacher = fit_teacher(dataset.tasks, train, trained_on, distill)
        if teacher is not None:
            train = teacher.taught(train, trained_on)
        validate = encode_examples(encoder, rows, labels, keys)
        found.append(Fold(train, encoder, validate, HeldOut(validate.labels.numpy(), rows, keys)))
    return found


def confirm(
    project: Project,
    dataset: Dataset,
    candidates: Mapping[int, Settings],
    rolling: Rolling,
    on_training: Callable[[], None] = lambda: None,
) -> list[Confirmed]:
    """Train all settings on each fold with each seed, and compare them with the first ones.

    Args:
        candidates: by the number of their trial; the first ones are the incumbent.
        on_training: called after each training.
    """
    parts = folds_of(project, dataset, rolling.folds)

    def predictions(settings: Settings) -> tuple[list[np.ndarray], int]:
        """[rows of all folds, T] of each seed, and the number of parameters."""
        found, parameters = [], 0
        for seed in range(rolling.seeds):
            by_fold = []
            for fold in parts:
                predicted, parameters = _trained(project, dataset, fold, settings, seed)
                by_fold.append(predicted)
                on_training()
            found.append(np.concatenate(by_fold))
        return found, parameters

    [(_, incumbent), *others] = candidates.items()
    base, _ = predictions(incumbent)
    frame = pl.concat([fold.held_out.frame for fold in parts], how="vertical_relaxed")
    labels = np.concatenate([fold.held_out.labels for fold in parts])
    held_out = HeldOut(labels, frame, dataset.list_keys)
    criterion = Criterion.fit(dataset.tasks, predicted_rows(held_out, base[0]))
    reference = criterion.quality(base)
    confirmed = []
    for number, settings in others:
        try:
            own, parameters = predictions(settings)
        except FloatingPointError:  # the loss is no number with another seed or on another day
            diverged = Interval(float("nan"), float("nan"), float("nan"), "the training diverged")
            confirmed.append(Confirmed(number, diverged, float("nan"), [], 0))
            continue
        gain = compare(criterion.quality(own), reference)
        confirmed.append(
            Confirmed(
                number,
                gain.interval(),
                gain.standard_error,
                criterion.worse_loss(own, base),
                parameters,
            )
        )
    return confirmed


def choose(confirmed: Sequence[Confirmed]) -> Confirmed | None:
    """The simplest of the better settings within one standard error of the best; None if none is
    better than the incumbent."""
    better = [each for each in confirmed if each.better]
    if not better:
        return None
    best = max(better, key=lambda each: each.gain.value)
    level = best.gain.value - best.standard_error
    level_with_best = [each for each in better if each.gain.value >= level]
    return min(level_with_best, key=lambda each: (each.parameters, -each.gain.value))


def _trained(
    project: Project, dataset: Dataset, fold: Fold, settings: Settings, seed: int
) -> tuple[np.ndarray, int]:
    """Predictions [N, T] on the fold's validation rows, and the number of parameters."""
    spec = make("models", dict(settings.model), len(dataset.tasks), project.features.groups)
    training = project.training.model_copy(update=dict(settings.training))
    design = Design(spec, fold.encoder, dataset.tasks)
    trained = train_ranker(design, Rows(fold.train, fold.validate), training, seed)
    parameters = sum(each.numel() for each in trained.model.parameters())
    return predict(trained.model, fold.validate, dataset.tasks), parameters
