"""What every flow needs: the project, its log and its workspace, and a way to say things."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import MissingContextError
from rich.console import Console
from rich.progress import track
from rich.text import Text

from mtl_ranker.config import Project, load_project
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.sources import Source, open_source
from mtl_ranker.workspace import Workspace

# Without a terminal (cron, a container's log) rich would fold lines at 80 columns.
console = Console(width=None if sys.stdout.isatty() else 140)


class Night(NamedTuple):
    project: Project
    source: Source
    workspace: Workspace


def open_night(config: str, data: str, workspace: str) -> Night:
    project = load_project(config)
    return Night(project, open_source(project, Path(data)), Workspace(Path(workspace)))


def await_api() -> None:
    """Return once Prefect's API is there.

    Without a server this starts one for this process; making its database takes ten seconds.
    """
    with get_client(sync_client=True):
        return


def say(message: str, level: int = logging.INFO) -> None:
    """To the terminal, and without its markup to the run's log on the Prefect page."""
    console.print(message, highlight=False)
    try:
        get_run_logger().log(level, Text.from_markup(message).plain)
    except MissingContextError:
        return


def follow(days: Sequence[date], words: str) -> Iterable[date]:
    """The days, with a progress bar on a terminal that vanishes at the end."""
    if not console.is_terminal:
        return days
    return track(days, description=words, console=console, transient=True)


def worth_retrying(task: object, run: object, state: object) -> bool:
    """Retry what may pass by itself (I/O, a busy database), never a user's mistake."""
    try:
        state.result()  # type: ignore[attr-defined]
    except (ProjectError, FloatingPointError, MemoryError):
        return False
    except Exception:
        return True
    return False


RETRY: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [1.0, 5.0, 20.0],
    "retry_condition_fn": worth_retrying,
}


def tell_failure(flow: Any, run: Any, state: Any) -> None:
    """A flow's on_failure hook: an artifact on the run, and the command in
    $MTL_RANKER_ON_FAILURE with the message on its standard input (a mail, a chat).
    """
    message = f"{run.name} failed: {state.message}"
    create_markdown_artifact(key="failure", markdown=message, description="Why the run failed")
    command = os.environ.get("MTL_RANKER_ON_FAILURE")
    if command:
        subprocess.run(shlex.split(command), input=message, text=True, timeout=60, check=False)


HOOKS: dict[str, Any] = {"on_failure": [tell_failure], "on_crashed": [tell_failure]}


def last_day(night: Night) -> date:
    days = night.source.days()
    if not days:
        raise ProjectError(f"{night.source.root / night.project.log.path}: the log holds no day")
    return days[-1]
