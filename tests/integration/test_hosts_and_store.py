"""A night on two hosts that share nothing but servers: of S3, of MLflow and of Prefect."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath

import pytest

from mtl_ranker.stores import objects
from mtl_ranker.workspace import open_workspace
from tests.hosts import Host
from tests.integration.commands import command, environment, free_port
from tests.integration.test_stack import (
    BUSY,
    NIGHT,
    assert_same_night,
    assert_trained,
    night_of_one,
    started,
)
from tests.rotation import of_today
from tests.stores import s3_server, upload

WORKSPACE = "s3://feed/workspace"


@contextmanager
def servers(folder: Path, here: str) -> Iterator[dict[str, str]]:
    """Servers of Prefect and MLflow at an address; yields the variables that name them."""
    prefect, mlflow = free_port(), free_port()
    binaries = Path(sys.executable).parent
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_HOME": str(folder / "prefect")}
    quiet |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    of_prefect = [str(binaries / "prefect"), "server", "start", "--host", here]
    of_mlflow = [sys.executable, "-m", "mlflow", "server", "--host", here, "--workers", "1"]
    of_mlflow += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    of_mlflow += ["--artifacts-destination", str(folder / "artifacts"), "--port", str(mlflow)]
    api, tracking = f"http://{here}:{prefect}/api", f"http://{here}:{mlflow}"
    env = environment() | quiet
    with ExitStack() as stack:
        for name, line, page in (
            ("prefect", [*of_prefect, "--port", str(prefect)], f"{api}/health"),
            ("mlflow", of_mlflow, f"{tracking}/health"),
        ):
            stack.enter_context(started(line, page, folder / f"{name}.log", env))
        yield {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": tracking}


@contextmanager
def workers(hosts: list[Host], folder: Path, env: dict[str, str], busy: str) -> Iterator[str]:
    """A Dask scheduler on the first host and a worker on each; the first worker dies when busy.

    Yields the scheduler's address.

    Args:
        busy: pattern of an object of the workspace.
    """
    address = f"tcp://{hosts[0].address}:8786"
    scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"]
    work = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1"]
    work += ["--no-dashboard", "--no-nanny", "--host"]
    common = env | {"DASK_LOGGING__DISTRIBUTED": "error"}
    scheduler += ["--host", hosts[0].address]
    processes = [hosts[0].start(*scheduler, log=folder / "dask.log", **common)]
    for host in hosts:
        own = common | {"MTL_RANKER_CACHE": str(folder / host.name)}
        log = folder / f"{host.name}.log"
        processes.append(host.start(*work, host.address, log=log, **own))
    killed = threading.Event()

    def kill_when_busy() -> None:
        while not any(PurePath(key).match(busy) for key in objects.listing(WORKSPACE)):
            time.sleep(0.05)
        processes[1].kill()
        killed.set()

    threading.Thread(target=kill_when_busy, daemon=True).start()
    try:
        yield address
        assert killed.is_set()
    finally:
        for process in processes:
            process.kill()
            process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("busy", of_today(reversed(BUSY)))
def test_a_night_on_two_hosts_that_share_a_store_is_the_local_night(
    hosts: list[Host], feed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: str
):
    """Log and workspace are in S3; each host has an empty cache; one worker is killed."""
    alone = night_of_one(tmp_path, feed)
    here = hosts[0].gateway
    monkeypatch.setenv("MTL_RANKER_CACHE", str(tmp_path / "here"))
    with s3_server(here), servers(tmp_path, here) as variables:
        data = upload(feed, "log")
        with workers(hosts, tmp_path, variables, BUSY[busy]) as scheduler:
            line = ["nightly", "-c", tmp_path / "project.toml", "-d", data, "-w", WORKSPACE]
            done = subprocess.run(
                command(*line, *NIGHT, "--cluster", scheduler),
                env=os.environ | variables,
                capture_output=True,
                text=True,
                timeout=1200,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        for folder in (".parts", "checkpoints"):
            assert open_workspace(WORKSPACE).places(folder) == {}
        assert_trained(done.stdout, hosts, busy)
        assert_same_night(alone / "ws", WORKSPACE)
    for host in hosts:  # each worked with copies of its own
        assert list((tmp_path / host.name).rglob("part-0.parquet*"))
