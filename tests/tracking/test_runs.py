"""Trainings as MLflow runs, on a real SQLite store."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from flows.nightly import record
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.influence import MEASURE_NAMES
from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly import history
from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.results import Suite
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.blend import BlendChoice
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.reports.markdown import shortened
from mtl_ranker.tracking import connection, registry, view
from mtl_ranker.tracking.connection import without_credentials
from mtl_ranker.tracking.runs import Logged
from mtl_ranker.tracking.system import Sample, system_measured
from tests.conftest import write_log
from tests.nightly.test_suite import LAST, prepared
from tests.projects import write_project


@pytest.fixture
def trained(tiny):
    context = prepared(tiny)
    connection.connect(context.workspace)
    return context, train_suite(context, LAST)


@dataclass(frozen=True)
class Recorded:
    """A training that is registered.

    Attributes:
        samples: of the machine, from the milliseconds `before` on.
    """

    context: Context
    suite: Suite
    samples: list[Sample]
    before: int
    logged: Logged
    version: ModelVersion
    report: Path


@pytest.fixture
def recorded(once: Recorded) -> Recorded:
    """For tests that change nothing in MLflow."""
    connection.connect(once.context.workspace)
    return once


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Recorded:
    folder = write_log(tmp_path_factory.mktemp("recorded"))
    write_project(folder, name="recorded")
    context = prepared(folder)
    connection.connect(context.workspace)
    suite, before = train_suite(context, LAST), round(1_000 * time.time())
    with system_measured(0.05) as samples:
        sum(i * i for i in range(300_000))
        time.sleep(0.2)
    found = registry.record(context, suite, samples)
    return Recorded(context, suite, samples, before, *found)


def test_a_runs_duration_is_that_of_its_training(recorded):
    suite, logged = recorded.suite, recorded.logged
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
    assert recorded.report.is_file()
    challenger = client.get_model_version_by_alias("recorded", "challenger")
    assert challenger.version == recorded.version.version


@pytest.mark.slow
def test_a_nights_report_in_mlflow_has_what_rules_changed(tiny):
    """The page in MLflow is the page in the workspace, with the lists of the day."""
    write_project(tiny, scoring={"top_k": 3, "rules": {"seen_days": 7}})
    context = prepared(tiny)
    connection.connect(context.workspace)
    suite = train_suite(context, LAST)
    logged, version, page = registry.record(context, suite)
    mlflow.MlflowClient().set_registered_model_alias("tiny", "champion", version.version)
    ranker = registry.load_artifact(context.project, "champion")
    with_log = open_context(str(tiny / "project.toml"), tiny, context.workspace.root)
    ranked = score_day(with_log, ranker, LAST + timedelta(days=1))
    record(context, suite, Decision(True, "the first model"), ranked, 0.0)
    stored = mlflow.artifacts.download_artifacts(run_id=logged.run_id, artifact_path="report.html")
    text = Path(stored).read_text("utf-8")
    assert text == page.read_text("utf-8")
    assert '<td class="name">seen_days</td>' in text
    assert [each.day for each in history.stored(context.workspace)] == [LAST]


@pytest.mark.slow
def test_weights_chosen_by_maximise_are_stored_with_the_version(tiny):
    asked = {"maximise": "engagement", "keep": {"satisfaction": 0.5}, "weights": {"long": 9.0}}
    write_project(tiny, scoring=asked)
    context = prepared(tiny)
    connection.connect(context.workspace)
    suite = train_suite(context, LAST)
    assert any("(scoring.maximise)" in note for note in suite.notes)
    _, version, _ = registry.record(context, suite)
    loaded = registry.load_version(context.project, version.version).artifact
    assert loaded.project.blend_weights == suite.kept_blend.choice.weights
    assert loaded.project.blend_weights != context.project.blend_weights


@pytest.mark.slow
def test_a_training_with_the_same_inputs_is_registered_once(named, monkeypatch):
    """After an attempt that failed between the model's version and its alias, and after a rerun."""
    context, suite = named

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
    registered = client.search_model_versions(f"name = '{context.project.name}'")
    assert [v.version for v in registered] == [version.version]
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
    for version in ("2", "1"):
        registry.record_decision(context.project, version, Decision(True, "again"))
    assert registry.champions(context.project) == ["1", "2", "1"]


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
    rows = suite.held_out.frame
    served = mlflow.pyfunc.load_model("models:/tiny/1").predict(rows.to_pandas())
    of_pipeline = registry.load_version(project, "1").artifact.predict(rows)
    assert served["score"].tolist() == of_pipeline["score"].to_list()
    by_hand = of_pipeline["click"] * of_pipeline["long"] ** -2.0
    np.testing.assert_allclose(served["score"], by_hand.to_numpy(), rtol=1e-5)
    old = json.dumps({"blend": "weighted_sum", "weights": {"click": 1.0, "long": 2.0}})
    mlflow.MlflowClient().set_model_version_tag("tiny", "1", registry.BLEND_TAG, old)
    predicted = registry.load_version(project, "1").artifact.predict(suite.held_out.frame)
    by_hand = predicted["click"] + 2.0 * predicted["long"]
    np.testing.assert_allclose(predicted["score"].to_numpy(), by_hand.to_numpy(), rtol=1e-5)


@pytest.fixture
def named(tiny, request):
    """A training of a project of its own, as all tests of a process share MLflow's database."""
    write_project(tiny, name=request.node.name)
    context = prepared(tiny)
    connection.connect(context.workspace)
    return context, train_suite(context, LAST)


def first_lines(project) -> list[str]:
    """Of the descriptions of versions 1 and 3; the night that trained the first has the same."""
    client = mlflow.MlflowClient()
    versions = [client.get_model_version(project.name, version) for version in ("1", "3")]
    lines = [(each.description or "").splitlines()[0] for each in versions]
    run = client.get_run(client.get_run(versions[0].run_id).data.tags["mlflow.parentRunId"])
    assert run.data.tags[MLFLOW_RUN_NOTE].startswith(lines[0])
    return [lines[0], lines[1].partition(" Better")[0]]


def test_rolling_back_once_more_says_what_the_other_versions_are(named):
    context, suite = named
    project, client = context.project, mlflow.MlflowClient()
    registry.record(context, suite)
    registry.record_decision(project, "1", Decision(True, "first"))
    with pytest.raises(ProjectError, match=r"to; version 1 is champion and the only version$"):
        registry.roll_back(project)
    for _ in range(3):
        client.create_model_version(project.name, f"models:/{project.name}/1")
    registry.record_decision(project, "3", Decision(True, "better"))
    assert first_lines(project) == ["Version 1 was champion. First.", "Version 3 is champion."]
    registry.roll_back(project)
    assert registry.rolled_back(project, "3")
    assert first_lines(project) == ["Version 1 is champion. First.", "Version 3 was champion."]
    words = r"champion before it; rolled back: 3; never champion: 2, 4$"
    with pytest.raises(ProjectError, match=words):
        registry.roll_back(project)
    registry.record_decision(project, "3", Decision(True, "accepted by hand"))
    assert not registry.rolled_back(project, "3")
    # All versions are copies of one model, whose files are removed from MLflow's artifacts.
    (ranker,) = {file.parent for file in context.workspace.root.rglob("ranker/project.toml")}
    weights = (ranker / "weights.safetensors").read_bytes()
    (ranker / "weights.safetensors").write_bytes(weights[:1_000])
    words = rf"^models:/{project.name}/3: files of its ranker are damaged \(.*invalid header"
    with pytest.raises(ProjectError, match=words):
        registry.load_artifact(project, "champion")
    for name in ("weights.safetensors", "encoder.json"):  # one is lost, then another, then all
        (ranker / name).unlink()
        with pytest.raises(ProjectError, match=f"/3: {name} of its files is not in MLflow's"):
            registry.load_artifact(project, "champion")
    shutil.rmtree(ranker.parents[1])
    with pytest.raises(ProjectError, match=rf"^models:/{project.name}/3: its files are not in"):
        registry.load_artifact(project, "champion")


def test_runs_name_their_days_and_a_digest_of_each(recorded):
    """Of the parent and of the winner's run, to which the registered version points."""
    context, suite, client = recorded.context, recorded.suite, mlflow.MlflowClient()
    logged, version = recorded.logged, recorded.version
    for run_id in (logged.run_id, version.run_id):
        inputs = client.get_run(run_id).inputs.dataset_inputs
        by_part = {t.value: i for i in inputs for t in i.tags if t.key == "mlflow.data.context"}
        assert set(by_part) == {"train", "validate", "test"}
        profile = json.loads(by_part["train"].dataset.profile)
        frame = context.workspace.scan("examples", suite.days.train).collect()
        assert profile["num_rows"] == frame.height
        assert profile["users"] == frame["user_id"].n_unique()
        assert profile["label_means"]["click"] == pytest.approx(
            frame["label_click"].mean(), abs=1e-5
        )
        digests = profile["digests"]
        assert list(digests) == [str(day) for day in suite.days.train]
        for day in suite.days.train:
            mark = context.workspace.published_fingerprint("examples", day)
            assert mark is not None
            assert mark.startswith(digests[str(day)])
        assert by_part["train"].dataset.digest != by_part["test"].dataset.digest


@pytest.mark.slow
def test_a_long_training_is_logged_in_full(named):
    context, suite = named
    run = suite.runs[0]
    first = run.trained.epochs[0]
    epochs = [replace(first, number=n, monitored=1.0 / n) for n in range(1, 401)]
    long = replace(run, trained=replace(run.trained, epochs=epochs))
    runs = [long, *suite.runs[1:]]
    winner = long if suite.winner is run else suite.winner
    logged, _, _ = registry.record(context, replace(suite, runs=runs, winner=winner))
    client, child = mlflow.MlflowClient(), logged.child_runs[long.label]
    history = client.get_metric_history(child, "validate/normalised_loss")
    assert {m.step: m.value for m in history} == {e.number: e.monitored for e in epochs}
    stored = client.get_run(child).data
    assert stored.metrics["train/seconds"] == long.trained.seconds  # the last one that is sent
    assert (stored.params["model"], stored.tags["winner"]) == (
        long.name,
        str(winner is long).lower(),
    )


def test_a_training_compares_and_reads_in_mlflows_pages(recorded):
    context, suite = recorded.context, recorded.suite
    logged, version = recorded.logged, recorded.version
    project, client, winner = context.project, mlflow.MlflowClient(), suite.winner
    parent, child = client.get_run(logged.run_id), client.get_run(version.run_id)
    expected = {
        f"test/{objective}/{name}": value
        for objective, metrics in winner.metrics.items()
        for name, value in metrics.items()
        if not np.isnan(value)
    } | {"validate/quality": winner.validate_quality}
    assert len(expected) > 8
    for run in (parent, child):
        assert {k: run.data.metrics.get(k) for k in expected} == pytest.approx(expected)
        assert not [v for v in run.data.params.values() if v.startswith(("[", "{", "("))]
        assert all(len(name.split("/")) > 1 for name in run.data.metrics)
    assert child.data.params["expert_hidden"] == "8"
    assert parent.data.tags["seeds"] == "0"
    assert (parent.data.tags["winner"], child.data.tags["winner"]) == (winner.name, "true")
    text = client.get_model_version(project.name, version.version).description
    assert text == parent.data.tags["mlflow.note.content"]
    measure = suite.measures["click"]
    title = f"| click ({MEASURE_NAMES[measure]})"
    row = next(line for line in text.splitlines() if line.startswith(title))
    assert f"**{winner.metrics['click'][measure]:.4f}**" in row
    assert f"/runs/{logged.run_id}/artifacts/report.html)" in text
    state = json.loads(client.get_experiment(logged.experiment_id).tags[view.TAG])
    assert state["orderByKey"] == "metrics.`validate/quality`"
    assert f"metrics.`test/long/{suite.measures['long']}`" in state["selectedColumns"]
    found = client.search_runs([logged.experiment_id], state["searchFilter"])
    assert [run.info.run_id for run in found] == [logged.run_id]


def test_decisions_are_in_descriptions_and_runs_say_which_is_champion(named):
    context, suite = named
    project, client = context.project, mlflow.MlflowClient()
    logged, version, _ = registry.record(context, suite)
    differences = {"click": Interval(0.01, 0.002, 0.018)}
    registry.record_decision(project, "1", Decision(True, "first" * 200, None, differences))
    text = client.get_model_version(project.name, "1").description
    decision, training = text.split("### Training")
    assert decision.startswith(f"Version 1 is champion. F{('first' * 200)[1:]}.\n")
    assert "| objective | &nbsp;&nbsp;challenger minus champion |" in decision
    assert "| click | &nbsp;&nbsp;+0.0100 [+0.0020, +0.0180] |" in decision
    assert "wins on the validation days" in training
    assert client.get_model_version(project.name, "1").tags["promotion"] == "first" * 200
    # Another decision on it replaces this one.
    registry.record_decision(project, "1", Decision(False, "again"))
    text = client.get_run(logged.run_id).data.tags["mlflow.note.content"]
    assert text.startswith("Version 1 is not champion. Again.\n\n### Training")
    assert text.count("### Training") == 1

    def champion_tags() -> list[str | None]:
        runs = [logged.run_id, version.run_id, other]
        return [client.get_run(run).data.tags.get("champion") for run in runs]

    other = client.create_run(logged.experiment_id).info.run_id
    client.create_model_version(project.name, f"models:/{project.name}/1", run_id=other)
    assert champion_tags() == ["true", "true", None]
    registry.record_decision(project, "2", Decision(True, "better"))
    assert champion_tags() == ["false", "false", "true"]
    client.delete_run(other)  # by hand, in MLflow's page
    registry.roll_back(project)
    assert champion_tags()[:2] == ["true", "true"]


def test_a_long_description_ends_with_a_whole_line():
    text = "\n".join(["a" * 40] * 10)
    assert shortened(text, 1_000) == text
    assert shortened(text, 100) == "\n".join(["a" * 40] * 2) + "\n..."


def test_cpu_and_memory_are_logged_at_their_times(recorded):
    pytest.importorskip("psutil")
    samples = recorded.samples
    assert len(samples) >= 2
    history = mlflow.MlflowClient().get_metric_history(
        recorded.logged.run_id, "system/cpu_utilization_percentage"
    )
    assert [m.timestamp for m in history] == [s.milliseconds for s in samples]
    assert recorded.before <= history[0].timestamp <= round(1_000 * time.time())
    memory = samples[-1].values["system_memory_usage_megabytes"] * 1e6
    assert 0 < memory < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_day_that_a_version_was_trained_on_cannot_decide(recorded):
    project = recorded.context.project
    assert registry.tested_later(project, LAST, ["1"]) is None
    assert registry.tested_later(project, LAST + timedelta(days=3), ["1"]) is None
    reason = registry.tested_later(project, LAST - timedelta(days=1), ["1"])
    assert reason.startswith(f"version 1 was trained on days before {LAST}")
