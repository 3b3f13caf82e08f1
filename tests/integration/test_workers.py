"""A worker that is killed with its run does not cost the next scheduled run.

docs/decisions/0008-dead-workers.md tells what Prefect's limits do then.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.runtime import flow_run

from flows.deployments import deployment_variables
from flows.schedule import in_turn, scheduled_yesterday
from mtl_ranker.commands.processes import descendants
from mtl_ranker.errors import ProjectError
from mtl_ranker.workspace import Workspace
from tests.integration.commands import PREFECT, environment
from tests.integration.test_processes import until
from tests.integration.test_servers import ROOT, ask, prefect_api
from tests.projects import SMALL, write_project

__all__ = ["prefect_api"]

# A night in small: it marks lost runs, takes the workspace in turn, and says which day it is for.
# While a file `hold-import` or `hold-run` is there it stays Pending or Running.
FLOW = """
import time
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).parent

def hold(what):
    while (HERE / f"hold-{what}").exists():
        (HERE / f"held-{what}").touch()
        time.sleep(0.1)

hold("import")
from prefect import flow
from prefect.runtime import flow_run
from flows.schedule import QUIET, in_turn, mark_lost_runs, scheduled_yesterday
from mtl_ranker.workspace import Workspace

@flow
def part():
    hold("run")

@flow
def tiny():
    mark_lost_runs(timedelta(seconds=5) if (HERE / "impatient").exists() else QUIET)
    with in_turn(Workspace(HERE / "workspace"), "tiny", 2.0, 0.2):
        part()
    (HERE / f"done-{flow_run.id}").write_text(str(scheduled_yesterday("Asia/Tokyo")))
"""


def get(api: str, path: str) -> Any:
    with urllib.request.urlopen(f"{api}{path}", timeout=30) as answer:
        return json.load(answer)


class Pool:
    """A process pool with the project's nightly deployment, its flow replaced by a small one."""

    def __init__(self, api: str, folder: Path) -> None:
        self.api, self.folder = api, folder
        self.log = folder / "worker.log"
        name = folder.name
        self.env = environment() | {
            "PREFECT_API_URL": api,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        (folder / "tiny.py").write_text(FLOW)
        project = yaml.safe_load((ROOT / "prefect.yaml").read_text())
        (nightly,) = [each for each in project["deployments"] if each["name"] == "nightly"]
        # All that could hold a run back stays as it is.
        nightly |= {"name": name, "entrypoint": "tiny.py:tiny", "parameters": {}, "schedules": []}
        nightly["work_pool"] = {"name": name}
        directory = {"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}
        changed = {"name": name, "pull": [directory], "deployments": [nightly]}
        (folder / "prefect.yaml").write_text(yaml.safe_dump(changed))
        self.prefect("work-pool", "create", name, "--type", "process")
        self.prefect("--no-prompt", "deploy", "--all")
        found = {"deployments": {"name": {"any_": [name]}}}
        self.deployment = ask(api, "/deployments/filter", found)[0]["id"]

    def prefect(self, *arguments: str) -> None:
        command = [PREFECT, *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.env, cwd=self.folder, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen]:
        with open(self.log, "a") as log:
            process = subprocess.Popen(
                [PREFECT, "worker", "start", "--pool", self.folder.name],
                stdout=log,
                stderr=log,
                env=self.env,
                cwd=self.folder,
            )
        try:
            yield process
        finally:
            kill_all(process)

    def schedule(self, when: datetime) -> str:
        """A run as the scheduler makes it; its id."""
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": when.isoformat()}}
        path = f"/deployments/{self.deployment}/create_flow_run"
        return ask(self.api, path, {"state": state})["id"]  # type: ignore[call-overload]

    def state(self, run: str) -> str:
        return get(self.api, f"/flow_runs/{run}")["state"]["type"]


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL for a worker and for its flow runs, which are in sessions of their own."""
    family = descendants(process.pid)
    for pid in (process.pid, *family):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(30)


def ends(pool: Pool, run: str) -> Callable[[], bool]:
    return lambda: pool.state(run) in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@pytest.mark.slow
@pytest.mark.parametrize(("held", "killed_as"), [("import", "PENDING"), ("run", "RUNNING")])
def test_the_run_after_a_killed_worker_starts_and_completes(prefect_api, tmp_path, held, killed_as):
    pool = Pool(prefect_api, tmp_path)
    (tmp_path / "impatient").touch()
    (tmp_path / f"hold-{held}").touch()
    with pool.worker() as worker:
        first = pool.schedule(datetime.now(UTC))
        until((tmp_path / f"held-{held}").exists, f"{killed_as} is reached", 120)
        assert pool.state(first) == killed_as
        kill_all(worker)
    (tmp_path / f"hold-{held}").unlink()
    assert pool.state(first) == killed_as  # nobody has told the server
    time.sleep(5)
    due = datetime.now(UTC) + timedelta(seconds=2)
    with pool.worker():
        second = pool.schedule(due)
        until(ends(pool, second), "the next run ends", 120)
    assert pool.state(second) == "COMPLETED", pool.log.read_text()
    # The dead run is no longer shown as if it lived, nor is what ran below it.
    assert pool.state(first) == "CRASHED"
    below = {"flow_runs": {"parent_flow_run_id": {"any_": [first]}}}
    runs = ask(prefect_api, "/flow_runs/filter", below)
    assert [run["state_type"] for run in runs] == ["CRASHED"] * (killed_as == "RUNNING")


@pytest.mark.slow
def test_a_late_run_keeps_its_day_and_two_runs_take_turns(prefect_api, tmp_path):
    """Two nights that were missed while no worker ran: each for its own day, one after the other,
    and neither takes the other, which waits, for dead.
    """
    pool = Pool(prefect_api, tmp_path)
    # 23:30 UTC is the next morning in Tokyo.
    days = [datetime(2026, 3, 7, 23, 30, tzinfo=UTC), datetime(2026, 3, 8, 14, 30, tzinfo=UTC)]
    runs = [pool.schedule(day) for day in days]
    (tmp_path / "hold-run").touch()
    with pool.worker():
        until(lambda: [pool.state(run) for run in runs] == ["RUNNING", "RUNNING"], "both run", 120)
        time.sleep(2)
        assert [pool.state(run) for run in runs] == ["RUNNING", "RUNNING"]
        (tmp_path / "hold-run").unlink()
        until(lambda: all(ends(pool, run)() for run in runs), "both end", 120)
    assert [pool.state(run) for run in runs] == ["COMPLETED", "COMPLETED"], pool.log.read_text()
    done = [(tmp_path / f"done-{run}").read_text() for run in runs]
    assert done == ["2026-03-07", "2026-03-07"]


def test_outside_a_run_yesterday_is_the_day_before_now():
    before = datetime.now(UTC).date()
    assert scheduled_yesterday("UTC") in (
        before - timedelta(days=1),
        datetime.now(UTC).date() - timedelta(days=1),
    )


def test_a_turn_that_does_not_come_names_the_other_run(tmp_path):
    """The lock of another process: this one may take its own again."""
    code = (
        "import sys, time; from pathlib import Path; from mtl_ranker.workspace import Workspace\n"
        "with Workspace(Path(sys.argv[1])).lock('nightly of another'):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdin is not None
    assert other.stdout.readline() == "locked\n"
    workspace = Workspace(tmp_path)
    with (
        pytest.raises(ProjectError, match="nightly of another"),
        in_turn(workspace, "x", 0.01, 0.1),
    ):
        pass
    other.stdin.close()  # the lock is free soon; what fails inside the block is not waited for
    with pytest.raises(ProjectError, match="mine"), in_turn(workspace, "x", 1.0, 0.1):
        raise ProjectError("mine")
    assert other.wait(10) == 0


def test_deployments_take_the_time_zone_of_the_log_and_the_first_model(tmp_path):
    log = SMALL["log"] | {"timezone": "America/Sao_Paulo"}
    given = {
        "MTL_RANKER_HOME": "/app",
        "MTL_RANKER_CONFIG": str(write_project(tmp_path, SMALL, log=log)),
        "MTL_RANKER_DATA": "/data",
        "MTL_RANKER_WORKSPACE": "/workspace",
    }
    made = {"MTL_RANKER_TIMEZONE": "America/Sao_Paulo", "MTL_RANKER_TUNE_MODEL": "shared_bottom"}
    assert deployment_variables(given) == given | made
    chosen = {"MTL_RANKER_TIMEZONE": "UTC", "MTL_RANKER_TUNE_MODEL": "mmoe"}
    assert deployment_variables(given | chosen) == given | chosen
    with pytest.raises(ProjectError, match="MTL_RANKER_TUNE_MODEL=ple: allowed: shared_bottom"):
        deployment_variables(given | {"MTL_RANKER_TUNE_MODEL": "ple"})
    with pytest.raises(ProjectError, match=r"not set: MTL_RANKER_DATA \(the folder of the log\)"):
        deployment_variables(given | {"MTL_RANKER_DATA": ""})


def test_no_deployment_has_a_limit_that_a_dead_run_could_hold():
    for each in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        assert "concurrency_limit" not in each
        assert "concurrency_limit" not in each["work_pool"]


def test_yesterday_is_before_the_scheduled_start(monkeypatch: pytest.MonkeyPatch):
    """In zones on both sides of UTC; Prefect's page on testing says to patch its runtime so."""
    scheduled = datetime(2026, 3, 8, 18, 30, tzinfo=UTC)
    monkeypatch.setitem(flow_run.FIELDS, "scheduled_start_time", lambda: scheduled)
    assert scheduled_yesterday("Asia/Shanghai") == date(2026, 3, 8)  # 02:30 on the 9th
    assert scheduled_yesterday("UTC") == date(2026, 3, 7)
    assert scheduled_yesterday("America/Sao_Paulo") == date(2026, 3, 7)
