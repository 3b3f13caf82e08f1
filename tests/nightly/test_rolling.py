"""Settings are compared on rolling days: earlier rows train, and the simplest good ones win."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from mtl_ranker.evaluation.criterion import Criterion
from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.nightly.contenders import Contender, train_model
from mtl_ranker.nightly.results import predicted_rows
from mtl_ranker.nightly.rolling import Confirmed, Rolling, Settings, choose, confirm, folds_of
from mtl_ranker.nightly.tuning import Budget, Study, tune
from mtl_ranker.training.dataset import HeldOut, load_dataset
from mtl_ranker.training.specs import model_specs
from tests.conftest import FIRST, tiny_events, write_day
from tests.nightly.test_suite import LAST, prepared
from tests.projects import TINY, edit_project, write_project


@pytest.fixture
def project_and_dataset(tiny):
    context = prepared(tiny)
    return context.project, load_dataset(context, LAST)


def of_file(project, **training):
    return Settings(training, project.models["mmoe"])


def test_a_fold_trains_on_the_days_before_its_validation_day(project_and_dataset):
    project, dataset = project_and_dataset
    *_, last = dataset.days.train
    own, earlier = folds_of(project, dataset, 2)
    assert own.train is dataset.train
    assert own.held_out.frame["date"].unique().to_list() == dataset.days.validate
    assert earlier.held_out.frame["date"].unique().to_list() == [last]
    train = dataset.frames["train"]
    assert len(earlier.train.labels) == train.filter(pl.col("date") < last).height
    assert len(earlier.validate.labels) == train.filter(pl.col("date") == last).height
    np.testing.assert_array_equal(earlier.validate.labels, earlier.held_out.labels)


def test_the_encoder_of_a_fold_does_not_know_its_validation_day(project_and_dataset):
    project, dataset = project_and_dataset
    last = dataset.days.train[-1]
    frame = dataset.frames["train"]
    number = "user_daily_impressions_3d"
    moved = frame.with_columns(
        pl.when(pl.col("date") == last).then(1e6).otherwise(pl.col(number)).alias(number)
    )
    other = replace(dataset, frames=dataset.frames | {"train": moved})
    one, two = (folds_of(project, each, 2)[1].encoder for each in (dataset, other))
    assert one == two


def test_vectors_are_looked_up_in_every_fold(tiny):
    vectors = [[float(n), -1.0] for n in range(13)]
    items = pl.DataFrame({"i": range(13), "content": vectors})
    items.write_parquet(tiny / "items.parquet")
    table = {"path": "items.parquet", "key": "i", "columns": ["content"]}
    edit_project(tiny, log={"items": table}, features={"embeddings": ["content"]})
    context = prepared(tiny)
    _, earlier = folds_of(context.project, load_dataset(context, LAST), 2)
    (looked_up,) = earlier.validate.tables
    found = looked_up[earlier.validate.vectors[:, 0]]
    assert found.tolist() == [vectors[n] for n in earlier.held_out.frame["item_id"]]


def test_at_least_half_of_the_training_days_remain(project_and_dataset):
    project, dataset = project_and_dataset
    days = len(dataset.days.train)
    found = folds_of(project, dataset, 100)
    assert len(found) == 1 + days // 2


@pytest.mark.slow
def test_the_gain_is_that_of_all_folds_rows_and_the_mean_over_seeds(project_and_dataset):
    project, dataset = project_and_dataset
    wrong = of_file(project, learning_rate=1e-5)
    [found] = confirm(project, dataset, {0: of_file(project), 4: wrong}, Rolling(2, 2))
    parts = folds_of(project, dataset, 2)
    spec = model_specs(project)["mmoe"]
    held_out = HeldOut(
        np.concatenate([fold.held_out.labels for fold in parts]),
        pl.concat([fold.held_out.frame for fold in parts]),
        dataset.list_keys,
    )

    def predictions(rate):
        training = project.training.model_copy(update={"learning_rate": rate})
        changed, by_seed = project.model_copy(update={"training": training}), []
        for seed in range(2):
            runs = [
                train_model(
                    changed,
                    replace(
                        dataset,
                        encoder=fold.encoder,
                        examples=dataset.examples
                        | {"train": fold.train, "validate": fold.validate},
                        frames=dataset.frames | {"validate": fold.held_out.frame},
                    ),
                    Contender("mmoe", spec, seed),
                )
                for fold in parts
            ]
            by_seed.append(np.concatenate([run.validate_prediction for run in runs]))
        return by_seed

    base, own = predictions(project.training.learning_rate), predictions(1e-5)
    criterion = Criterion.fit(dataset.tasks, predicted_rows(held_out, base[0]))
    values = [np.mean([criterion.value(p) for p in each]) for each in (own, base)]
    kept = [task for task in dataset.tasks if task.name in criterion.scale]
    unit = sum(t.weight for t in kept) / sum(t.weight / criterion.scale[t.name] for t in kept)
    assert found.trial == 4
    assert found.gain.value == pytest.approx((values[0] - values[1]) * unit, rel=1e-6)


@pytest.mark.slow
def test_equal_settings_gain_nothing(project_and_dataset):
    project, dataset = project_and_dataset
    same = of_file(project)
    [found] = confirm(project, dataset, {0: same, 1: same}, Rolling(2, 2))
    assert found.gain.value == 0
    assert not found.better


def confirmed(trial, value, low, parameters, worse=(), error=0.01):
    return Confirmed(trial, Interval(value, low, 1.0), error, list(worse), parameters)


def test_the_simplest_within_one_standard_error_of_the_best_is_chosen():
    best, level, behind = (
        confirmed(1, 0.050, 0.03, 900),
        confirmed(2, 0.041, 0.02, 500),
        confirmed(3, 0.039, 0.02, 100),
    )
    assert choose([best, level, behind]) is level
    assert choose([best, behind]) is best


def test_nothing_is_chosen_without_a_significant_gain_or_with_worse_log_loss():
    assert choose([]) is None
    assert choose([confirmed(1, 0.05, -0.001, 10), confirmed(2, 0.08, 0.05, 10, ["click"])]) is None
    one_seed = Confirmed(1, Interval(0.05, 0.04, 0.06, "one seed"), 0.01, [], 10)
    assert choose([one_seed]) is None


def learnable(day, rows=1_400):
    """Clicks that depend on the item."""
    rng = np.random.default_rng(day.toordinal())
    item = rng.integers(0, 20, rows)
    frame = tiny_events(day, rows)
    click = rng.random(rows) < np.where(item % 2 == 0, 0.9, 0.1)
    user = pl.Series(rng.integers(0, 200, rows))
    return frame.with_columns(u=user, i=pl.Series(item), click=pl.Series(click.astype(int)))


@pytest.mark.slow
def test_tune_replaces_settings_that_cannot_learn(tmp_path):
    training = {"learning_rate": 1e-6, "batch_size": 128, "epochs": 5}
    write_project(tmp_path, training=training, objectives=TINY["objectives"][:1])
    for n in range(6):
        day = FIRST + timedelta(days=n)
        write_day(tmp_path, day, learnable(day))
    context = prepared(tmp_path)
    project, dataset = context.project, load_dataset(context, LAST)
    search = tune(project, dataset, Study("mmoe"), Budget(4, finalists=1, folds=2))
    assert search.chosen is not None, search.confirmed
    assert search.chosen > 0
    assert search.training["learning_rate"] > 1e-4
