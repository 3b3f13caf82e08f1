"""Make the templates of Prefect's and MLflow's databases, as a step of the installation.

Run as `python -m mtl_ranker.commands.databases`. Without it the first night makes them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from mtl_ranker.commands.serve import free_port, server
from mtl_ranker.environment import prepare
from mtl_ranker.workspace import Workspace


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        with server(folder, free_port()):
            from mtl_ranker.tracking.connection import create_database

            create_database(Workspace(folder))


if __name__ == "__main__":
    main()
