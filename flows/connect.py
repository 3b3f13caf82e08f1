"""The connection of a flow to MLflow."""

from __future__ import annotations

from prefect import task

from flows.night import RETRY
from mtl_ranker.context import Context
from mtl_ranker.tracking import connection


@task(name="connect", **RETRY)
def connect(context: Context) -> None:
    """Connect to MLflow; a server that restarts has half a minute to answer."""
    connection.connect(context.workspace)
