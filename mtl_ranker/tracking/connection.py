"""Where MLflow keeps runs and models: a server, or SQLite in the workspace."""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import mlflow
import mlflow.pyfunc

from mtl_ranker.workspace import Workspace


def connect(workspace: Workspace) -> str:
    """Use $MLFLOW_TRACKING_URI, or SQLite and local files in the workspace."""
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        create_database(workspace)
        uri = tracking_uri(workspace)
    mlflow.set_tracking_uri(uri)
    return uri


def tracking_uri(workspace: Workspace) -> str:
    return f"sqlite:///{workspace.root.resolve() / 'mlflow.db'}"


def create_database(workspace: Workspace) -> None:
    """MLflow's SQLite database, made aside and moved into place whole.

    A run killed while MLflow migrates a new database would leave one that nobody can open.
    """
    target = workspace.root / "mlflow.db"
    if target.is_file():
        return
    with tempfile.TemporaryDirectory() as folder, workspace.staged(target) as temporary:
        fresh = Path(folder) / "fresh.db"
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{fresh}").search_experiments(max_results=1)
        with closing(sqlite3.connect(fresh)) as database:
            database.execute("vacuum into ?", (str(temporary),))


def artifact_root(workspace: Workspace) -> str:
    return (workspace.root.resolve() / "mlartifacts").as_uri()


def page_address() -> str:
    uri = mlflow.get_tracking_uri()
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
