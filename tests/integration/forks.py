"""`mtl-ranker` in forks of one process that has imported the large libraries once.

A command runs as in a process of its own: environment, folder, session, streams and exit of its
own. It can be killed. Only the seconds in which torch, Prefect, MLflow and scikit-learn are
imported are saved. Prefect reads its settings on import, so each fork reads them again.

`python -m tests.integration.forks` is the parent: it reads one request a line and writes the
number of each process that it starts, and the status of each that ends.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtl_ranker.environment import ALWAYS

ROOT = Path(__file__).parents[2]

IMPORTED = (
    "alembic",
    "dataframely",
    "git",
    "graphviz",
    "matplotlib.backends.backend_svg",
    "mlflow.pyfunc.scoring_server",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "prefect.flow_engine",
    "prefect.task_engine",
    "sqlalchemy.dialects.sqlite",
    "torch._dynamo",  # by the first optimiser
    "flows.nightly",
    "mtl_ranker.commands.app",
    "mtl_ranker.commands.serve",
)


class Command:
    """A command in a fork, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, parent: Parent, pid: int, out: Path, err: Path) -> None:
        self._parent, self.pid, self._out, self._err = parent, pid, out, err

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._parent.statuses.get(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        with self._parent.changed:
            ended = self._parent.changed.wait_for(lambda: self.poll() is not None, timeout)
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0, *self._read())
        return self._parent.statuses[self.pid]

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self._read()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _read(self) -> tuple[str, str]:
        return self._out.read_text("utf-8"), self._err.read_text("utf-8")


class Parent:
    """The process that forks, from the side of the tests."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mtl-ranker-forks-"))
        self.statuses: dict[int, int] = {}
        self.changed, self._one = threading.Condition(), threading.Lock()
        self._started: list[int] = []
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self.close)

    def start(
        self, module: str, arguments: list[str], env: Mapping[str, str], cwd: Path
    ) -> Command:
        """Run a module's `main()` with these arguments."""
        self._number += 1
        out, err = (self.folder / f"{self._number}.{name}" for name in ("out", "err"))
        request = {
            "module": module,
            "arguments": arguments,
            "env": dict(env),
            "cwd": str(cwd),
            "streams": [str(out), str(err)],
        }
        assert self._process.stdin is not None
        with self._one, self.changed:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            started = self.changed.wait_for(lambda: bool(self._started), 120)
            assert started, "no fork within 120 s"
            return Command(self, self._started.pop(), out, err)

    @property
    def status(self) -> int | None:
        """The process's exit code; None while it runs."""
        return self._process.poll()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            with self.changed:
                if "started" in answer:
                    self._started.append(answer["started"])
                else:
                    self.statuses[answer["ended"]] = answer["status"]
                self.changed.notify_all()


_parents: list[Parent] = []


def parent() -> Parent:
    """The process that forks: the first, or another one after it was killed."""
    if not _parents or _parents[-1].status is not None:
        if _parents:
            warnings.warn(f"the parent of forks ended: {_parents[-1].status}", stacklevel=2)
        _parents.append(Parent())
    return _parents[-1]


def start(
    *arguments: str | Path,
    env: Mapping[str, str],
    module: str = "mtl_ranker.commands.app",
    cwd: Path | None = None,
) -> Command:
    """Start `mtl-ranker` with these arguments and exactly this environment.

    All settings of Prefect are in it: one that starts its own server would set others later.
    """
    assert {"PREFECT_API_URL", "PREFECT_HOME"} & set(env)
    return parent().start(module, [str(word) for word in arguments], env, cwd or Path.cwd())


def run(
    *arguments: str | Path, env: Mapping[str, str], timeout: float = 1200, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`start`, and wait for the end."""
    command = start(*arguments, env=env, **options)
    out, err = command.communicate(timeout)
    assert command.returncode is not None
    return subprocess.CompletedProcess(list(arguments), command.returncode, out, err)


def fork_on_request() -> tuple[str, list[str]]:
    """Serve requests; returns, in each fork, the module and the arguments to run there."""
    awake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    pending = b""
    while True:
        ready, _, _ = select.select([0, awake], [], [])
        if awake in ready:
            os.read(awake, 4096)
            _report_ended()
        if 0 not in ready:
            continue
        received = os.read(0, 65536)
        if not received:
            sys.exit()
        *lines, pending = (pending + received).split(b"\n")
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(awake)
                os.close(woken)
                _become(request)
                return request["module"], request["arguments"]
            print(json.dumps({"started": pid}), flush=True)


def _report_ended() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps({"ended": pid, "status": code}), flush=True)


def _become(request: dict[str, Any]) -> None:
    """Take the environment, folder and streams of a request, in a session of its own."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, path in enumerate(request["streams"], start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    time.tzset()
    _set_up_prefect()


def _set_up_prefect() -> None:
    """Read Prefect's settings as a command does that imports it after `prepare`."""
    from prefect.context import refresh_global_settings_context

    given = dict(os.environ)
    for name, value in ALWAYS.items():
        os.environ.setdefault(name, value)
    refresh_global_settings_context()
    os.environ.clear()
    os.environ.update(given)


def import_libraries() -> None:
    """Import what nights import, also later than at the top of a module. Starts no thread.

    What is found out once about the installation, as a model is stored, is found out here.
    """
    os.environ.update(ALWAYS)

    for name in IMPORTED:
        importlib.import_module(name)
    from mlflow.utils import requirements_utils

    from mtl_ranker.tracking import carried_code

    requirements_utils._init_modules_to_packages_map()
    carried_code.requirements()
    with tempfile.TemporaryDirectory() as folder:
        carried_code.copy_code(Path(folder) / "code")
    assert threading.active_count() == 1


if __name__ == "__main__":
    import_libraries()
    module, arguments = fork_on_request()
    sys.argv = [f"-m {module}", *arguments]
    sys.exit(importlib.import_module(module).main())
