"""Labels mixed with the predictions of trees that were fitted on rows of other users."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from zlib import crc32

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import log_loss

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.models.objectives import Task
from mtl_ranker.nightly.contenders import (
    Contender,
    held_out_predictions,
    refit,
    train_model,
    with_trees,
)
from mtl_ranker.nightly.rolling import folds_of as rolling_folds
from mtl_ranker.training import distillation
from mtl_ranker.training.batches import Examples
from mtl_ranker.training.boosting import SETTINGS
from mtl_ranker.training.dataset import Dataset, load_dataset, with_rows, without_rows
from mtl_ranker.training.distillation import Teacher, fit_teacher, folds_of
from mtl_ranker.training.specs import model_specs
from tests.conftest import FIRST, write_log
from tests.nightly.test_suite import prepared
from tests.projects import project, with_training, write_project

LAST = FIRST + timedelta(days=5)
TASKS = [Task("click", "binary"), Task("watch", "regression"), Task("like", "binary")]


def rows(count: int) -> tuple[Examples, pl.DataFrame]:
    """Rows of 40 users with missing values and labels, as tensors and raw."""
    random = np.random.default_rng(0)
    numeric = random.normal(size=(count, 3)).astype(np.float32)
    numeric[random.random(numeric.shape) < 0.2] = np.nan
    codes = random.integers(0, 6, (count, 2))
    z = np.nan_to_num(numeric[:, 0]) + (codes[:, 0] == 3)
    click = random.random(count) < 1 / (1 + np.exp(-z))
    like = np.where(random.random(count) < 0.3, np.nan, click * (codes[:, 1] > 2))
    labels = torch.from_numpy(np.stack([click, z, like], 1).astype(np.float32))
    tensors = [torch.from_numpy(a) for a in (codes, np.zeros((count, 0), np.int64), numeric)]
    users = [f"user {n}" for n in random.integers(0, 40, count)]
    return Examples(*tensors, labels), pl.DataFrame({"user_id": users})


def test_labels_equal_a_loop_over_folds_with_scikit_learns_trees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distillation, "MOST_TREES", 40)
    train, frame = rows(1_000)
    teacher = fit_teacher(TASKS, train, frame, 0.3)
    assert teacher is not None
    found = teacher.taught(train, frame).labels.numpy()
    x = np.concatenate([train.numeric.numpy(), train.categorical.numpy()], 1)
    expected = train.labels.numpy().astype(np.float64)
    fold = np.array([crc32(user.encode()) % 4 for user in frame["user_id"]])
    assert set(fold) == {0, 1, 2, 3}
    for t in (0, 2):
        label = train.labels[:, t].numpy()
        known = ~np.isnan(label)
        for f in range(4):
            own, others = known & (fold == f), known & (fold != f)
            model = HistGradientBoostingClassifier(max_iter=40, random_state=0, **SETTINGS)
            model.fit(x[others], label[others])
            staged = [p[:, 1] for p in model.staged_predict_proba(x[own])]
            p = min(staged, key=lambda p: log_loss(label[own], p))
            expected[own, t] = 0.7 * label[own] + 0.3 * p
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.isnan(found[:, 2]).mean() > 0.2
    np.testing.assert_array_equal(found[:, 1], train.labels[:, 1].numpy())


def test_a_users_rows_are_of_one_fold_whatever_the_type_of_the_id() -> None:
    ids = pl.Series("user_id", [3, 3, 11, 3], dtype=pl.Int64)
    expected = [crc32(b"3") % 4, crc32(b"3") % 4, crc32(b"11") % 4, crc32(b"3") % 4]
    assert folds_of(ids).tolist() == folds_of(ids.cast(pl.String)).tolist() == expected


def test_an_objective_of_one_label_keeps_it() -> None:
    train, frame = rows(300)
    train.labels[:, 2] = 0.0
    teacher = fit_teacher(TASKS, train, frame, 0.9)
    assert teacher is not None
    taught = teacher.taught(train, frame).labels
    assert torch.equal(taught[:, 2], train.labels[:, 2])
    assert not torch.equal(taught[:, 0], train.labels[:, 0])


@pytest.fixture
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny log's rows need no more, and fits take seconds."""
    monkeypatch.setattr(distillation, "MOST_TREES", 10)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Context:
    root = write_log(tmp_path_factory.mktemp("distilled"))
    training = {"distill": 0.8, "trees": 4, "refit": True}
    write_project(root, training=training, calibration={"refit_days": 2})
    return prepared(root)


def trained(dataset: Dataset):
    own = dataset.reading.project
    return train_model(own, dataset, Contender("mmoe", model_specs(own)["mmoe"], 0))


def assert_same_weights(one, other) -> None:
    for name, value in one.trained.model.state_dict().items():
        assert torch.equal(value, other.trained.model.state_dict()[name]), name


@pytest.mark.usefixtures("few_trees")
def test_only_the_labels_of_a_training_are_soft(built: Context) -> None:
    dataset = load_dataset(built, LAST)
    plain = load_dataset(with_training(built, distill=0.0), LAST)
    for part, examples in dataset.examples.items():
        assert torch.equal(examples.labels.isnan(), plain.examples[part].labels.isnan())
        torch.testing.assert_close(
            examples.labels, plain.examples[part].labels, equal_nan=True, rtol=0, atol=0
        )
    soft, true = dataset.train.sample(10**6).labels, plain.train.sample(10**6).labels
    known = ~true.isnan()
    assert torch.equal(known, ~soft.isnan())
    assert ((soft[known] > 0) & (soft[known] < 1)).all()
    assert plain.train is plain.examples["train"]
    later = rolling_folds(dataset.reading.project, dataset, 2)[1]
    labels = later.train.sample(10**6).labels
    assert ((labels > 0) & (labels < 1)).any()
    assert set(later.validate.labels.unique().tolist()) >= {0.0, 1.0}


@pytest.mark.usefixtures("few_trees")
def test_a_share_of_zero_is_the_same_training_bit_for_bit(built: Context) -> None:
    plain = load_dataset(with_training(built, distill=0.0), LAST)
    teacher = load_dataset(built, LAST).teacher
    assert plain.teacher is None
    assert teacher is not None
    unmixed = replace(plain, teacher=Teacher(0.0, teacher.forests))
    assert_same_weights(trained(plain), trained(unmixed))


@pytest.mark.usefixtures("few_trees")
def test_trees_beside_the_network_learn_true_labels(built: Context) -> None:
    found = []
    for context in (built, with_training(built, distill=0.0)):
        dataset, own = load_dataset(context, LAST), context.project
        run = with_trees(own, dataset, trained(dataset))
        found.append((run, refit(own, dataset, run)))
    for (run, again), (plain, plain_again) in zip(found, found[1:], strict=False):
        for one, other in ((run, plain), (again, plain_again)):
            assert one.artifact.trees is not None
            assert other.artifact.trees is not None
            state = other.artifact.trees.state_dict()
            for name, value in one.artifact.trees.state_dict().items():
                assert torch.equal(value, state[name]), name
            assert not np.array_equal(one.raw_prediction, other.raw_prediction)


@pytest.mark.slow
@pytest.mark.usefixtures("few_trees")
def test_rows_from_files_and_on_another_host_have_the_same_labels(
    built: Context, tmp_path: Path
) -> None:
    whole = load_dataset(built, LAST)
    streamed = load_dataset(with_training(built, in_memory_rows=30), LAST)
    assert streamed.shards is not None
    expected = whole.train.sample(10**6).labels
    elsewhere = replace(without_rows(streamed), files={}, shards=None)
    for each in (
        streamed,
        with_rows(elsewhere, tmp_path / "streamed"),
        with_rows(without_rows(whole), tmp_path / "whole"),
    ):
        labels = each.train.sample(10**6).labels
        torch.testing.assert_close(labels, expected, equal_nan=True, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("few_trees")
def test_days_left_out_have_a_teacher_without_them(built: Context) -> None:
    """With other labels on a day, the training without it is the same bit for bit."""
    for rows_in_memory in (10**6, 30):
        dataset = load_dataset(with_training(built, in_memory_rows=rows_in_memory), LAST)
        run, day = trained(dataset), dataset.days.train[-1]
        own = dataset.reading.project
        [fold] = held_out_predictions(own, dataset, run, [day])
        flipped = dataset.frames["train"].with_columns(
            pl.when(pl.col("date") == day).then(1 - pl.col(label)).otherwise(label).alias(label)
            for label in dataset.reading.labels
        )
        other = replace(dataset, frames={**dataset.frames, "train": flipped})
        [again] = held_out_predictions(own, other, run, [day])
        np.testing.assert_array_equal(fold.prediction, again.prediction)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"distill": 0.5, "start": "champion"}}, r"training\.start = 'champion'"),
        ({"training": {"distill": 0.5, "negative_keep": 0.5}}, r"training\.negative_keep = 0\.5"),
        (
            {
                "training": {"distill": 0.5},
                "objectives": [
                    {"name": "s", "group": "engagement", "kind": "regression", "label": "play"}
                ],
            },
            "training.distill: needs at least one binary objective",
        ),
        ({"training": {"distill": 1.5}}, r"training\.distill"),
    ],
)
def test_what_cannot_be_distilled_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ProjectError, match=message):
        project(**changes)
