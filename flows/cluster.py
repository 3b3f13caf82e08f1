"""Task runners: threads of this process, or the workers of a Dask cluster."""

from __future__ import annotations

import importlib.util
from typing import Any

from prefect.task_runners import ThreadPoolTaskRunner

from mtl_ranker.environment import has_server
from mtl_ranker.errors import ProjectError


def runner_of(cluster: str | None, jobs: int) -> Any:
    """A Prefect task runner with `jobs` threads, or with the workers of a Dask cluster.

    Args:
        cluster: None for threads; `local` starts a Dask cluster of `jobs` processes; an address
            such as tcp://scheduler:8786 is that of a running cluster, whose workers need the same
            folders.

    Raises ProjectError without prefect-dask, for an invalid address, and without a Prefect server:
    without one several processes would share one SQLite file (PrefectHQ/prefect#7277).
    """
    if cluster is None:
        return ThreadPoolTaskRunner(max_workers=jobs)
    if importlib.util.find_spec("prefect_dask") is None:
        raise ProjectError(
            "--cluster: prefect-dask is not installed: pip install mtl_ranker[cluster]"
        )
    if not has_server():
        raise ProjectError(
            "--cluster needs a Prefect server: set PREFECT_API_URL (docs/performance.md)"
        )
    from prefect_dask import DaskTaskRunner

    if cluster == "local":
        return DaskTaskRunner(cluster_kwargs={"n_workers": jobs, "threads_per_worker": 1})
    if "://" not in cluster:
        raise ProjectError(
            f"--cluster {cluster}: allowed: local, or an address such as tcp://host:8786"
        )
    return DaskTaskRunner(address=cluster)
