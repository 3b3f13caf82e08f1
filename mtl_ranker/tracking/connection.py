"""The connection to MLflow: a tracking server, or SQLite and files in the workspace."""

from __future__ import annotations

import functools
import logging
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import mlflow
import mlflow.pyfunc

from mtl_ranker.stores.databases import copy_template, keep_template
from mtl_ranker.tracking.server import check_answers, without_credentials
from mtl_ranker.workspace import Workspace

LOG = logging.getLogger(__name__)

LOCAL_PAGE = "http://127.0.0.1:5000"
# URIs of workspaces' databases. MLflow's client writes the URI that it is told to use into
# $MLFLOW_TRACKING_URI, where the next workspace of this process would find it.
_OWN: set[str] = set()


def connect(workspace: Workspace) -> str:
    """Use $MLFLOW_TRACKING_URI, or SQLite in the workspace; returns the tracking URI.

    Raises ConnectionError at once if a server does not answer. MLflow's client would repeat each
    request for four minutes.
    """
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None or uri in _OWN:
        if workspace.store is not None:
            _warn_of_this_host(workspace.root)
        create_database(workspace)
        uri = tracking_uri(workspace)
        _OWN.add(uri)
    elif uri.startswith("http"):
        check_answers(uri)
    mlflow.set_tracking_uri(uri)
    return uri


@functools.cache
def _warn_of_this_host(root: Path) -> None:
    LOG.warning(
        "MLFLOW_TRACKING_URI is not set: runs and models are in %s/mlflow.db, where no other host "
        "finds them",
        root,
    )


def tracking_uri(workspace: Workspace) -> str:
    """The URI of the workspace's SQLite database."""
    return f"sqlite:///{workspace.root.resolve() / 'mlflow.db'}"


def create_database(workspace: Workspace) -> None:
    """Create MLflow's SQLite database under a temporary name and move it into place.

    A run killed while MLflow migrates a new database would leave one that cannot be opened.
    """
    target = workspace.root / "mlflow.db"
    if target.is_file():
        return
    here = Workspace(workspace.root)  # never in a store
    with here.lock("create mlflow.db", "mlflow.db", wait=True):
        # Another run may have created it meanwhile.
        if not target.is_file() and not copy_template("mlflow", target):
            _migrate(here, target)


def _migrate(workspace: Workspace, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, workspace.staged(target) as temporary:
        migrated = Path(folder) / "migrated.db"
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{migrated}").search_experiments(max_results=1)
        with closing(sqlite3.connect(migrated)) as database:
            database.execute("vacuum into ?", (str(temporary),))
    keep_template("mlflow", target)


def artifact_root(workspace: Workspace) -> str:
    """The URI of the workspace's artifacts."""
    return (workspace.root.resolve() / "mlartifacts").as_uri()


def page_address() -> str:
    """The address of MLflow's pages without credentials; by default that of `mtl-ranker ui`."""
    uri = mlflow.get_tracking_uri()
    return without_credentials(uri.rstrip("/")) if uri.startswith("http") else LOCAL_PAGE


def where_to_look(link: str, workspace: Workspace) -> str:
    """A link to MLflow's pages and, where no server runs by itself, how to start one."""
    if mlflow.get_tracking_uri().startswith("http"):
        return link
    return f"{link}  (start it with `mtl-ranker ui --workspace {workspace.where()}`)"
