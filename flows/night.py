"""Shared by all flows: messages, progress, retries and hooks on failure."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from typing import Any

from prefect import get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.exceptions import MissingContextError
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from rich.progress import track
from rich.text import Text

from mtl_ranker.errors import is_outside
from mtl_ranker.reports.console import console


@contextmanager
def without_heartbeats() -> Iterator[None]:
    """Flow runs in this block send no heartbeats.

    Heartbeats find lost runs of a deployment (`mark_lost_runs`). Each flow waits up to a second
    for the thread that sends them, which a command typed by hand need not.
    """
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


STYLES = {logging.WARNING: "bold yellow", logging.ERROR: "bold red"}


def announce(label: str, message: object, level: int = logging.INFO) -> None:
    """Print a label and a message, and log them to the Prefect run.

    The message may hold data, so it is never read as markup.
    """
    style = "bold green" if label == "done" else STYLES.get(level, "bold")
    console.print(Text.assemble((f"{label:<9} ", style), str(message)), soft_wrap=True)
    try:
        get_run_logger().log(level, f"{label:<9} {message}")
    except MissingContextError:
        return


@contextmanager
def working(label: str, message: str) -> Iterator[None]:
    """A spinner on a terminal while the block runs; elsewhere a line before it."""
    if console.is_terminal:
        with console.status(message):
            yield
    else:
        announce(label, message)
        yield


def with_progress(days: Sequence[date], description: str) -> Iterable[date]:
    """Iterate over days, with a transient progress bar on a terminal."""
    if not console.is_terminal:
        return days
    return track(days, description=description, console=console, transient=True)


def is_retryable(task: object, run: object, state: object) -> bool:
    """Whether to retry a failed task: for I/O, a busy database or a server that does not answer.

    Other errors repeat, so they are not waited for.
    """
    try:
        state.result()  # type: ignore[attr-defined]
    except Exception as error:
        return is_outside(error) and getattr(error, "errno", None) not in LASTING
    return False


# A full disk, a file that is missing or may not be read: waiting does not help.
LASTING = {errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EACCES, errno.EROFS}

RETRY: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": 3,
    "retry_delay_seconds": [1.0, 5.0, 20.0],
    "retry_condition_fn": is_retryable,
}


def notify_failure(flow: Any, run: Any, state: Any) -> None:
    """A flow's hook on failure: the message to a command, and as an artifact of the run.

    If $MTL_RANKER_ON_FAILURE is set, its command (a mail, a chat) gets the message on its standard
    input. The artifact names its run, as the hook of a crashed run is called outside of the run.
    """
    message = f"{run.name} failed: {state.message}"
    command = os.environ.get("MTL_RANKER_ON_FAILURE")
    if command:
        subprocess.run(shlex.split(command), input=message, text=True, timeout=60, check=False)
    artifact = ArtifactCreate(
        key="failure",
        type="markdown",
        description="Why the run failed",
        data=message,
        flow_run_id=run.id,
    )
    with get_client(sync_client=True) as client:
        client.create_artifact(artifact)


HOOKS: dict[str, Any] = {"on_failure": [notify_failure], "on_crashed": [notify_failure]}
