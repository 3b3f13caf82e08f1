"""Run `mtl-ranker` with a fault: `python -m tests.integration.faults FAULT nightly -c …`."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtl_ranker.workspace import Workspace


def mlflow_fails(method: str, times: int | None = None) -> Callable[[], None]:
    """Calls of a method of MLflow's client raise as for a 503: the first ones, or all."""

    def install() -> None:
        import mlflow
        from mlflow.exceptions import MlflowException

        original, calls = getattr(mlflow.MlflowClient, method), 0

        def called(self: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if times is None or calls <= times:
                raise MlflowException("API request failed with error code 503: try again later")
            return original(self, *arguments, **options)

        setattr(mlflow.MlflowClient, method, called)

    return install


def disk_full(dataset: str) -> Callable[[], None]:
    """Nothing can be published below a folder of the workspace."""

    def install() -> None:
        original = Workspace.staged

        @contextmanager
        def staged(self: Workspace, target: Path) -> Iterator[Path]:
            with original(self, target) as temporary:
                yield temporary
                if dataset in target.relative_to(self.root).parts:
                    raise OSError(errno.ENOSPC, "No space left on device", str(target))

        Workspace.staged = staged  # type: ignore[method-assign]

    return install


FAULTS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "MLflow's registry answers 503 once": mlflow_fails("get_registered_model", 1),
    "MLflow's registry answers 503 always": mlflow_fails("get_registered_model"),
    "MLflow cannot create runs": mlflow_fails("create_run"),
    "MLflow cannot create a version": mlflow_fails("create_model_version"),
    "MLflow cannot create a version once": mlflow_fails("create_model_version", 1),
    "disk full while events are published": disk_full("events"),
    "disk full while aggregates are published": disk_full("aggregates"),
    "disk full while examples are published": disk_full("examples"),
    "disk full while the report is published": disk_full("reports"),
    "disk full while the ranking is published": disk_full("rankings"),
    "disk full while the night is recorded": disk_full("history"),
}


def main() -> None:
    FAULTS[sys.argv.pop(1)]()
    from mtl_ranker.commands import app

    app.main()


if __name__ == "__main__":
    main()
