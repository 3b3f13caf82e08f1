"""Defaults of the commands for Prefect, MLflow and OpenMP, set before any of them is imported.

Variables that the user has set take precedence. Telemetry is off. Without PREFECT_API_URL, a
Prefect server runs for the length of a command. Its SQLite database is in the workspace, and the
background services that a single run does not need are off (they cause `database is locked` in
SQLite, PrefectHQ/prefect#18934).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mtl_ranker.stores.copies import local_folder

ALWAYS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Half a minute for a request, which flows repeat; MLflow's own 7 take four minutes each time.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "MPLBACKEND": "Agg",
    # OpenMP's threads wait for each other in a loop: here for a tenth of a millisecond, not for
    # several. Where other processes use the cores, the loop takes the time that they need.
    "GOMP_SPINCOUNT": "10000",
    # Run logs go to the API, where the Prefect page shows them; the terminal shows the commands'.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
}
TEMPORARY_API = "MTL_RANKER_TEMPORARY_API"  # the address of a server that ends with its command
TEMPORARY = {
    "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",  # types of blocks, which flows here lack
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_ENABLED": "false",
}


def prepare(workspace: Path) -> None:
    """Set the defaults in `os.environ`.

    Args:
        workspace: a folder or an address.
    """
    for name, value in ALWAYS.items():
        os.environ.setdefault(name, value)
    _print_warnings()
    if "PREFECT_API_URL" not in os.environ:
        os.environ.setdefault("PREFECT_HOME", str(local_folder(workspace).resolve() / "prefect"))
        for name, value in TEMPORARY.items():
            os.environ.setdefault(name, value)


def _print_warnings() -> None:
    """Print the package's log records on stderr; Prefect's settings hide them from there."""
    logger = logging.getLogger("mtl_ranker")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter("warning   %(message)s"))
        logger.addHandler(handler)


def has_server() -> bool:
    """Whether PREFECT_API_URL names a Prefect server that outlives this command."""
    return os.environ.get("PREFECT_API_URL") not in (None, os.environ.get(TEMPORARY_API))
