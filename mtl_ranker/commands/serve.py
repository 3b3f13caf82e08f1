"""Prefect servers: the one of `mtl-ranker serve`, and one for the length of a command."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_ranker.commands.processes import Ended, ended_by_signals, exit_code, started
from mtl_ranker.environment import TEMPORARY_API
from mtl_ranker.errors import ProjectError
from mtl_ranker.stores.copies import local_folder
from mtl_ranker.stores.databases import copy_template, keep_template
from mtl_ranker.workspace import Workspace

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
    home = local_folder(workspace).resolve() / "prefect"
    settings = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    with _started(home, port, settings) as api:
        api.wait()
        yield settings | {"PREFECT_API_URL": _address(port)}


def start_api(workspace: Path) -> Callable[[], None]:
    """Start a Prefect API that ends with this process, unless PREFECT_API_URL names one.

    Its database is in the workspace. The server starts beside this process, which can import the
    flows in the meantime. Must be called after `prepare` and before Prefect is imported, which
    reads PREFECT_API_URL then.

    Returns a function that returns once the API answers; it raises ProjectError when the server
    does not start.
    """
    if "PREFECT_API_URL" in os.environ:
        return lambda: None
    home = workspace.resolve() / "prefect"
    port = free_port()
    running = ExitStack()
    api = running.enter_context(_started(home, port, {}, "--no-ui"))
    atexit.register(running.close)
    os.environ["PREFECT_API_URL"] = os.environ[TEMPORARY_API] = _address(port)
    return api.wait


@dataclass(frozen=True)
class _Server:
    """A Prefect server that was started.

    Attributes:
        log: file of what it writes.
        fresh: the database whose schema it makes; None if it has one.
        creating: holds the lock under which it is made, until the server answers.
    """

    process: Any
    port: int
    log: Path
    fresh: Path | None
    creating: ExitStack

    def wait(self) -> None:
        """Return once it answers; raise ProjectError when it does not within 90 seconds."""
        deadline = time.monotonic() + 90
        while not answers(f"{_address(self.port)}/health"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ProjectError(
                    f"Prefect's server did not start on port {self.port}: see {self.log}"
                )
            time.sleep(0.2)
        if self.fresh is not None:
            keep_template("prefect", self.fresh)
        self.creating.close()


@contextmanager
def _started(home: Path, port: int, settings: dict[str, str], *options: str) -> Iterator[_Server]:
    """A Prefect server, which writes to `server.log` in its home."""
    home.mkdir(parents=True, exist_ok=True)
    variables = os.environ | settings
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    command += ["--port", str(port), *options]
    with (
        ExitStack() as creating,
        open(home / "server.log", "a", encoding="utf-8") as log,
    ):
        fresh = _without_schema(variables, creating)
        with started(command, stdout=log, stderr=log, env=variables) as process:
            yield _Server(process, port, home / "server.log", fresh, creating)


def _without_schema(variables: Mapping[str, str], creating: ExitStack) -> Path | None:
    """The database of a new home, unless its schema could be copied; None if there is a database.

    None also where settings name another database. Another run waits while `creating` is open.
    """
    if any(f"PREFECT_{part}_DATABASE_CONNECTION_URL" in variables for part in ("API", "SERVER")):
        return None
    home = Path(variables["PREFECT_HOME"])
    database = home / "prefect.db"
    creating.enter_context(Workspace(home).lock("create prefect.db", "prefect.db", wait=True))
    if database.is_file() or copy_template("prefect", database):
        creating.close()
        return None
    return database


def _address(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2).close()
    except OSError:
        return False
    return True
