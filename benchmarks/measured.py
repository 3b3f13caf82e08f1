"""Stages of a benchmark, each in a process of its own: seconds, and the peak of its memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

CONSOLE = Console(width=150)
Stage = Callable[..., dict[str, Any]]


def in_process(
    script: str, stage: str, settings: Mapping[str, Any], env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a stage of `script` returns, run in a fresh process, with `seconds` and `peak_mb`."""
    done = subprocess.run(
        [sys.executable, script, "--stage", stage, json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(env or {}),
    )
    if done.returncode != 0:
        raise SystemExit(f"{stage}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def stage_of(stages: Mapping[str, Stage]) -> bool:
    """Run the one stage that the command line names, print its figures; False without one."""
    if len(sys.argv) < 4 or sys.argv[1] != "--stage":
        return False
    settings = json.loads(sys.argv[3])
    before = peak_mb()
    began = time.perf_counter()
    found = stages[sys.argv[2]](**settings)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb(), "before_mb": before} | found))
    return True


def peak_mb() -> float:
    """The largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
