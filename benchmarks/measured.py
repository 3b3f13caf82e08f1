"""Stages of a benchmark, each in a process of its own: seconds, and the peak of its memory."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

CONSOLE = Console(width=150)
Stage = Callable[..., dict[str, Any]]


def in_process(
    stage: Stage, settings: Mapping[str, Any], env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a function of a benchmark returns, run in a fresh process, with `seconds` and `peak_mb`.

    Its arguments and what it returns pass as JSON.
    """
    # By the file's name, as the function's own module is __main__ in the script that was started.
    module = f"benchmarks.{Path(inspect.getfile(stage)).stem}"
    words = [module, stage.__name__, json.dumps(settings)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measured", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(env or {}),
    )
    if done.returncode != 0:
        raise SystemExit(f"{stage.__name__}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the stage that the command line names, and print its figures."""
    module, name, settings = sys.argv[1:]
    stage: Stage = getattr(importlib.import_module(module), name)
    before = peak_mb()
    began = time.perf_counter()
    found = stage(**json.loads(settings))
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb(), "before_mb": before} | found))


def peak_mb() -> float:
    """The largest resident size of this process so far, in MB.

    `ru_maxrss` would be at least that of the process that started this one, as Linux keeps it
    over `execve`.
    """
    status = Path("/proc/self/status").read_text("ascii")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, status
    return int(found[1]) / 1024


if __name__ == "__main__":
    main()
