"""The night against a real Prefect server, the deployments that `prefect.yaml` makes there, and
the scripts of `docker/`.
"""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import make_url

from tests.integration.commands import PREFECT, environment, free_port, prefect_server, run_forked
from tests.integration.test_night import night
from tests.projects import SMALL, write_project

ROOT = Path(__file__).parents[2]


def ask(api: str, path: str, body: dict | None = None) -> list[dict]:
    request = urllib.request.Request(
        f"{api}{path}", json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory):
    with prefect_server(tmp_path_factory.mktemp("prefect")) as api:
        yield api


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

    def succeeds(*command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def prefect(*arguments: str) -> str:
        return succeeds(PREFECT, *arguments)

    prefect("work-pool", "create", "mtl-ranker", "--type", "process")
    succeeds(sys.executable, "-m", "flows.deployments")
    made = {d["name"]: d for d in ask(prefect_api, "/deployments/filter")}
    assert set(made) >= {"nightly", "hourly", "weekly"}
    assert made["weekly"]["parameters"]["model"] == "mmoe"
    deployment = made["nightly"]
    assert deployment["parameters"]["day"] == "yesterday"
    schedule = deployment["schedules"][0]["schedule"]
    assert schedule["cron"] == "30 2 * * *"
    assert schedule["timezone"] == "UTC"  # the log's, which the project file does not set
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
        done = run_forked(name, *arguments, "-w", tmp_path / "ws", "--date", day)
        assert done.returncode == 0, done.stderr
        assert f"{name} " in done.stdout
    assert (tmp_path / "ws/rankings/date=2026-03-09/part-0.parquet").is_file()


def docker_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docker_{name}", ROOT / f"docker/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ODD = ["plain", "p%40:/@x", "100%", "%(here)s", "a b#c;d=e", "ß[1]?&$HOME'\"\\", "${x}%%"]


@pytest.mark.parametrize("password", ODD)
def test_passwords_of_any_characters_reach_databases_and_mlflow(tmp_path, password):
    servers = docker_script("servers")
    given = {"POSTGRES_PASSWORD": password, "MLFLOW_ADMIN_PASSWORD": password}
    address = make_url(servers.database_address("postgresql+asyncpg", "prefect", given))
    assert (address.username, address.password) == ("mtl", password)
    assert (address.host, address.port, address.database) == ("postgres", 5432, "prefect")
    command, more = servers.mlflow(given, tmp_path)
    assert password == "plain" or password not in " ".join(command)
    assert make_url(more["MLFLOW_BACKEND_STORE_URI"]).password == password
    file = Path(more["MLFLOW_AUTH_CONFIG_PATH"])
    assert file.stat().st_mode & 0o777 == 0o600
    read = configparser.ConfigParser()  # as MLflow reads it
    read.read(file)
    assert read["mlflow"]["admin_password"] == password
    assert make_url(read["mlflow"]["database_uri"]).password == password


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "MLFLOW_ADMIN_PASSWORD must be set"),
        ({"MLFLOW_ADMIN_PASSWORD": "p"}, "POSTGRES_PASSWORD must be set"),
        ({"MLFLOW_ADMIN_PASSWORD": " p"}, "may not begin or end with a space"),
        ({"MLFLOW_ADMIN_PASSWORD": "p\nadmin_username = x"}, "nor have two lines"),
    ],
)
def test_a_password_that_is_missing_or_cannot_be_written_is_refused(tmp_path, given, message):
    with pytest.raises(SystemExit, match=message):
        docker_script("servers").mlflow(given, tmp_path)


def test_image_installs_requirements_before_sources_and_runs_as_another_user():
    found = docker_script("requirements").requirements(
        ROOT / "pyproject.toml", ["nightly", "servers"]
    )
    assert {"prefect", "torch", "boto3"} <= {re.split(r"[^\w-]", line)[0] for line in found}
    text = (ROOT / "docker/Dockerfile").read_text()
    assert text.index("-r requirements.txt") < text.index("COPY mtl_ranker")
    assert "://" not in text  # no address of a package index
    assert text.rstrip().splitlines()[-1] == "USER ranker"


@pytest.mark.slow
def test_servers_start_on_a_postgres_with_an_odd_password(tmp_path):
    """As docker-compose.yml starts them, with a real Postgres whose password has %, @, / and :."""
    import psycopg2

    from tests.integration.test_stack import POSTGRES, postgres, started, status

    if not POSTGRES:
        pytest.skip("no Postgres here: apt-get install postgresql")
    odd = "p%40:/@ x%(y)s#'"
    script = [sys.executable, str(ROOT / "docker/servers.py")]
    with postgres() as database:
        _, first, port = re.split(r"[:@]", database.replace("127.0.0.1:", ""))
        with (
            psycopg2.connect(
                host="127.0.0.1", port=port, user="mtl", password=first, dbname="postgres"
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("alter user mtl password %s", (odd,))
        connection.close()
        env = environment() | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DATABASE_HOST": "127.0.0.1",
            "DATABASE_PORT": port,
            "POSTGRES_PASSWORD": odd,
            "MLFLOW_ADMIN_PASSWORD": f"admin {odd}",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test",
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
            "LISTEN": "127.0.0.1",
            "ARTIFACTS": (tmp_path / "artifacts").as_uri(),
        }
        listen = str(free_port())
        health, log = f"http://127.0.0.1:{listen}/api/health", tmp_path / "prefect.log"
        with started([*script, "prefect"], health, log, env | {"PORT": listen}):
            assert ask(f"http://127.0.0.1:{listen}/api", "/flows/filter") == []
        listen = str(free_port())
        page = f"http://127.0.0.1:{listen}/api/2.0/mlflow/experiments/get?experiment_id=0"
        health, log = f"http://127.0.0.1:{listen}/health", tmp_path / "mlflow.log"
        with started([*script, "mlflow"], health, log, env | {"PORT": listen}):
            assert status(page) == 401
            assert status(page, f"admin:admin {odd}") == 200
