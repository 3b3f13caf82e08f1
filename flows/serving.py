"""The schedules of `mtl-ranker serve` in one process, without a work pool."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mtl_ranker.environment import prepare


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("config", "data", "workspace", "nightly-cron"):
        options.add_argument(f"--{name}", required=True)
    options.add_argument("--score-cron")
    options.add_argument("--tune-cron")
    options.add_argument("--tune-model")
    options.add_argument("--wait-minutes", type=float, default=120.0)
    chosen = options.parse_args()
    prepare(Path(chosen.workspace))
    serve_all(chosen, os.environ["PREFECT_API_URL"])


def serve_all(chosen: argparse.Namespace, api: str) -> None:
    """Deploy the flows with a schedule and run them until the process is stopped."""
    from prefect import serve
    from prefect.schedules import Cron

    from flows.nightly import nightly
    from flows.score import score_new
    from flows.tune import tune
    from mtl_ranker.config import load_project

    zone = load_project(chosen.config).log.timezone
    where = {"config": chosen.config, "data": chosen.data, "workspace": chosen.workspace}
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
    # No concurrency limit: docs/decisions/0008-dead-workers.md.
    deployments = [
        flow.to_deployment(name=name, schedule=Cron(cron, timezone=zone), parameters=where | more)
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
