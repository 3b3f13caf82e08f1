"""CPU and memory while a training runs, for MLflow's page of system metrics."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

import mlflow
from mlflow.entities import Metric
from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL

PREFIX = "system/"  # MLflow shows metrics with this prefix on a page of their own
BATCH = 900  # metrics in one call; MLflow allows 1,000


@dataclass(frozen=True)
class Sample:
    """The state of the machine at a time.

    Attributes:
        milliseconds: since 1970.
        values: name, such as `cpu_utilization_percentage` → value.
    """

    milliseconds: int
    values: dict[str, float]


@contextmanager
def system_measured(seconds: float | None = None) -> Iterator[list[Sample]]:
    """Sample CPU and memory until the block ends, and once at its end.

    Runs are logged after their training, so MLflow's own thread, which needs a run, is not used.
    Yields a list that fills; it stays empty where psutil is not installed.

    Args:
        seconds: between samples; by default MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, or 10.
    """
    samples: list[Sample] = []
    if importlib.util.find_spec("psutil") is None:
        yield samples
        return
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    interval = seconds or MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10.0
    monitor, ended = CPUMonitor(), Event()
    monitor.collect_metrics()  # CPU use is that since the call before

    def sample() -> None:
        stopped = False
        while not stopped:
            stopped = ended.wait(interval)
            monitor.clear_metrics()
            monitor.collect_metrics()
            samples.append(Sample(round(1_000 * time.time()), monitor.aggregate_metrics()))

    thread = Thread(target=sample, name="system metrics", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def log_system(run_id: str, samples: Sequence[Sample]) -> None:
    """Log samples to a run, at their own times."""
    metrics = [
        Metric(PREFIX + name, value, sample.milliseconds, step)
        for step, sample in enumerate(samples)
        for name, value in sample.values.items()
    ]
    client = mlflow.MlflowClient()
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])
