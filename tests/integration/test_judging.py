"""`blend`, `tune` and `backtest` from the command line after a finished night."""

from __future__ import annotations

import json
import re
import subprocess

import polars as pl
import pytest

from tests.integration.commands import run_forked
from tests.integration.test_night import night
from tests.projects import SMALL, write_project


def run(name: str, folder, feed, *more: str) -> subprocess.CompletedProcess:
    arguments = ["-c", str(folder / "project.toml"), "-d", str(feed), "-w", str(folder / "ws")]
    return run_forked(name, *arguments, *more)


@pytest.fixture(scope="module")
def finished_night(tmp_path_factory, feed):
    folder = tmp_path_factory.mktemp("judged")
    write_project(folder, SMALL)
    done = night(folder, feed)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_stored_blend_changes_the_ranking_without_training(finished_night, feed):
    before = pl.read_parquet(finished_night / "ws/rankings/date=2026-03-09/part-0.parquet")
    figures = finished_night / "blend.json"
    searched = run("blend", finished_night, feed, "--tries", "20", "--json", str(figures))
    assert searched.returncode == 0, searched.stderr
    assert "not stored: add --store" in searched.stdout
    results = json.loads(figures.read_text())
    front = [p for p in results["points"] if p["best"]]
    assert results["proposed"] in front
    assert (finished_night / "ws/blends/2026-03-08.png").stat().st_size > 5_000
    stored = run("blend", finished_night, feed, "--set", "like=1", "--store")
    assert stored.returncode == 0, stored.stderr
    assert "small version 1 blends weighted_sum: click 0, like 1" in stored.stdout
    scored = run("score", finished_night, feed, "--date", "2026-03-09")
    assert scored.returncode == 0, scored.stderr
    after = pl.read_parquet(finished_night / "ws/rankings/date=2026-03-09/part-0.parquet")
    assert after["model_version"].unique().to_list() == ["1"]
    assert (after["score"] - after["like"]).abs().max() < 1e-6
    assert not after.select("user_id", "item_id").equals(before.select("user_id", "item_id"))
    invalid = run("blend", finished_night, feed, "--set", "clicks=1")
    assert invalid.returncode == 2
    assert "--set clicks: no such objective; allowed: click, like" in invalid.stderr


@pytest.mark.slow
def test_tune_is_resumed_and_logs_every_trial(finished_night, feed):
    first = run("tune", finished_night, feed, "--model", "mmoe", "--trials", "2")
    assert first.returncode == 0, first.stderr
    figures = finished_night / "tune.json"
    resumed = run(
        "tune", finished_night, feed, "--model", "mmoe", "--trials", "4", "--json", str(figures)
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after 2 trials" in resumed.stdout
    assert "[models.mmoe]" in resumed.stdout
    printed = " ".join(resumed.stdout.split())
    assert re.search(r"4 trials \(\d pruned\): [a-z]", printed), printed
    assert json.loads(figures.read_text())["trials"] == 4
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{finished_night}/ws/mlflow.db")
    experiment = client.get_experiment_by_name("small").experiment_id
    runs = client.search_runs([experiment], "tags.tuning = 'mmoe'")
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    nested = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(parents) == 1
    assert sorted(r.data.params["trial"] for r in nested) == ["0", "1", "2", "3"]
    assert {r.data.tags["mlflow.parentRunId"] for r in nested} == {parents[0].info.run_id}


@pytest.mark.slow
def test_backtest_prints_a_curve_of_every_policy(finished_night, feed):
    figures = finished_night / "backtest.json"
    span = ("--from", "2026-03-07", "--to", "2026-03-08", "--json", str(figures))
    done = run("backtest", finished_night, feed, *span, "--model", "mmoe")
    assert done.returncode == 0, done.stderr
    for heading in ("kept AUC", "champion AUC", "retrained AUC", "retrained over kept"):
        assert heading in done.stdout
    results = json.loads(figures.read_text())
    assert results["days"] == ["2026-03-07", "2026-03-08"]
    assert len(results["replayed"]) == 6
    assert (finished_night / "ws/backtests/2026-03-07_2026-03-08.png").stat().st_size > 5_000
    reversed_span = run(
        "backtest", finished_night, feed, "--from", "2026-03-08", "--to", "2026-03-07"
    )
    assert reversed_span.returncode == 2
    assert "is after --to" in reversed_span.stderr
