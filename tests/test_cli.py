"""The command line: help, examples, completion and dry runs."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys

import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from mtl_ranker.commands.app import EXAMPLES, _results, app
from mtl_ranker.errors import ProjectError
from mtl_ranker.nightly.history import store
from mtl_ranker.tracking import server
from mtl_ranker.workspace import Workspace
from tests.integration.commands import environment
from tests.projects import write_project
from tests.reports.test_history import with_trouble

COMMANDS = typer.main.get_command(app)


def test_every_command_shows_an_example():
    names = set(COMMANDS.commands) - {"study"}
    assert names == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_valid_command(name):
    program, command, *arguments = shlex.split(EXAMPLES[name])
    assert (program, command) == ("mtl-ranker", name)
    # Parsed, with all required options, but not run.
    COMMANDS.commands[name].make_context(name, arguments)


def test_completion_offers_the_commands():
    variables = {
        "_MTL_RANKER_COMPLETE": "complete_bash",
        "COMP_WORDS": "mtl-ranker ro",
        "COMP_CWORD": "1",
    }
    done = CliRunner().invoke(app, [], prog_name="mtl-ranker", env=variables)
    assert done.output.split() == ["rollback"]


def test_a_night_with_broken_candidates_ends_before_anything_starts(tiny):
    write_project(tiny, scoring={"candidates": "next.parquet"})
    pl.DataFrame({"u": [1], "thing": [2]}).write_parquet(tiny / "next.parquet")
    options = ["-c", str(tiny / "project.toml"), "-d", str(tiny), "-w", str(tiny / "ws")]
    done = CliRunner().invoke(app, ["nightly", *options])
    assert isinstance(done.exception, ProjectError)
    assert "column 'i' (the item) is missing; it has: u, thing" in str(done.exception)
    assert not (tiny / "ws" / "prefect").exists()


@pytest.mark.parametrize("name", ["nightly", "train"])
def test_a_night_whose_mlflow_is_away_reads_nothing(tiny, monkeypatch, name):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://admin:secret@127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setattr(server, "PAUSES", (0.01,))
    write_project(tiny)
    options = ["-c", str(tiny / "project.toml"), "-d", str(tiny), "-w", str(tiny / "ws")]
    done = CliRunner().invoke(app, [name, *options])
    assert isinstance(done.exception, ProjectError)
    message = str(done.exception)
    assert message.startswith("MLFLOW_TRACKING_URI: MLflow at http://127.0.0.1:")
    assert "secret" not in message
    assert not list((tiny / "ws").iterdir())


def test_a_night_ends_with_the_page_of_its_server_without_credentials(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "ws")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://admin:secret@mlflow.example:5000")
    assert _results(workspace) == "https://mlflow.example:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert _results(workspace).startswith("mtl-ranker ui --workspace ")


def test_history_prints_the_nights_and_writes_what_other_tools_read(tmp_path):
    write_project(tmp_path)
    options = ["history", "-c", str(tmp_path / "project.toml"), "-w", str(tmp_path / "ws")]
    empty = CliRunner().invoke(app, options)
    assert isinstance(empty.exception, ProjectError)
    assert "no nights are recorded" in str(empty.exception)
    for record in with_trouble(5):
        store(Workspace(tmp_path / "ws"), record)
    files = ["--json", str(tmp_path / "n.json"), "--prometheus", str(tmp_path / "m/feed.prom")]
    done = CliRunner().invoke(app, [*options, *files])
    assert done.exit_code == 0, done.output
    assert "alarm    AUC of click 0.6800" in done.output
    assert (tmp_path / "ws/reports/index.html").is_file()
    content = json.loads((tmp_path / "n.json").read_text())
    assert len(content["nights"]) == 5
    assert content["nights"][1]["alarms"] == ["failed: no space <left> on device"]
    assert "mtl_ranker_alarms" in (tmp_path / "m/feed.prom").read_text()


def test_a_simulated_feed_answers_a_ranking(tmp_path):
    feed = tmp_path / "feed"
    sizes = ["--impressions", "2000", "--days", "3", "--horizon", "5", "--candidates", "4"]
    done = CliRunner().invoke(app, ["simulate", "-o", str(feed), *sizes])
    assert done.exit_code == 0, done.output
    candidates = pl.read_parquet(feed / "candidates/date=2026-03-05")
    ranking = candidates.select(user_id="user", item_id="item").with_columns(
        rank=pl.int_range(1, pl.len() + 1).over("user_id")
    )
    place = tmp_path / "rankings/date=2026-03-05"
    place.mkdir(parents=True)
    ranking.write_parquet(place / "part-0.parquet")
    done = CliRunner().invoke(app, ["simulate", "-o", str(feed), "--respond", str(place)])
    assert done.exit_code == 0, done.output
    log = pl.read_parquet(feed / "log/date=2026-03-05")
    assert set(log.select("user", "item").rows()) <= set(candidates.rows())
    assert (feed / "candidates/date=2026-03-06").is_dir()


@pytest.mark.parametrize("option", ["--horizon", "--candidates"])
def test_a_shop_refuses_the_options_of_a_feed(tmp_path, option):
    shop = ["simulate", "-o", str(tmp_path / "shop"), "--preset", "shop", option, "5"]
    done = CliRunner().invoke(app, shop)
    assert isinstance(done.exception, ProjectError)
    assert str(done.exception).startswith(f"{option} 5: not allowed with --preset shop")
    assert not (tmp_path / "shop").exists()


@pytest.mark.parametrize("name", ["ingest", "features", "train", "score", "nightly"])
def test_a_dry_run_writes_nothing(name, tiny, tmp_path):
    workspace = tmp_path / "none"
    project = str(tiny / "project.toml")
    options = ["-c", project, "-d", str(tiny), "-w", str(workspace), "--dry-run"]
    done = CliRunner().invoke(app, [name, *options])
    assert done.exit_code == 0, done.output
    assert done.output.strip()
    assert ("everything would be built" in done.output) == (name != "score")
    assert not workspace.exists()


def test_warnings_are_printed_also_after_prefect_has_set_up_its_logging(tmp_path):
    code = f"""
from pathlib import Path
from mtl_ranker.environment import prepare
prepare(Path({str(tmp_path)!r}))
prepare(Path({str(tmp_path)!r}))
import logging, prefect
from prefect.logging.configuration import setup_logging
setup_logging()
logging.getLogger("mtl_ranker.tracking.connection").warning("only %s host", "this")
logging.getLogger("mtl_ranker.features").info("not shown")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.stderr == "warning   only this host\n"
