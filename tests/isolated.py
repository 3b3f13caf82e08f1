"""A Python process in which this package is not installed, but its dependencies are."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

OURS = ("mtl_ranker", "flows", "_editable_impl_mtl_ranker", "__editable__")


def run_isolated(code: str, folder: Path, *arguments: object) -> str:
    """Run code with `python -I -S`, which reads neither PYTHONPATH nor .pth files; its output.

    Its only folder of packages has links to the installed ones, without this package. It refuses to
    unpickle MLflow models. A failure raises with its standard error.

    Args:
        folder: its working directory, which is outside of this repository.
        arguments: `sys.argv[1:]` of the code.
    """
    packages = folder / "site-packages"
    if not packages.is_dir():
        packages.mkdir()
        for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
            if not entry.name.startswith(OURS) and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)
    start = f"import sys; sys.path.append({str(packages)!r})\n"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", start + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(done.stderr)
    return done.stdout
