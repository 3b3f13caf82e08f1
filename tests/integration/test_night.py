"""Whole nights through the command line: real Prefect, real MLflow on SQLite, real Parquet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mtl_ranker.logs.simulate import Feed, make_world, truth
from mtl_ranker.logs.sources import open_context
from mtl_ranker.ranking.candidates import prepared_candidates
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST
from tests.integration import forks
from tests.integration.commands import command, environment, run_forked, shared_api
from tests.isolated import run_isolated
from tests.projects import SMALL, WITHOUT, project_text, write_project


def night(folder: Path, feed: Path, name: str = "nightly", *more: str, more_env=None):
    write_project(folder, SMALL)
    arguments = ["--config", str(folder / "project.toml"), "--data", str(feed)]
    return run_forked(name, *arguments, "--workspace", folder / "ws", *more, env=more_env)


def night_alone(folder: Path, feed: Path) -> subprocess.CompletedProcess[str]:
    """A night in a process of its own, which starts its own Prefect API."""
    write_project(folder, SMALL)
    return subprocess.run(
        command("nightly", "-c", folder / "project.toml", "-d", feed, "-w", folder / "ws"),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=1200,
    )


def champion_quality(printed: str, objectives: tuple[str, ...]) -> dict[str, float]:
    """AUC of the marked model per objective, from the printed table."""
    quality, objective = {}, ""
    for line in printed.splitlines():
        cells = line.split()
        if cells and cells[0] in objectives:
            objective = cells[0]
        if "*" in cells[1:] and objective:
            quality[objective] = float(cells[-4])  # before log loss, calibration and ECE
    return quality


@pytest.fixture(scope="module")
def finished_night(tmp_path_factory, feed):
    folder = tmp_path_factory.mktemp("night")
    return folder, night_alone(folder, feed)


@pytest.mark.slow
def test_night_prints_a_table_and_publishes_rankings(finished_night):
    folder, done = finished_night
    assert done.returncode == 0, done.stderr
    for word in ("ingest", "features", "base_rate", "item_popularity", "mmoe", "champion", "date="):
        assert word in done.stdout
    for noise in ("Traceback", "database is locked", "Warning"):
        assert noise not in done.stdout + done.stderr
    ranked = pl.read_parquet(folder / "ws/rankings/date=2026-03-09/part-0.parquet")
    assert ranked.columns == [
        "user_id",
        "item_id",
        "surface",
        "click",
        "like",
        "score",
        "rank",
        "model_version",
    ]
    assert ranked["rank"].max() == 5
    for _, user in ranked.group_by("user_id"):
        assert user["rank"].to_list() == list(range(1, user.height + 1))
        assert user["score"].is_sorted(descending=True)


@pytest.mark.slow
def test_ranking_agrees_with_the_true_probabilities(finished_night):
    """The items ranked first have a higher true value than the average candidate."""
    folder, _ = finished_night
    ranked = pl.read_parquet(folder / "ws/rankings/date=2026-03-09/part-0.parquet")
    world = make_world(Feed(impressions=12_000, days=7, users=300, items=200, first_day=FIRST))
    users = ranked["user_id"].unique().sort().to_numpy()
    items = ranked["item_id"].unique().to_numpy()
    top = ranked.filter(pl.col("rank") == 1)
    click, like, _ = truth(world, top["user_id"].to_numpy(), top["item_id"].to_numpy())
    pairs = np.repeat(users, len(items)), np.tile(items, len(users))
    all_click, all_like, _ = truth(world, *pairs)
    assert (click + click * like).mean() > (all_click + all_click * all_like).mean()


@pytest.mark.slow
def test_registered_model_scores_raw_rows_in_a_fresh_process(finished_night):
    folder, _ = finished_night
    script = f"""
import mlflow, polars as pl
mlflow.set_tracking_uri("sqlite:///{folder}/ws/mlflow.db")
model = mlflow.pyfunc.load_model("models:/small@champion")
rows = pl.read_parquet("{folder}/ws/examples/date=2026-03-08/part-0.parquet").head(7).to_pandas()
names = [c["name"] for c in model.metadata.get_input_schema().to_dict()]
scored = model.predict(rows[names])
assert list(scored.columns) == ["click", "like", "score"], scored
assert len(scored) == 7 and scored.notna().all().all()
assert ((scored["score"] - scored["click"] - scored["like"]).abs() < 1e-6).all()
print("scored")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=folder,
        timeout=600,
    )
    assert done.stdout.strip().endswith("scored"), done.stderr
    weights = list((folder / "ws/mlartifacts").rglob("weights.safetensors"))
    assert len(weights) == 1
    assert not list((folder / "ws/mlartifacts").rglob("*.pkl"))


@pytest.mark.slow
def test_given_candidates_with_unknown_users_and_items_are_all_scored(
    finished_night, feed, tmp_path
):
    folder, _ = finished_night
    data = tmp_path / "data"
    data.mkdir()
    for name in ("log", "items.parquet"):
        (data / name).symlink_to(feed / name)
    given = pl.DataFrame({"user": [1, 1, 999_999], "item": [3, 888_888, 3]})
    given.write_parquet(data / "candidates.parquet")
    scoring = {"candidates": "candidates.parquet", "publish": str(tmp_path / "table")}
    project = project_text(SMALL, scoring=scoring)
    (folder / "given.toml").write_text(project)
    done = run_forked(
        "score",
        "-c",
        folder / "given.toml",
        "-d",
        str(data),
        "-w",
        str(folder / "ws"),
        "--date",
        "2026-03-10",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    ranked = pl.read_parquet(folder / "ws/rankings/date=2026-03-10/part-0.parquet")
    assert set(ranked.select("user_id", "item_id").rows()) == {(1, 3), (1, 888_888), (999_999, 3)}
    assert ranked["score"].is_not_nan().all()
    columns = ["user_id", "item_id", "rank", "score", "model_version"]
    table = pl.scan_delta(str(tmp_path / "table")).filter(pl.col("date") == date(2026, 3, 10))
    published = table.select(columns).sort("user_id", "rank").collect()
    theirs = ranked.select(columns).sort("user_id", "rank")
    assert_frame_equal(published, theirs, check_exact=True)


@pytest.mark.slow
def test_a_second_run_of_a_night_rebuilds_and_registers_nothing(finished_night, feed):
    folder, _ = finished_night
    done = night(folder, feed)
    assert done.returncode == 0, done.stderr
    assert "0 days read, 7 up to date" in done.stdout
    assert "0 days aggregated, 0 days of examples" in done.stdout
    assert "registered as small version 1" in done.stdout
    assert "version 1 is champion already; champion is version 1" in done.stdout


@pytest.mark.slow
def test_a_night_killed_at_every_stage_leaves_nothing_half_written_and_finishes(tmp_path, feed):
    """SIGKILL in ingest, features, training, registration and scoring: as soon as the step's file
    or folder appears.
    """
    write_project(tmp_path, SMALL)
    workspace = Workspace(tmp_path / "ws")
    arguments = ("nightly", "-c", tmp_path / "project.toml", "-d", feed, "-w", workspace.root)
    env = environment() | {"PREFECT_API_URL": shared_api()}
    for until in (".staging", "events", "examples", "mlartifacts", "rankings"):
        assert not (workspace.root / until).exists()
        process = forks.start(*arguments, env=env)
        deadline = time.monotonic() + 600
        while not (workspace.root / until).exists():
            assert process.poll() is None, f"ended before {until}"
            assert time.monotonic() < deadline, f"no {until} after 600 s"
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for file in workspace.root.rglob("part-0.parquet"):
            assert pl.read_parquet(file).width > 0
    done = night(tmp_path, feed)
    assert done.returncode == 0, done.stderr
    assert len(workspace.days("events")) == 7
    assert not list((workspace.root / ".staging").iterdir())


@pytest.mark.slow
def test_users_mistake_is_one_message_without_a_stack_trace(tmp_path, feed):
    typo = {"windows": WITHOUT, "window": SMALL["features"]["windows"]}
    (tmp_path / "typo.toml").write_text(project_text(SMALL, features=typo))
    for name in ("nightly", "check"):
        arguments = [name, "-c", str(tmp_path / "typo.toml"), "-d", str(feed)]
        more = [] if name == "check" else ["-w", str(tmp_path / "ws")]
        done = run_forked(*arguments, *more, timeout=600)
        assert done.returncode == 2
        assert "features.window: unknown key (did you mean windows?)" in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    missing = night(tmp_path, feed, "nightly", "--date", "2031-01-01")
    assert missing.returncode == 2
    assert "no rows for 2031-01-01" in missing.stderr
    assert "Traceback" not in missing.stdout + missing.stderr


@pytest.mark.slow
def test_kuairand_reaches_the_required_quality(shared_data, tmp_path):
    """Train 04-27..05-03, validate 05-04, test 05-05."""
    done = run_forked(
        "nightly",
        "-c",
        "kuairand",
        "-d",
        str(shared_data / "kuairand-pure"),
        "-w",
        str(tmp_path / "ws"),
        "--date",
        "2022-05-05",
        timeout=1800,  # beside other tests, on a machine with two cores
    )
    assert done.returncode == 0, done.stderr
    quality = champion_quality(done.stdout, ("is_click", "long_view", "is_like"))
    assert quality["is_click"] >= 0.735
    assert quality["long_view"] >= 0.735
    assert quality["is_like"] >= 0.82


@pytest.mark.slow
def test_census_runs_a_night(shared_data, tmp_path):
    """Data without users, items or days; income is sensitive to errors of the encoder."""
    done = run_forked(
        "nightly",
        "-c",
        "census",
        "-d",
        str(shared_data / "census-income"),
        "-w",
        tmp_path,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    quality = champion_quality(done.stdout, ("income_50k", "never_married"))
    assert quality["income_50k"] >= 0.94
    assert quality["never_married"] >= 0.99
    ranked = pl.read_parquet(tmp_path / "rankings/date=1970-01-04/part-0.parquet")
    assert ranked["score"].is_finite().all()


RANK_ELSEWHERE = """
import mlflow.pyfunc, polars as pl
model = mlflow.pyfunc.load_model(sys.argv[1])
ranked = model.predict(pl.read_parquet(sys.argv[2]).to_pandas())
pl.from_pandas(ranked).write_parquet("ranked.parquet")
"""


@pytest.mark.slow
def test_an_exported_champion_ranks_elsewhere_as_the_night_did(finished_night, feed, tmp_path):
    folder, done = finished_night
    assert done.returncode == 0, done.stderr
    exported = night(folder, feed, "export", "--snapshot", "--out", str(tmp_path / "exported"))
    assert exported.returncode == 0, exported.stderr
    context = open_context(str(folder / "project.toml"), feed, folder / "ws")
    day = context.last_day() + timedelta(days=1)
    prepared_candidates(context, day).collect().write_parquet(tmp_path / "candidates.parquet")
    run_isolated(RANK_ELSEWHERE, tmp_path, tmp_path / "exported", tmp_path / "candidates.parquet")
    published = context.workspace.scan("rankings", [day]).collect()
    found = pl.read_parquet(tmp_path / "ranked.parquet").cast(dict(published.schema))
    assert_frame_equal(found, published, check_exact=True)
    # The same champion as a program of torch.
    program = night(folder, feed, "export", "--format", "torch", "--out", str(tmp_path / "torch"))
    assert program.returncode == 0, program.stderr
    assert (tmp_path / "torch" / "program.pt2").is_file()
    again = night(folder, feed, "export", "--out", str(tmp_path / "exported"))
    assert again.returncode == 2
    assert "it exists; allowed: a path that does not" in again.stderr
