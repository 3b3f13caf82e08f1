"""Trainings as MLflow runs, on a real SQLite store."""

from __future__ import annotations

import mlflow
import pytest

from mtl_ranker.context import without_log
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.tracking import connection, registry
from tests.nightly.test_suite import LAST, prepared


@pytest.fixture
def recorded(tiny):
    project, workspace = prepared(tiny)
    suite = train_suite(without_log(project, workspace), LAST)
    connection.connect(workspace)
    return suite, registry.record(without_log(project, workspace), suite)


def test_a_runs_duration_is_that_of_its_training(recorded):
    suite, (logged, version, report) = recorded
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
