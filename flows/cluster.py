"""Where tasks and trainings run: in this process, or on the workers of a Dask cluster."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.task_runners import ThreadPoolTaskRunner

from flows.night import announce
from mtl_ranker.context import Context
from mtl_ranker.environment import has_server
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.sources import open_context
from mtl_ranker.stores.objects import seen_by_workers

if TYPE_CHECKING:
    from mtl_ranker.nightly.trainers import Trainer

LOCAL = "local"


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
    _refuse(cluster)
    from prefect_dask import DaskTaskRunner

    if cluster == LOCAL:
        return DaskTaskRunner(cluster_kwargs={"n_workers": jobs, "threads_per_worker": 1})
    return DaskTaskRunner(address=cluster)


def _refuse(cluster: str) -> None:
    if importlib.util.find_spec("prefect_dask") is None:
        raise ProjectError(
            "--cluster: prefect-dask is not installed: pip install mtl_ranker[cluster]"
        )
    if not has_server():
        raise ProjectError(
            "--cluster needs a Prefect server: set PREFECT_API_URL (docs/performance.md)"
        )
    if cluster != LOCAL and "://" not in cluster:
        raise ProjectError(
            f"--cluster {cluster}: allowed: local, or an address such as tcp://host:8786"
        )


def shared_context(config: str, data: str, workspace: str, cluster: str | None) -> Context:
    """The context of a run, with folders as the workers of its cluster find them."""
    places = (seen_by_workers(Path(place), cluster) for place in (data, workspace))
    return open_context(config, *places)


@contextmanager
def trainer_of(cluster: str | None) -> Iterator[Trainer]:
    """What trains a night's models: the workers of a running cluster, or else this host.

    A line is printed for each training that ends on a worker.

    Raises ProjectError as `runner_of` does, and as `workers_of` for a worker that cannot train.
    """
    if cluster is None or cluster == LOCAL:
        from mtl_ranker.nightly.trainers import THIS_HOST

        yield THIS_HOST
        return
    from mtl_ranker.nightly.workers import workers_of

    with workers_of(cluster, lambda message: announce("cluster", message)) as trainer:
        yield trainer


def check_workers(cluster: str | None) -> None:
    """Raise ProjectError for a cluster without workers, and for a worker that cannot train."""
    if cluster is None:
        return
    _refuse(cluster)
    if cluster != LOCAL:
        from mtl_ranker.nightly.workers import connected

        with connected(cluster):
            announce("cluster", f"{cluster}: its workers can train")
