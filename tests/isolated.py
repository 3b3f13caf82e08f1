"""Python processes in which this package is not installed, but its dependencies are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
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
        _link_packages(packages)
    start = f"import sys; sys.path.append({str(packages)!r})\n"
    command = [sys.executable, "-I", "-S", "-c", start + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=_variables(), capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(done.stderr)
    return done.stdout


@contextmanager
def serve_isolated(model: str, folder: Path, port: int, tracking: str) -> Iterator[str]:
    """Run `mlflow models serve` in such an environment; yields the server's address.

    The environment is a virtual one with links to the installed packages, without this package.

    Args:
        model: its address, such as `models:/NAME/1`.
        folder: an empty one, outside of this repository.
        tracking: of the registry.
    """
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    find = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    _link_packages(Path(subprocess.check_output([python, "-c", find], text=True).strip()))
    absent = "import importlib.util as i; assert i.find_spec('mtl_ranker') is None"
    subprocess.run([python, "-c", absent], check=True, cwd=folder, env=_variables())
    for name, entry in (("uvicorn", "uvicorn.main:main"), ("mlflow", "mlflow.cli:cli")):
        module, function = entry.split(":")
        script = python.with_name(name)
        script.write_text(f"#!{python}\nfrom {module} import {function}\n{function}()\n", "utf-8")
        script.chmod(0o755)
    environment = _variables() | {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": tracking,
    }
    mlflow = python.with_name("mlflow")
    command = [mlflow, "models", "serve", "-m", model, "--env-manager", "local"]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5)
                break
            except OSError:
                alive = server.poll() is None and time.monotonic() < deadline
                assert alive, (folder / "server.log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _link_packages(target: Path) -> None:
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(OURS) and entry.suffix != ".pth":
            place = target / entry.name
            if not place.exists():
                place.symlink_to(entry)


def _variables() -> dict[str, str]:
    """The environment without this process's Python and MLflow settings; no model is unpickled."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW_"))}
    return kept | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "OMP_NUM_THREADS": "1"}
