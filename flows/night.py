"""What every flow needs: messages, progress, retries and what happens on failure."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import MissingContextError
from rich.progress import track
from rich.text import Text

from mtl_ranker.errors import ProjectError
from mtl_ranker.reports.console import console


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


def is_retryable(task: object, run: object, state: object) -> bool:
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
    "retry_condition_fn": is_retryable,
}


def notify_failure(flow: Any, run: Any, state: Any) -> None:
    """A flow's on_failure hook: an artifact on the run, and the command in
    $MTL_RANKER_ON_FAILURE with the message on its standard input (a mail, a chat).
    """
    message = f"{run.name} failed: {state.message}"
    create_markdown_artifact(key="failure", markdown=message, description="Why the run failed")
    command = os.environ.get("MTL_RANKER_ON_FAILURE")
    if command:
        subprocess.run(shlex.split(command), input=message, text=True, timeout=60, check=False)


HOOKS: dict[str, Any] = {"on_failure": [notify_failure], "on_crashed": [notify_failure]}
