"""Trainings as MLflow runs, on a real SQLite store."""

from __future__ import annotations

import json

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException

from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.blend import BlendChoice
from mtl_ranker.tracking import connection, registry
from mtl_ranker.tracking.connection import without_credentials
from tests.nightly.test_suite import LAST, prepared


@pytest.fixture
def trained(tiny):
    context = prepared(tiny)
    connection.connect(context.workspace)
    return context, train_suite(context, LAST)


def test_a_runs_duration_is_that_of_its_training(trained):
    context, suite = trained
    logged, version, report = registry.record(context, suite)
    client = mlflow.MlflowClient()
    for run in suite.runs:
        info = client.get_run(logged.child_runs[run.label]).info
        assert info.start_time == round(1000 * run.started)
        assert info.end_time == round(1000 * run.ended)
        assert (info.end_time - info.start_time) / 1000 >= run.trained.seconds
        assert info.status == "FINISHED"
    parent = client.get_run(logged.run_id).info
    assert parent.start_time == min(round(1000 * run.started) for run in suite.runs)
    assert parent.end_time == max(round(1000 * run.ended) for run in suite.runs)
    assert report.is_file()
    assert client.get_model_version_by_alias("tiny", "challenger").version == version.version


def test_a_training_with_the_same_inputs_is_registered_once(trained, monkeypatch):
    """After an attempt that failed between the model's version and its alias, and after a rerun."""
    context, suite = trained

    def unavailable(*arguments, **options):
        raise MlflowException("503 Service Unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "set_registered_model_alias", unavailable)
        with pytest.raises(MlflowException, match="503"):
            registry.record(context, suite)
    logged, version, _ = registry.record(context, suite)
    again, same, _ = registry.record(context, suite)
    assert (again.run_id, same.version) == (logged.run_id, version.version)
    assert again.child_runs == logged.child_runs
    client = mlflow.MlflowClient()
    assert [v.version for v in client.search_model_versions("name = 'tiny'")] == [version.version]
    runs = client.search_runs([logged.experiment_id])
    assert {r.info.run_id for r in runs} == {logged.run_id, *logged.child_runs.values()}


def test_only_a_missing_model_means_that_there_is_no_champion(trained, monkeypatch):
    context, suite = trained
    assert registry.alias_version(context.project, "champion") is None
    registry.record(context, suite)
    assert registry.alias_version(context.project, "champion") is None
    assert registry.alias_version(context.project, "challenger") is not None

    def unavailable(*arguments, **options):
        raise MlflowException("503 Service Unavailable")

    monkeypatch.setattr(mlflow.MlflowClient, "get_registered_model", unavailable)
    for look in (registry.frozen, lambda project: registry.alias_version(project, "champion")):
        with pytest.raises(MlflowException, match="503"):
            look(context.project)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://admin:secret@host:5000", "http://host:5000"),
        ("https://admin:p%40ss@host/mlflow/#/runs?a=b", "https://host/mlflow/#/runs?a=b"),
        ("http://admin:p@ss@host:5000", "http://host:5000"),
        ("http://token@[::1]:5000/x", "http://[::1]:5000/x"),
        ("postgresql+psycopg2://mtl:s@db:5432/mlflow", "postgresql+psycopg2://db:5432/mlflow"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:////work/mlflow.db", "sqlite:////work/mlflow.db"),
    ],
)
def test_addresses_are_shown_without_credentials(url, shown):
    assert without_credentials(url) == shown


def test_a_promotion_that_fails_leaves_no_version_to_roll_back_to(trained, monkeypatch):
    context, suite = trained
    registry.record(context, suite)
    registry.record_decision(context.project, "1", Decision(True, "first"))
    mlflow.MlflowClient().create_model_version("tiny", "models:/tiny/1")

    def unavailable(*arguments, **options):
        raise MlflowException("503 Service Unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "set_registered_model_alias", unavailable)
        with pytest.raises(MlflowException, match="503"):
            registry.record_decision(context.project, "2", Decision(True, "better"))
    assert registry.champions(context.project) == ["1"]
    assert "promoted" not in mlflow.MlflowClient().get_model_version("tiny", "2").tags
    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "set_registered_model_tag", unavailable)
        with pytest.raises(MlflowException, match="503"):
            registry.record_decision(context.project, "2", Decision(True, "better"))
    assert registry.champions(context.project) == ["1", "2"]
    assert registry.roll_back(context.project) == ("2", "1")
    assert registry.champions(context.project) == ["1"]


def test_a_stored_blend_is_used_and_one_of_an_earlier_version_is_not_chained(trained):
    context, suite = trained
    project = context.project
    registry.record(context, suite)
    assert registry.load_version(project, "1").artifact.project.scoring.conditional == []
    registry.store_blend(
        project, "1", BlendChoice("weighted_product", {"click": 1.0, "long": -2.0}, ["long"])
    )
    scoring = registry.load_version(project, "1").artifact.project.scoring
    assert (scoring.blend, scoring.conditional) == ("weighted_product", ["long"])
    assert scoring.weights == {"click": 1.0, "long": -2.0}
    old = json.dumps({"blend": "weighted_sum", "weights": {"click": 1.0, "long": 2.0}})
    mlflow.MlflowClient().set_model_version_tag("tiny", "1", registry.BLEND_TAG, old)
    predicted = registry.load_version(project, "1").artifact.predict(suite.held_out.frame)
    by_hand = predicted["click"] + 2.0 * predicted["long"]
    np.testing.assert_allclose(predicted["score"].to_numpy(), by_hand.to_numpy(), rtol=1e-5)
