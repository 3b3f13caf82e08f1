"""The night against a real Prefect server, and the deployments that `prefect.yaml` makes there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.integration.test_night import command, environment, night
from tests.projects import SMALL, write_project

ROOT = Path(__file__).parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(api: str, path: str, body: dict | None = None) -> list[dict]:
    request = urllib.request.Request(
        f"{api}{path}", json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory):
    """A real Prefect server with its own SQLite database; yields its API address."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    quiet = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(
            [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment() | quiet | {"DO_NOT_TRACK": "1"},
        )
    api = f"http://127.0.0.1:{port}/api"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{api}/health", timeout=2)
            break
        except OSError:
            assert server.poll() is None, (home / "server.log").read_text()
            time.sleep(0.5)
    yield api
    server.terminate()
    server.wait(30)


@pytest.mark.slow
def test_night_reports_its_flows_and_artifacts_to_a_server(tmp_path, feed, prefect_api):
    done = night(tmp_path, feed, more_env={"PREFECT_API_URL": prefect_api})
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ws" / "prefect").exists()
    runs = ask(prefect_api, "/flow_runs/filter")
    flows = {flow["id"]: flow["name"] for flow in ask(prefect_api, "/flows/filter")}
    states = {flows[run["flow_id"]]: run["state_type"] for run in runs}
    names = ("nightly", "ingest", "features", "train", "promote", "score")
    assert states == dict.fromkeys(names, "COMPLETED")
    artifacts = {artifact["key"] for artifact in ask(prefect_api, "/artifacts/filter")}
    assert artifacts == {
        "ingest",
        "comparison",
        "mlflow-run",
        "promotion",
        "rankings",
        "night",
    }


@pytest.mark.slow
def test_prefect_yaml_deploys_a_nightly_schedule_that_a_worker_runs(tmp_path, feed, prefect_api):
    write_project(tmp_path, SMALL)
    env = environment() | {
        "PREFECT_API_URL": prefect_api,
        "PREFECT_HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MTL_RANKER_HOME": str(ROOT),
        "MTL_RANKER_CONFIG": str(tmp_path / "project.toml"),
        "MTL_RANKER_DATA": str(feed),
        "MTL_RANKER_WORKSPACE": str(tmp_path / "ws"),
        "MTL_RANKER_TUNE_MODEL": "mmoe",
    }

    def prefect(*arguments: str) -> str:
        done = subprocess.run(
            [PREFECT, *arguments], capture_output=True, text=True, env=env, cwd=ROOT, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    prefect("work-pool", "create", "mtl-ranker", "--type", "process")
    prefect("--no-prompt", "deploy", "--all")
    deployments = {d["name"]: d for d in ask(prefect_api, "/deployments/filter")}
    assert set(deployments) >= {"nightly", "hourly", "weekly"}
    assert deployments["weekly"]["parameters"]["model"] == "mmoe"
    deployment = deployments["nightly"]
    assert deployment["parameters"]["day"] == "yesterday"
    schedule = deployment["schedules"][0]["schedule"]
    assert schedule["cron"] == "30 2 * * *"
    assert schedule["timezone"] == "Asia/Shanghai"
    assert deployment["parameters"]["data"] == str(feed)
    # The feed has ended, so its last day instead of yesterday, for which a run would wait.
    days = ("--param", "day=2026-03-08", "--param", "wait_minutes=0")
    prefect("deployment", "run", "nightly/nightly", *days)
    prefect("worker", "start", "--pool", "mtl-ranker", "--run-once")
    assert (tmp_path / "ws/rankings/date=2026-03-09/part-0.parquet").is_file()


@pytest.mark.slow
def test_each_part_of_the_night_runs_alone(tmp_path, feed):
    write_project(tmp_path, SMALL)
    arguments = ["-c", str(tmp_path / "project.toml"), "-d", str(feed)]
    for name in ("ingest", "features", "train", "promote", "score"):
        day = "2026-03-09" if name == "score" else "2026-03-08"
        done = subprocess.run(
            command(name, *arguments, "-w", str(tmp_path / "ws"), "--date", day),
            capture_output=True,
            text=True,
            env=environment(),
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert f"{name} " in done.stdout
    assert (tmp_path / "ws/rankings/date=2026-03-09/part-0.parquet").is_file()
