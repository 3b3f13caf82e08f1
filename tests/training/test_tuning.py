"""Tuning: starts at the project file, goes on where it was, never reads the test days."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mtl_ranker.config import parse_project
from mtl_ranker.judging import as_toml
from mtl_ranker.training.suite import model_specs, prepare, train_model
from mtl_ranker.training.tuning import Trial, default_trial, tune
from tests.training.test_suite import LAST, prepared


@pytest.fixture
def parts(tiny):
    project, workspace = prepared(tiny)
    return project, prepare(project, workspace, LAST)


def test_the_first_trial_is_the_project_file_and_the_best_is_at_least_as_good(parts):
    project, prepared_parts = parts
    trials: list[Trial] = []
    found = tune(project, prepared_parts, "mmoe", 6, on_trial=trials.append)
    spec = model_specs(project)["mmoe"]
    same = train_model(project, prepared_parts, "mmoe", spec, seed=0)
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
        tune(project, prepared_parts, "mmoe", 5, storage=storage, on_trial=stop)
    rest: list[Trial] = []
    found = tune(project, prepared_parts, "mmoe", 5, storage=storage, on_trial=rest.append)
    assert found.trials == 5
    assert min(t.number for t in rest) >= 1
    again: list[Trial] = []
    assert tune(project, prepared_parts, "mmoe", 5, storage=storage, on_trial=again.append) == found
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
    assert tune(project, prepared_parts, "mmoe", 3) == tune(project, other, "mmoe", 3)


def test_what_is_printed_is_a_project_file_again(parts, tiny):
    project, prepared_parts = parts
    found = tune(project, prepared_parts, "mmoe", 3)
    text = (tiny / "project.toml").read_text()
    head = text[: text.index("[models.mmoe]")]
    again = parse_project(head + as_toml(project, "mmoe", found), "tuned")
    assert again.models["mmoe"] | {"dropout": 0} == found.model | {"dropout": 0}
    assert again.training.learning_rate == pytest.approx(found.training["learning_rate"], rel=1e-4)
    now = default_trial(again, again.models["mmoe"])
    assert now["dropout"] == pytest.approx(found.model["dropout"], rel=1e-4)
