"""Nights with real servers: Prefect and MLflow (basic auth) on Postgres, artifacts on S3."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import polars.testing
import pytest

from mtl_ranker.workspace import Workspace, open_workspace
from tests.hosts import Host
from tests.integration.commands import environment, free_port
from tests.integration.test_operating import run
from tests.integration.test_servers import ask
from tests.projects import SMALL, WITHOUT, edit_project, write_project
from tests.rotation import of_today

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


@dataclass(frozen=True)
class Stack:
    prefect: str
    mlflow: str
    password: str
    s3: str
    database: str
    env: dict[str, str]


def wait_for(address: str, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address, timeout=2)
        except urllib.error.HTTPError:
            return  # the server answers
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"{address} did not answer: {log.read_text()[-3000:]}")


def as_postgres(*command: str) -> list[str]:
    return ["runuser", "-u", "postgres", "--", *command] if os.geteuid() == 0 else list(command)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A temporary Postgres server on 127.0.0.1; yields USER:PASSWORD@HOST:PORT."""
    binaries = POSTGRES[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="mtl-ranker-postgres-"))
    password = secrets.token_hex(12)
    (folder / "password").write_text(password)
    if os.geteuid() == 0:
        owner = pwd.getpwnam("postgres")
        for place in (folder, folder / "password"):
            os.chown(place, owner.pw_uid, owner.pw_gid)
    port = free_port()
    subprocess.run(
        as_postgres(
            str(binaries / "initdb"), "-D", str(folder / "data"), "-U", "mtl",
            "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "-E", "UTF8",
        ),
        check=True,
        capture_output=True,
        cwd="/",
    )  # fmt: skip
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    control = [str(binaries / "pg_ctl"), "-D", str(folder / "data"), "-w", "-m", "fast"]
    subprocess.run(
        as_postgres(*control, "-l", str(folder / "log"), "-o", options, "start"),
        check=True,
        capture_output=True,
        cwd="/",
    )
    try:
        for name in ("prefect", "mlflow", "mlflow_auth"):
            subprocess.run(
                [str(binaries / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "mtl", name],
                check=True,
                env=os.environ | {"PGPASSWORD": password},
                cwd="/",
            )
        yield f"mtl:{password}@127.0.0.1:{port}"
    finally:
        subprocess.run(as_postgres(*control, "stop"), capture_output=True, cwd="/")
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def started(command: list[str], address: str, log: Path, env: dict[str, str]) -> Iterator[None]:
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        wait_for(address, process, log)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # it waits for connections that killed clients left
            os.killpg(process.pid, 9)
            process.wait(30)


def server_settings(home: Path, database: str) -> dict[str, str]:
    """The environment of a Prefect server."""
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
    }


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    if not POSTGRES:
        pytest.skip("no Postgres here: apt-get install postgresql")
    for package in ("moto", "psycopg2", "flask_wtf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[servers]'")
    logs = tmp_path_factory.mktemp("servers")
    binaries = Path(sys.executable).parent
    ports = {name: free_port() for name in ("s3", "mlflow", "prefect")}
    s3, api = f"http://127.0.0.1:{ports['s3']}", f"http://127.0.0.1:{ports['prefect']}/api"
    tracking, password = f"http://127.0.0.1:{ports['mlflow']}", secrets.token_hex(12)
    store = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": s3,
    }
    quiet = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    base = environment() | quiet
    with contextlib.ExitStack() as open_servers:
        database = open_servers.enter_context(postgres())
        command = [str(binaries / "moto_server"), "-H", "127.0.0.1", "-p", str(ports["s3"])]
        open_servers.enter_context(started(command, s3, logs / "s3.log", base))
        import boto3

        boto3.client(
            "s3", endpoint_url=s3, aws_access_key_id="test", aws_secret_access_key="test",
            region_name="us-east-1",
        ).create_bucket(Bucket="models")  # fmt: skip
        settings = logs / "auth.ini"
        settings.write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = postgresql+psycopg2://{database}/mlflow_auth\n"
            f"admin_username = admin\nadmin_password = {password}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        command = [
            *(str(binaries / "mlflow"), "server", "--host", "127.0.0.1"),
            *("--port", str(ports["mlflow"]), "--workers", "1", "--app-name", "basic-auth"),
            *("--backend-store-uri", f"postgresql+psycopg2://{database}/mlflow"),
            *("--artifacts-destination", "s3://models/artifacts"),
        ]
        env = base | store
        env |= {"MLFLOW_AUTH_CONFIG_PATH": str(settings)}
        env |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16)}
        log = logs / "mlflow.log"
        open_servers.enter_context(started(command, f"{tracking}/health", log, env))
        command = [str(binaries / "prefect"), "server", "start", "--host", "127.0.0.1"]
        command += ["--port", str(ports["prefect"])]
        url = f"postgresql+asyncpg://{database}/prefect"
        env = base | server_settings(logs / "prefect", url)
        log = logs / "prefect.log"
        open_servers.enter_context(started(command, f"{api}/health", log, env))
        yield Stack(
            api,
            tracking,
            password,
            s3,
            url,
            {
                "PREFECT_API_URL": api,
                "MLFLOW_TRACKING_URI": tracking,
                "MLFLOW_TRACKING_USERNAME": "admin",
                "MLFLOW_TRACKING_PASSWORD": password,
            },
        )


def status(address: str, user: str | None = None) -> int:
    request = urllib.request.Request(address)
    if user is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_night_win_loss_rollback_and_backfill_on_postgres_and_s3(stack, tmp_path, feed):
    write_project(tmp_path, SMALL)
    day = ("--date", "2026-03-08")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = stack.env | {"TMPDIR": str(temporary)}

    def on_stack(name: str, *more: str, data: Path | None = feed):
        done = run(name, tmp_path, *more, data=data, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "promoted: the first model becomes champion" in on_stack("nightly", *day)
    edit_project(tmp_path, promotion={"require_significance": False, "tolerance": 1.0})
    on_stack("train", *day)
    assert "champion is version 2" in on_stack("promote", *day)
    edit_project(tmp_path, promotion={"require_significance": True, "tolerance": WITHOUT})
    on_stack("train", *day)
    lost = on_stack("promote", *day)
    assert "kept the champion" in lost
    assert "champion is version 2" in lost
    assert "champion is version 1 again" in on_stack("rollback", data=None)
    on_stack("score", "--date", "2026-03-09")
    ranked = pl.read_parquet(tmp_path / "ws/rankings/date=2026-03-09/part-0.parquet")
    assert ranked["model_version"].unique().to_list() == ["1"]
    edit_project(tmp_path, features={"windows": [2]})
    span = ("--from", "2026-03-06", "--to", "2026-03-07")
    assert "setting features.windows" in on_stack("backfill", *span)
    assert len(Workspace(tmp_path / "ws").days("events")) == 7

    # Models are downloaded from the server; no copy is left.
    assert not [path.parent for path in temporary.rglob("MLmodel")]
    # Nothing of MLflow or Prefect lies in the workspace: it is all on the servers.
    assert not (tmp_path / "ws/mlflow.db").exists()
    assert not (tmp_path / "ws/prefect").exists()
    import boto3

    client = boto3.client(
        "s3", endpoint_url=stack.s3, aws_access_key_id="test", aws_secret_access_key="test",
        region_name="us-east-1",
    )  # fmt: skip
    names = [o["Key"] for o in client.list_objects_v2(Bucket="models")["Contents"]]
    assert sum(name.endswith("weights.safetensors") for name in names) == 3
    assert any(name.endswith("report.html") for name in names)
    runs = ask(stack.prefect, "/flow_runs/filter")
    assert {run["state_type"] for run in runs} == {"COMPLETED"}
    keys = {artifact["key"] for artifact in ask(stack.prefect, "/artifacts/filter")}
    assert {"comparison", "promotion", "rankings", "night", "backfill"} <= keys


@contextlib.contextmanager
def killed(victim: subprocess.Popen, folder: Path, pattern: str) -> Iterator[None]:
    """Kill a process as soon as a file of this pattern is there."""
    seen = threading.Event()

    def kill_when_busy() -> None:
        while not list(folder.glob(pattern)):
            time.sleep(0.02)
        victim.kill()
        seen.set()

    threading.Thread(target=kill_when_busy, daemon=True).start()
    yield
    assert seen.wait(1), f"no {pattern} in {folder}"
    victim.wait(30)


def published(place: Path | str, dataset: str) -> pl.DataFrame:
    """All of a dataset of the workspace at a path or an address, with its days."""
    workspace = open_workspace(place)
    days = workspace.days(dataset)
    assert days
    rows = [workspace.scan(dataset, [d]).with_columns(published=pl.lit(d)) for d in days]
    return pl.concat(rows).collect()


NIGHT = ("--date", "2026-03-08")

# Files by which a worker is known to be busy.
BUSY = {"building": ".parts/examples/*/*/*.parquet", "training": "checkpoints/*.pt"}
# Long enough to be killed in the middle; with one thread its bits do not depend on the host.
LONG = {"threads": 1, "batch_size": 128, "epochs": 8, "patience": 8, "checkpoint_seconds": 0.1}


def night_of_one(folder: Path, feed: Path) -> Path:
    """A folder with a night by one process; its project is also in `folder`."""
    alone = folder / "alone"
    alone.mkdir()
    for each in (alone, folder):
        blocks = {"features": {"block_rows": 400}, "scoring": {"block_rows": 50}}
        write_project(each, SMALL, **blocks, training=LONG)
    done = run("nightly", alone, *NIGHT, data=feed)
    assert done.returncode == 0, done.stdout + done.stderr
    return alone


def assert_trained(output: str, hosts: list[Host], busy: str) -> None:
    """The night's models were trained on the hosts; the first one's worker was killed when busy."""
    lines = [line for line in output.splitlines() if " trained on tcp:" in line]
    models = ("linear seed 0", "shared_bottom seed 0", "mmoe seed 0", ", refit seed 0")
    assert all(any(model in line for line in lines) for model in models), output
    place = f"trained on tcp://{hosts[1].address}:"
    lost = [line for line in lines if " lost on " in line]
    if busy == "building":  # on a busy machine the kill may come as late as in the trainings
        assert place in lines[-1]
        assert len(lost) <= 1
    else:
        assert len(lost) == 1
        assert f", after it was lost on tcp://{hosts[0].address}:" in lost[0]
        assert place in lost[0]


def assert_same_night(workspace: Path | str, another: Path | str) -> None:
    """Events, examples and rankings agree; cores change the rounding of matrix products."""
    for dataset in ("events", "examples", "rankings"):
        one, other = (published(place, dataset) for place in (workspace, another))
        if dataset == "rankings":
            one, other = (frame.select("user_id", "rank", "score") for frame in (one, other))
        polars.testing.assert_frame_equal(one, other, rel_tol=1e-4)


@pytest.mark.slow
def test_a_backfill_on_a_dask_cluster_outlives_a_lost_worker(stack, tmp_path, feed):
    """Two workers of a running cluster; one is killed while the days are built."""
    if importlib.util.find_spec("prefect_dask") is None:
        pytest.skip("prefect-dask is not installed: pip install -e '.[cluster]'")
    write_project(tmp_path, SMALL)
    span = ("--from", "2026-03-04", "--to", "2026-03-08")
    alone = tmp_path / "alone"
    alone.mkdir()
    write_project(alone, SMALL)
    assert run("backfill", alone, *span, data=feed, env=stack.env).returncode == 0
    env = (
        environment()
        | stack.env
        | {"PYTHONPATH": os.getcwd(), "DASK_LOGGING__DISTRIBUTED": "error"}
    )
    port, dashboard = free_port(), free_port()
    address = f"tcp://127.0.0.1:{port}"
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
    dask += ["--port", str(port), "--dashboard-address", f"127.0.0.1:{dashboard}"]
    work = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1"]
    work += ["--no-dashboard", "--no-nanny", "--host", "127.0.0.1"]
    processes = []
    with open(tmp_path / "dask.log", "w") as log:
        for command in (dask, work, work):
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
            )
    try:
        with killed(processes[1], tmp_path / "ws/events", "date=*/part-0.parquet"):
            done = run("backfill", tmp_path, *span, "--cluster", address, data=feed, env=stack.env)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
    for dataset in ("events", "examples"):
        one, other = (published(folder / "ws", dataset) for folder in (alone, tmp_path))
        keys = ["timestamp", "user_id", "item_id"]
        assert one.sort(keys).equals(other.sort(keys))


@pytest.mark.slow
@pytest.mark.parametrize("busy", of_today(BUSY))
def test_a_night_on_a_cluster_of_two_hosts_is_the_night_of_one(stack, hosts, tmp_path, feed, busy):
    """Days, blocks of users, trainings and parts of the candidates on a Dask worker of each host.

    One worker is killed once there are blocks to build, or a training has a checkpoint.
    """
    alone = night_of_one(tmp_path, feed)
    port, here = free_port(), hosts[0].gateway
    server = [str(Path(sys.executable).parent / "prefect"), "server", "start", "--host", here]
    api, log = f"http://{here}:{port}/api", tmp_path / "prefect.log"
    env = environment() | server_settings(tmp_path / "prefect", stack.database)
    env |= {"DO_NOT_TRACK": "1"}
    variables = {"PREFECT_API_URL": api, "DASK_LOGGING__DISTRIBUTED": "error"}
    address = f"tcp://{hosts[0].address}:8786"
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", hosts[0].address]
    work = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1"]
    work += ["--no-dashboard", "--no-nanny", "--host"]
    with started([*server, "--port", str(port)], f"{api}/health", log, env):
        processes = [
            hosts[0].start(*dask, "--no-dashboard", log=tmp_path / "dask.log", **variables)
        ]
        for host in hosts:
            worker_log = tmp_path / f"{host.name}.log"
            processes.append(host.start(*work, host.address, log=worker_log, **variables))
        try:
            with killed(processes[1], tmp_path / "ws", BUSY[busy]):
                done = run(
                    "nightly", tmp_path, *NIGHT, "--cluster", address, data=feed, env=variables
                )
                assert done.returncode == 0, done.stdout + done.stderr
        finally:
            for process in processes:
                process.kill()
                process.wait(30)
    assert not list((tmp_path / "ws/.parts").glob("*/*"))
    assert_trained(done.stdout, hosts, busy)
    assert_same_night(alone / "ws", tmp_path / "ws")
    for part in ("examples 2026-03-08 00000", "score 2026-03-09 00000"):
        query = {"task_runs": {"name": {"like_": part}}}
        assert len(ask(stack.prefect, "/task_runs/filter", query)) > 1


@pytest.mark.slow
def test_mlflow_wants_a_password_and_not_the_default_one(stack):
    page = f"{stack.mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert status(page) == 401
    assert status(page, "admin:password1234") == 401
    assert status(page, f"admin:{stack.password}") == 200
