"""Run pytest on a copy of the repository, in a fork that has imported the large libraries."""

from __future__ import annotations

import sys
from pathlib import Path

OURS = ("mtl_ranker", "flows", "benchmarks", "tests")


def main() -> int:
    """Run pytest with the command line's arguments on the working folder's packages."""
    import pytest

    for name in list(sys.modules):
        if name.split(".")[0] in OURS and name != __name__:
            del sys.modules[name]
    sys.path.insert(0, str(Path.cwd()))
    sys.dont_write_bytecode = True
    return pytest.main(sys.argv[1:])
