"""`mtl-ranker serve`: run the schedules in one process, without a work pool."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtl_ranker.environment import prepare


@contextmanager
def server(workspace: Path, port: int):
    """The configured Prefect API, or that of a server started on 127.0.0.1 for this context."""
    if "PREFECT_API_URL" in os.environ:
        yield os.environ["PREFECT_API_URL"]
        return
    api = f"http://127.0.0.1:{port}/api"
    home = workspace.resolve() / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "server.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "prefect", "server", "start"),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {
                "PREFECT_HOME": str(home),
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "DO_NOT_TRACK": "1",
            },
        )
        try:
            deadline = time.monotonic() + 90
            while True:
                try:
                    urllib.request.urlopen(f"{api}/health", timeout=2)
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(
                            f"Prefect's server did not start on port {port}: {home}/server.log"
                        ) from None
                    time.sleep(0.5)
            yield api
        finally:
            process.terminate()
            process.wait(30)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("config", "data", "workspace", "nightly-cron"):
        options.add_argument(f"--{name}", required=True)
    options.add_argument("--score-cron")
    options.add_argument("--tune-cron")
    options.add_argument("--tune-model")
    options.add_argument("--wait-minutes", type=float, default=120.0)
    options.add_argument("--port", type=int, default=4200)
    chosen = options.parse_args()
    workspace = Path(chosen.workspace)
    with server(workspace, chosen.port) as api:
        os.environ["PREFECT_API_URL"] = api
        os.environ.setdefault("PREFECT_HOME", str(workspace.resolve() / "prefect"))
        prepare(workspace)
        serve_all(chosen, api)


def serve_all(chosen: argparse.Namespace, api: str) -> None:
    """Deploy the flows with a schedule and run them until the process is stopped."""
    from prefect import serve
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.schedules import Cron

    from flows.nightly import nightly
    from flows.score import score_new
    from flows.tune import tune
    from mtl_ranker.config import load_project

    zone = load_project(chosen.config).log.timezone
    where = {"config": chosen.config, "data": chosen.data, "workspace": chosen.workspace}
    one = ConcurrencyLimitConfig(limit=1)
    plans: list[tuple[Any, str, str | None, dict[str, Any]]] = [
        (
            nightly,
            "nightly",
            chosen.nightly_cron,
            {"day": "yesterday", "wait_minutes": chosen.wait_minutes},
        ),
        (score_new, "score-new", chosen.score_cron, {}),
        (tune, "tune", chosen.tune_cron, {"model": chosen.tune_model, "day": "yesterday"}),
    ]
    deployments = [
        flow.to_deployment(
            name=name,
            schedule=Cron(cron, timezone=zone),
            parameters=where | more,
            concurrency_limit=one,
        )
        for flow, name, cron, more in plans
        if cron is not None
    ]
    for _, name, cron, _ in plans:
        if cron is not None:
            print(f"{name}: {cron} {zone}", flush=True)
    print(f"Prefect on {api.removesuffix('/api')}  (stop with Ctrl-C)", flush=True)
    serve(*deployments)


if __name__ == "__main__":
    main()
