"""What a run that a schedule starts needs: its day, its turn, and marks on lost runs.

Why no Prefect limit keeps runs apart: docs/decisions/0008-dead-workers.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.runtime import deployment, flow_run
from prefect.settings import get_current_settings
from prefect.states import Crashed

from flows.night import announce, notify_failure
from mtl_ranker.errors import ProjectError
from mtl_ranker.workspace import Workspace

# Ten heartbeats of Prefect's default, and long enough for a restart of its server.
QUIET = timedelta(minutes=30)


def scheduled_yesterday(zone: str) -> date:
    """The day before the one, in that time zone, for which this run was scheduled.

    A run that waited for a worker, or is retried a day later, keeps its day. Outside a run, or in
    one that a person started, the day before now.
    """
    return flow_run.scheduled_start_time.astimezone(ZoneInfo(zone)).date() - timedelta(days=1)


@contextmanager
def in_turn(
    workspace: Workspace, what: str, wait_minutes: float, poll_seconds: float = 10.0
) -> Iterator[None]:
    """The workspace's lock, waited for while another run has it, `wait_minutes` at most.

    Raises ProjectError, which names the other run, when the time is over.
    """
    deadline = time.monotonic() + 60 * wait_minutes
    with ExitStack() as held:
        waited = False
        while True:
            try:
                held.enter_context(workspace.lock(what))
                break
            except ProjectError as busy:
                if time.monotonic() >= deadline:
                    raise
                if not waited:
                    announce("wait", busy)
                waited = True
            time.sleep(poll_seconds)
        yield


def mark_lost_runs(quiet: timedelta = QUIET) -> list[FlowRun]:
    """Mark earlier runs of this run's deployment crashed whose process ended unreported.

    Such a run is Pending for longer than `quiet`, or Running without a heartbeat for that long.
    Their sub-flows are marked too, and `MTL_RANKER_ON_FAILURE` is called for each: a killed process
    could not. Nothing waits for a lost run, so an error here is only reported. Returns the runs of
    the deployment that were marked.
    """
    if deployment.id is None or get_current_settings().flows.heartbeat_frequency is None:
        return []
    own = UUID(str(deployment.id))
    try:
        with get_client(sync_client=True) as client:
            lost = _lost(client, FlowRunFilterDeploymentId(any_=[own]), quiet)
    except Exception as error:  # the night goes on with any answer of the server
        announce("warning", f"cannot look for lost runs: {error}", logging.WARNING)
        return []
    for run in lost:
        announce("lost", f"{run.name}: its process died", logging.WARNING)
        notify_failure(None, run, run.state)
    return lost


def _lost(
    client: SyncPrefectClient, which: FlowRunFilterDeploymentId, quiet: timedelta
) -> list[FlowRun]:
    """Mark the lost runs of a deployment, and what still runs below them."""
    lost = [run for run in _unfinished(client, deployment_id=which) if _is_lost(client, run, quiet)]
    level = lost
    while level:
        for run in level:
            run.state = Crashed(message=f"The process of this run died; no sign of it for {quiet}")
            client.set_flow_run_state(run.id, run.state, force=True)
        above = FlowRunFilterParentFlowRunId(any_=[run.id for run in level])
        level = _unfinished(client, parent_flow_run_id=above)
    return lost


def _unfinished(client: SyncPrefectClient, **which: Any) -> list[FlowRun]:
    types = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING])
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=types), **which)
    )


def _is_lost(client: SyncPrefectClient, run: FlowRun, quiet: timedelta) -> bool:
    since = datetime.now(UTC) - quiet
    if str(run.id) == str(flow_run.id) or run.state is None or run.state.timestamp > since:
        return False
    if run.state.type == StateType.PENDING:
        return True
    sought = {
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "resource": {"id": [f"prefect.flow-run.{run.id}"]},
        "occurred": {"since": since.isoformat()},
    }
    answer = client.request("POST", "/events/filter", json={"filter": sought, "limit": 1})
    return not answer.raise_for_status().json()["events"]
