"""Print what pyproject.toml requires, with the named extras: installed before the sources are
copied, so that a change of the sources does not install everything again.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(file: Path, extras: list[str]) -> list[str]:
    project = tomllib.loads(file.read_text("utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(each for extra in extras for each in optional[extra])]


if __name__ == "__main__":
    print(*requirements(Path(sys.argv[1]), sys.argv[2:]), sep="\n")
