"""Tuning: starts with the project file's settings, can be resumed, never reads the test days."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mtl_ranker.config import parse_project
from mtl_ranker.evaluation.criterion import Criterion
from mtl_ranker.nightly.contenders import Contender, train_model
from mtl_ranker.nightly.results import predicted_rows
from mtl_ranker.nightly.tuning import (
    Budget,
    Callbacks,
    Study,
    Trial,
    as_toml,
    default_trial,
    open_study,
    suggest,
    tune,
)
from mtl_ranker.training.dataset import load_dataset
from mtl_ranker.training.specs import model_specs
from tests.nightly.test_suite import LAST, prepared
from tests.projects import WITHOUT, project_text


@pytest.fixture
def project_and_dataset(tiny):
    context = prepared(tiny)
    return context.project, load_dataset(context, LAST)


@pytest.mark.slow
def test_the_first_trial_is_the_project_file_and_the_best_is_at_least_as_good(project_and_dataset):
    project, dataset = project_and_dataset
    trials: list[Trial] = []
    search = tune(project, dataset, Study("mmoe"), Budget(6), Callbacks(trials.append))
    spec = model_specs(project)["mmoe"]
    expected = train_model(project, dataset, Contender("mmoe", spec, 0))
    rows = predicted_rows(dataset.validation, expected.validate_prediction)
    criterion = Criterion.fit(dataset.tasks, rows)
    value = criterion.value(expected.validate_prediction)
    assert trials[0].quality == pytest.approx(value, rel=1e-4)
    complete = [t.quality for t in trials if not t.pruned]
    assert trials[0].quality <= search.quality <= max(complete)
    assert search.trials == len(trials) == 6
    assert all(math.isnan(t.quality) == t.pruned for t in trials)


@pytest.mark.slow
def test_an_interrupted_search_is_resumed_and_a_finished_one_is_read(project_and_dataset, tmp_path):
    project, dataset = project_and_dataset
    study = Study("mmoe", storage=f"sqlite:///{tmp_path}/optuna.db")

    def stop(trial: Trial) -> None:
        if trial.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(project, dataset, study, Budget(5), Callbacks(stop))
    rest: list[Trial] = []
    search = tune(project, dataset, study, Budget(5), Callbacks(rest.append))
    assert search.trials == 5
    assert min(t.number for t in rest) >= 1
    more: list[Trial] = []
    assert tune(project, dataset, study, Budget(5), Callbacks(more.append)) == search
    assert more == []


@pytest.mark.slow
def test_the_test_days_are_never_read(project_and_dataset):
    project, dataset = project_and_dataset
    test = dataset.examples["test"]
    spoiled = dataclasses.replace(test, labels=torch.full_like(test.labels, float("nan")))
    other = dataclasses.replace(dataset, examples=dataset.examples | {"test": spoiled})
    study, budget = Study("mmoe"), Budget(3)
    assert tune(project, dataset, study, budget) == tune(project, other, study, budget)


def test_the_printed_settings_are_lines_of_a_project_file(project_and_dataset):
    project, dataset = project_and_dataset
    search = tune(project, dataset, Study("mmoe"), Budget(3))
    head = project_text(models=WITHOUT, training=WITHOUT)
    tuned = parse_project(head + as_toml(project, "mmoe", search), "tuned")
    assert tuned.models["mmoe"] | {"dropout": 0} == search.model | {"dropout": 0}
    assert tuned.training.learning_rate == pytest.approx(search.training["learning_rate"], rel=1e-4)
    first_trial = default_trial(tuned, tuned.models["mmoe"])
    assert first_trial["dropout"] == pytest.approx(search.model["dropout"], rel=1e-4)


def test_a_search_killed_in_its_first_trial_begins_with_the_project_file_again(
    project_and_dataset, tmp_path
):
    project, _ = project_and_dataset
    study = Study("mmoe", "killed", f"sqlite:///{tmp_path / 'optuna.db'}")
    first = open_study(project, study).ask()
    settings = suggest(first, project, project.models["mmoe"])
    again = open_study(project, study)
    open_study(project, study)
    assert len(again.get_trials()) == 2
    assert suggest(again.ask(), project, project.models["mmoe"]) == settings


def test_a_search_that_keeps_the_project_file_names_no_trial(project_and_dataset, tmp_path):
    project, dataset = project_and_dataset
    study = Study("mmoe", "killed", f"sqlite:///{tmp_path / 'optuna.db'}")
    open_study(project, study).ask()  # trial 0 is killed, so the project file has another number
    search = tune(project, dataset, study, Budget(1))
    assert search.chosen is None
    assert search.decision.endswith("whose settings are kept")
