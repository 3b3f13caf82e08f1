"""The deployments of `prefect.yaml`, in the time zone of the project's log.

    python -m flows.deployments [options of `prefect deploy`]

reads MTL_RANKER_CONFIG, sets what `prefect.yaml` needs and the environment lacks, and runs
`prefect deploy --all`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mtl_ranker.config import load_project
from mtl_ranker.errors import ProjectError

REQUIRED = {
    "MTL_RANKER_HOME": "the folder that holds flows/ on the worker's machine",
    "MTL_RANKER_CONFIG": "a preset or a project file",
    "MTL_RANKER_DATA": "the folder of the log",
    "MTL_RANKER_WORKSPACE": "the folder, or address in a store, for everything produced",
}


def deployment_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that `prefect.yaml` names. Raises ProjectError for those that are missing.

    MTL_RANKER_TIMEZONE is by default the log's, MTL_RANKER_TUNE_MODEL the project's first model.
    """
    missing = [f"{name} ({what})" for name, what in REQUIRED.items() if not environment.get(name)]
    if missing:
        raise ProjectError(f"environment: not set: {'; '.join(missing)}")
    project = load_project(environment["MTL_RANKER_CONFIG"])
    model = environment.get("MTL_RANKER_TUNE_MODEL") or next(iter(project.models))
    if model not in project.models:
        raise ProjectError(f"MTL_RANKER_TUNE_MODEL={model}: allowed: {', '.join(project.models)}")
    return {name: environment[name] for name in REQUIRED} | {
        "MTL_RANKER_TIMEZONE": environment.get("MTL_RANKER_TIMEZONE") or project.log.timezone,
        "MTL_RANKER_TUNE_MODEL": model,
    }


def main() -> int:
    try:
        variables = deployment_variables(os.environ)
    except ProjectError as error:
        print(f"error {error}", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", *sys.argv[1:]]
    # prefect.yaml is beside flows/.
    root = Path(__file__).parents[1]
    return subprocess.run(command, env=os.environ | variables, cwd=root, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
