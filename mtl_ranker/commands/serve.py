"""`mtl-ranker serve`: a Prefect server, if none is configured, and the schedules."""

from __future__ import annotations

import os
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mtl_ranker.commands.processes import Ended, ended_by_signals, exit_code, started
from mtl_ranker.errors import ProjectError

# Prefect's runner ends its flow runs within 30 seconds.
GRACE = 40.0


def serve_command(workspace: Path, port: int, arguments: Sequence[str]) -> int:
    """Run `flows.serving` until it or this process is asked to end; the exit code."""
    schedules = [sys.executable, "-m", "flows.serving", "--workspace", str(workspace), *arguments]
    try:
        with (
            ended_by_signals(),
            server(workspace, port) as settings,
            started(schedules, GRACE, env=os.environ | settings) as process,
        ):
            return exit_code(process.wait())
    except Ended as ended:
        return exit_code(-ended.number)


@contextmanager
def server(workspace: Path, port: int) -> Iterator[dict[str, str]]:
    """A Prefect server on 127.0.0.1 unless PREFECT_API_URL names one; yields its settings.

    Raises ProjectError when it does not start.
    """
    if "PREFECT_API_URL" in os.environ:
        yield {}
        return
    api = f"http://127.0.0.1:{port}/api"
    home = workspace.resolve() / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    settings = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    command += ["--port", str(port)]
    with (
        open(home / "server.log", "a", encoding="utf-8") as log,
        started(command, stdout=log, stderr=log, env=os.environ | settings) as process,
    ):
        deadline = time.monotonic() + 90
        while not answers(f"{api}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ProjectError(
                    f"Prefect's server did not start on port {port}: see {home}/server.log"
                )
            time.sleep(0.5)
        yield settings | {"PREFECT_API_URL": api}


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2).close()
    except OSError:
        return False
    return True
