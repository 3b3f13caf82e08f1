"""Which model a night continues from, by a real registry: the champion, after rollbacks too."""

from __future__ import annotations

from datetime import timedelta

import mlflow
import pytest

from mtl_ranker.context import without_log
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.tracking import connection, registry
from tests.conftest import FIRST, write_log
from tests.projects import write_project

NIGHTS = [FIRST + timedelta(days=n) for n in (5, 6, 7)]


@pytest.fixture
def context(tmp_path):
    write_project(tmp_path, name="continued", training={"start": "champion", "epochs": 1})
    write_log(tmp_path, days=8)
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    for night in NIGHTS:
        build_split(context, night)
    connection.connect(context.workspace)
    return without_log(context.project, context.workspace)


@pytest.mark.slow
def test_nights_continue_from_the_champion_before_them(context):
    project, client = context.project, mlflow.MlflowClient()

    def train(night):
        plan = registry.night_plan(context, night)
        logged, version, _ = registry.record(context, train_suite(context, night, plan=plan))
        return plan, logged, version

    plan, logged, version = train(NIGHTS[0])
    assert plan.full
    assert "continued_from" in client.get_run(logged.run_id).data.params
    registry.record_decision(project, str(version.version), Decision(True, "first"))
    plan, logged, second = train(NIGHTS[1])
    assert plan.start.version == "1"
    of_model = client.get_run(next(iter(logged.child_runs.values()))).data.params
    for params in (client.get_run(logged.run_id).data.params, of_model):
        assert params["continued_from"] == "version 1"
        assert params["new_days"] == f"{FIRST + timedelta(days=4)}..{FIRST + timedelta(days=4)}"
    registry.record_decision(project, str(second.version), Decision(True, "better"))
    # The same night again starts from the same model, and is registered once.
    again, _, version = train(NIGHTS[1])
    assert again.start.version == "1"
    assert version.version == second.version
    assert registry.night_plan(context, NIGHTS[2]).start.version == "2"
    registry.roll_back(project)
    plan, _, _ = train(NIGHTS[2])
    assert plan.start.version == "1"
    assert plan.start.after == FIRST + timedelta(days=3)
