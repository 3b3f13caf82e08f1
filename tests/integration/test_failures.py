"""The hook of failed and crashed flow runs, against a real Prefect server."""

from __future__ import annotations

import warnings

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.states import Crashed, Running
from prefect.testing.utilities import prefect_test_harness

from flows.night import notify_failure


@flow
def nothing() -> None: ...


@pytest.mark.slow
def test_the_message_of_a_crashed_run_is_an_artifact_of_that_run(tmp_path, monkeypatch):
    """Prefect calls the hook of a killed run outside of it, where no run is the current one."""
    monkeypatch.setenv("MTL_RANKER_ON_FAILURE", f"tee {tmp_path / 'message.txt'}")
    with prefect_test_harness(server_startup_timeout=300), get_client(sync_client=True) as client:
        other, run = (client.create_flow_run(nothing, state=Running()) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            notify_failure(None, run, Crashed(message="its process died"))
        key = ArtifactFilterKey(any_=["failure"])
        (artifact,) = client.read_artifacts(artifact_filter=ArtifactFilter(key=key))
    assert artifact.flow_run_id == run.id != other.id
    assert artifact.type == "markdown"
    assert artifact.data == f"{run.name} failed: its process died"
    assert (tmp_path / "message.txt").read_text() == artifact.data
