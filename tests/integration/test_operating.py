"""Operation from the command line: rollback, freeze, backfill, failures, late logs, explain."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest

from mtl_ranker.errors import ProjectError
from mtl_ranker.workspace import Workspace
from tests.integration.commands import environment, run_forked
from tests.projects import SMALL, edit_project, write_project


def run(name: str, folder: Path, *more: str, data: Path | None = None, env=None):
    arguments = ["-c", str(folder / "project.toml"), "-w", str(folder / "ws")]
    if data is not None:
        arguments += ["-d", str(data)]
    return run_forked(name, *arguments, *more, env=env)


@pytest.fixture(scope="module")
def finished_night(tmp_path_factory, feed):
    folder = tmp_path_factory.mktemp("operated")
    write_project(folder, SMALL)
    done = run("nightly", folder, "--date", "2026-03-08", data=feed)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_promotion_rollback_and_freeze(finished_night, feed):
    """Version 2 is promoted by a tolerance, rolled back, and refused during a freeze."""
    nothing = run("rollback", finished_night)
    assert nothing.returncode == 2
    assert "nothing to roll back to; version 1 is champion and the only version" in nothing.stderr
    edit_project(finished_night, promotion={"require_significance": False, "tolerance": 1.0})
    won = run("nightly", finished_night, "--date", "2026-03-08", data=feed)
    assert won.returncode == 0, won.stderr
    assert "champion is version 2" in won.stdout
    back = run("rollback", finished_night)
    assert back.stdout.strip() == "small: champion is version 1 again, version 2 is not"
    assert run("freeze", finished_night, "--reason", "holiday").returncode == 0
    kept = run("nightly", finished_night, "--date", "2026-03-08", data=feed)
    assert "kept the champion: it is frozen (holiday); champion is version 1" in kept.stdout
    ranked = pl.read_parquet(finished_night / "ws/rankings/date=2026-03-09/part-0.parquet")
    assert ranked["model_version"].unique().to_list() == ["1"]
    free = run("freeze", finished_night, "--off")
    assert "may be replaced again" in free.stdout
    for name in ("nightly", "promote"):
        kept = run(name, finished_night, "--date", "2026-03-08", data=feed)
        assert "version 2 was rolled back" in " ".join(kept.stdout.split())
        assert "champion is version 1" in kept.stdout
    none = run("rollback", finished_night)
    assert "version 1 is champion and has no champion before it; rolled back: 2" in none.stderr
    again = run("promote", finished_night, "--date", "2026-03-08", "--accept", data=feed)
    assert "champion is version 2" in again.stdout
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{finished_night}/ws/mlflow.db")
    versions = {v: client.get_model_version("small", v).tags for v in "12"}
    assert "rolled_back" not in versions["2"]
    assert float(versions["2"]["seconds_per_million"]) > 0
    assert all("promotion" in tags for tags in versions.values())
    previous = client.get_model_version_by_alias("small", "previous_champion")
    assert str(previous.version) == "1"


@pytest.mark.slow
def test_explain_agrees_with_the_published_ranking(finished_night, feed):
    ranked = pl.read_parquet(finished_night / "ws/rankings/date=2026-03-09/part-0.parquet")
    first = ranked.row(3, named=True)
    figures = finished_night / "explain.json"
    arguments = ["--user", str(first["user_id"]), "--item", str(first["item_id"])]
    arguments += ["--date", "2026-03-09", "--context", f"surface={first['surface']}"]
    scored = run("score", finished_night, "--date", "2026-03-09", data=feed)
    assert scored.returncode == 0, scored.stderr
    done = run("explain", finished_night, *arguments, "--json", str(figures), data=feed)
    assert done.returncode == 0, done.stderr
    explanation = json.loads(figures.read_text())
    now = pl.read_parquet(finished_night / "ws/rankings/date=2026-03-09/part-0.parquet").filter(
        (pl.col("user_id") == first["user_id"]) & (pl.col("item_id") == first["item_id"])
    )
    assert explanation["score"] == pytest.approx(now["score"][0], rel=1e-5)
    assert explanation["rank"] == now["rank"][0]
    assert explanation["predictions"]["click"] == pytest.approx(now["click"][0], rel=1e-5)
    assert sum(explanation["contributions"].values()) == pytest.approx(
        explanation["score"], rel=1e-6
    )
    assert all(sum(w) == pytest.approx(1.0, abs=1e-4) for w in explanation["experts"].values())
    again = finished_night / "again.json"
    of_ranking = [a for a in arguments if a not in ("--context", f"surface={first['surface']}")]
    run("explain", finished_night, *of_ranking[:4], "--json", str(again), data=feed)
    assert json.loads(again.read_text())["score"] == explanation["score"]
    stranger = run("explain", finished_night, "--user", "987654", "--item", "3", data=feed)
    assert "not in the log: user" in stranger.stdout
    invalid = run("explain", finished_night, "--user", "anna", "--item", "3", data=feed)
    assert invalid.returncode == 2
    assert "user_id 'anna': is no Int64" in invalid.stderr


@pytest.mark.slow
def test_backfill_builds_missing_days_in_parallel_and_reports_why(tmp_path, feed):
    write_project(tmp_path, SMALL)
    span = ("--from", "2026-03-05", "--to", "2026-03-07")
    dry = run("backfill", tmp_path, *span, "--dry-run", data=feed)
    assert dry.returncode == 0, dry.stderr
    assert "2026-03-05  events not built yet; examples" in dry.stdout
    assert Workspace(tmp_path / "ws").days("events") == []
    done = run("backfill", tmp_path, *span, "--jobs", "3", data=feed)
    assert done.returncode == 0, done.stderr
    assert "6 days built, 0 up to date" in done.stdout
    workspace = Workspace(tmp_path / "ws")
    assert [str(d) for d in workspace.days("examples")] == [f"2026-03-0{n}" for n in (5, 6, 7)]
    assert [str(d) for d in workspace.days("events")] == [f"2026-03-0{n}" for n in range(2, 8)]
    edit_project(tmp_path, features={"windows": [2]})
    figures = tmp_path / "why.json"
    rebuilt = run("backfill", tmp_path, *span, "--json", str(figures), data=feed)
    assert rebuilt.returncode == 0, rebuilt.stderr
    rows = {row["day"]: row for row in json.loads(figures.read_text())["days"]}
    assert rows["2026-03-06"]["events"] == rows["2026-03-06"]["aggregates"] == ""
    assert "setting features.windows" in rows["2026-03-06"]["examples"]
    # Sequential and parallel builds give the same rows.
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "project.toml", alone)
    assert run("backfill", alone, *span, "--jobs", "1", data=feed).returncode == 0
    for day in workspace.days("examples"):
        one = Workspace(alone / "ws").scan("examples", [day]).collect()
        assert one.equals(workspace.scan("examples", [day]).collect())


@pytest.mark.slow
def test_after_a_failure_the_current_champion_ranks(finished_night, feed, tmp_path):
    """A truncated file on the newest day: the run fails with a message, candidates are ranked."""
    data = tmp_path / "data"
    shutil.copytree(feed, data)
    file = data / "log/date=2026-03-08/part-0.parquet"
    file.write_bytes(file.read_bytes()[:500])
    message = tmp_path / "message.txt"
    bad = run(
        "nightly",
        finished_night,
        "--date",
        "2026-03-08",
        data=data,
        env={"MTL_RANKER_ON_FAILURE": f"tee {message}"},
    )
    assert bad.returncode == 2
    assert "not a whole Parquet file" in bad.stderr
    assert "Traceback" not in bad.stdout + bad.stderr
    printed = " ".join(bad.stdout.split())  # the console wraps long lines
    assert re.search(r"failed /.*; trying the champion \(version \d+\) with the published", printed)
    assert "after the failure" in printed
    assert "2026-03-09" in bad.stdout
    assert "failed" in message.read_text()


@pytest.mark.slow
def test_a_late_log_is_waited_for_until_the_deadline(tmp_path, feed):
    write_project(tmp_path, SMALL)
    data = tmp_path / "data"
    shutil.copytree(feed, data)
    late = data / "log/date=2026-03-08"
    late.rename(tmp_path / "late")
    never = run("nightly", tmp_path, "--date", "2026-03-08", "--wait-minutes", "0.01", data=data)
    assert never.returncode == 2
    assert "the log of 2026-03-08 did not arrive within 0.01 minutes" in never.stderr

    def arrive() -> None:
        time.sleep(20)
        (tmp_path / "late").rename(late)

    thread = threading.Thread(target=arrive)
    thread.start()
    done = run("nightly", tmp_path, "--date", "2026-03-08", "--wait-minutes", "3", data=data)
    thread.join()
    assert done.returncode == 0, done.stderr
    assert "has not arrived" in done.stdout


@pytest.mark.slow
def test_new_candidate_sets_are_ranked_once(finished_night, feed, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(feed, data)
    for day in ("2026-03-05", "2026-03-09", "2026-03-10"):
        folder = data / "candidates" / f"date={day}"
        folder.mkdir(parents=True)
        pl.DataFrame({"user": [1, 1, 2], "item": [3, 4, 5]}).write_parquet(folder / "a.parquet")
    shutil.copytree(finished_night, tmp_path / "copy")
    copy = tmp_path / "copy"
    edit_project(copy, scoring={"candidates": "candidates"})
    # MLflow stores absolute paths of artifacts, so the copy reads those of the original.
    first = run("score-new", copy, data=data)
    assert first.returncode == 0, first.stderr
    ranked = [str(d) for d in Workspace(copy / "ws").days("rankings")]
    assert "2026-03-05" not in ranked
    assert {"2026-03-09", "2026-03-10"} <= set(ranked)
    second = run("score-new", copy, data=data)
    assert "every candidate set is ranked" in second.stdout


@pytest.mark.slow
def test_two_runs_cannot_build_in_one_workspace(tmp_path):
    holder = subprocess.Popen(
        [
            "python3",
            "-c",
            f"import fcntl, time; f = open({str(tmp_path / '.lock')!r}, 'w'); "
            "f.write('nightly 2026-03-08, process 1'); f.flush(); "
            "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "held"
    workspace = Workspace(tmp_path)
    with (
        pytest.raises(ProjectError, match=r"another run works in this workspace \(nightly 2026"),
        workspace.lock("other"),
    ):
        pass
    holder.kill()
    holder.wait()
    with workspace.lock("mine"), workspace.lock("mine again"):
        assert "mine, process" in (tmp_path / ".lock").read_text()


@pytest.mark.slow
def test_two_ranks_train_a_challenger_together(finished_night, feed):
    def together(folder: Path, *more: str):
        return subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node=2", "-m", "mtl_ranker.commands.train_ranks"),
                *("-c", str(folder / "project.toml"), "-w", str(folder / "ws"), *more),
            ],
            capture_output=True,
            text=True,
            env=environment() | {"OMP_NUM_THREADS": "1"},
            timeout=1200,
        )

    done = together(finished_night, "--date", "2026-03-08")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks: " in done.stdout
    version = done.stdout.split("registered as small version ")[1].split(",")[0]
    decided = run("promote", finished_night, "--date", "2026-03-08", "--dry-run", data=feed)
    assert decided.returncode == 0, decided.stderr
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{finished_night}/ws/mlflow.db")
    assert str(client.get_model_version_by_alias("small", "challenger").version) == version
    refused = together(finished_night, "--model", "nothing")
    assert "--model nothing: allowed:" in refused.stderr
