"""Print the champion's version: `python -m tests.integration.champion WORKSPACE PROJECT`."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    from mtl_ranker.environment import prepare

    workspace, project = sys.argv[1:]
    prepare(Path(workspace))

    from mtl_ranker.config import load_project
    from mtl_ranker.tracking import connection, registry
    from mtl_ranker.workspace import Workspace

    connection.connect(Workspace(Path(workspace)))
    print(registry.alias_version(load_project(project), "champion"))


if __name__ == "__main__":
    main()
