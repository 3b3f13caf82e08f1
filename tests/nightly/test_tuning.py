"""Tuning: starts at the project file, goes on where it was, never reads the test days."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mtl_ranker.config import parse_project
from mtl_ranker.context import without_log
from mtl_ranker.nightly.contenders import Contender
from mtl_ranker.nightly.suite import train_model
from mtl_ranker.nightly.tuning import Budget, Study, Trial, as_toml, default_trial, tune
from mtl_ranker.training.dataset import load_dataset
from mtl_ranker.training.network import model_specs
from tests.nightly.test_suite import LAST, prepared
from tests.projects import WITHOUT, project_text


@pytest.fixture
def parts(tiny):
    project, workspace = prepared(tiny)
    return project, load_dataset(without_log(project, workspace), LAST)


def test_the_first_trial_is_the_project_file_and_the_best_is_at_least_as_good(parts):
    project, prepared_parts = parts
    trials: list[Trial] = []
    found = tune(project, prepared_parts, "mmoe", Budget(6), on_trial=trials.append)
    spec = model_specs(project)["mmoe"]
    same = train_model(project, prepared_parts, Contender("mmoe", spec, 0))
    assert trials[0].quality == pytest.approx(same.validate_quality)
    complete = [t.quality for t in trials if not t.pruned]
    assert found.quality == max(complete)
    assert found.trials == len(trials) == 6
    assert all(math.isnan(t.quality) == t.pruned for t in trials)


def test_an_interrupted_search_goes_on_and_equals_its_own_record(parts, tmp_path):
    project, prepared_parts = parts
    storage = f"sqlite:///{tmp_path}/optuna.db"

    def stop(trial: Trial) -> None:
        if trial.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(project, prepared_parts, "mmoe", Budget(5), Study(storage=storage), stop)
    rest: list[Trial] = []
    found = tune(project, prepared_parts, "mmoe", Budget(5), Study(storage=storage), rest.append)
    assert found.trials == 5
    assert min(t.number for t in rest) >= 1
    again: list[Trial] = []
    assert (
        tune(project, prepared_parts, "mmoe", Budget(5), Study(storage=storage), again.append)
        == found
    )
    assert again == []


def test_the_test_days_are_never_read(parts):
    project, prepared_parts = parts
    spoiled = dataclasses.replace(
        prepared_parts.examples["test"],
        labels=torch.full_like(prepared_parts.examples["test"].labels, float("nan")),
    )
    other = dataclasses.replace(
        prepared_parts, examples=prepared_parts.examples | {"test": spoiled}
    )
    assert tune(project, prepared_parts, "mmoe", Budget(3)) == tune(
        project, other, "mmoe", Budget(3)
    )


def test_what_is_printed_is_a_project_file_again(parts):
    project, prepared_parts = parts
    found = tune(project, prepared_parts, "mmoe", Budget(3))
    head = project_text(models=WITHOUT, training=WITHOUT)
    again = parse_project(head + as_toml(project, "mmoe", found), "tuned")
    assert again.models["mmoe"] | {"dropout": 0} == found.model | {"dropout": 0}
    assert again.training.learning_rate == pytest.approx(found.training["learning_rate"], rel=1e-4)
    now = default_trial(again, again.models["mmoe"])
    assert now["dropout"] == pytest.approx(found.model["dropout"], rel=1e-4)
