"""`mtl-ranker study …` as a person runs it: tables, pictures, MLflow, JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import mlflow
import pytest

from tests.integration.commands import environment


def study(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "mtl_ranker.commands.app", "study", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=folder,
        timeout=500,
    )


@pytest.mark.slow
def test_trainability_prints_draws_and_logs(tmp_path):
    options = ("--starts", 4, "--steps", 20, "--json", "found.json", "--workspace", "ws")
    done = study(tmp_path, "trainability", *options)
    assert done.returncode == 0, done.stderr
    assert "cut for time: 4 starts instead of 200; 20 steps instead of 10,000" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["spreads"]) == 9
    assert len(found["contrasts"]) == 6
    assert len(found["final_losses"]["mmoe 0.5"]) == 4
    assert f"{found['spreads'][0]['mean']['value']:.4f}" in done.stdout
    for name in ("mean_loss.png", "distributions.png"):
        assert (tmp_path / "ws/studies/trainability" / name).stat().st_size > 10_000
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'ws/mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'study-trainability'")
    assert len(client.search_runs([experiment.experiment_id])) == 1 + 9


@pytest.mark.slow
@pytest.mark.real
def test_census_prints_draws_and_logs(shared_data, tmp_path):
    pytest.importorskip("lightgbm")
    pytest.importorskip("optuna")
    size = ("--pair", 1, "--trials", 1, "--seeds", 2, "--epochs", 1)
    where = ("--data", shared_data / "census-income", "--json", "found.json", "--workspace", "ws")
    done = study(tmp_path, "census", *size, *where)
    assert done.returncode == 0, done.stderr
    assert "absolute correlation 0.18" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())["pairs"]["1"]
    assert {"LightGBM", "mmoe", "shared_bottom"} <= {m["name"] for m in found["models"]}
    assert (tmp_path / "ws/studies/census/census_pair_1.png").is_file()


@pytest.mark.slow
def test_wrong_folder_is_named(tmp_path):
    pytest.importorskip("lightgbm")
    pytest.importorskip("optuna")
    done = study(tmp_path, "census", "--data", tmp_path / "nothing")
    assert done.returncode == 2
    assert "neither census-income.data nor census-income.data.gz" in done.stderr
