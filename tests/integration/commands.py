"""`mtl-ranker` and a Prefect server for tests: in processes of their own, or in forks."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from mtl_ranker.environment import TEMPORARY
from mtl_ranker.stores.databases import copy_template
from tests.integration import forks

PREFECT = str(Path(sys.executable).with_name("prefect"))


def command(*arguments: str | Path) -> list[str]:
    """A command line, for a process of its own."""
    return [sys.executable, "-m", "mtl_ranker.commands.app", *map(str, arguments)]


def environment() -> dict[str, str]:
    """The environment without the test process's Prefect and MLflow settings."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}


def run_forked(
    *arguments: str | Path, env: Mapping[str, str] | None = None, timeout: float = 1200
) -> subprocess.CompletedProcess[str]:
    """Run a command in a fork, with the Prefect API that all such commands share."""
    variables = environment() | {"PREFECT_API_URL": shared_api()} | dict(env or {})
    return forks.run(*arguments, env=variables, timeout=timeout)


@functools.cache
def shared_api() -> str:
    """The address of a Prefect API that lives as long as the tests."""
    servers = contextlib.ExitStack()
    home = Path(tempfile.mkdtemp(prefix="mtl-ranker-prefect-"))
    servers.callback(shutil.rmtree, home, ignore_errors=True)
    # Without the services that no run started by hand needs, as a night's own server.
    api = servers.enter_context(prefect_server(home, TEMPORARY))
    atexit.register(servers.close)
    return api


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def prefect_server(home: Path, settings: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
    """A real Prefect server with its own SQLite database; yields its API address."""
    port = free_port()
    copy_template("prefect", home / "prefect.db")
    quiet = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(
            [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment() | quiet | settings | {"DO_NOT_TRACK": "1"},
        )
    api = f"http://127.0.0.1:{port}/api"
    deadline = time.monotonic() + 300
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
