"""What every benchmark does with its figures: `--json FILE` writes them, `--save` keeps them.

A kept result is `benchmarks/results/SCRIPT.json`: the figures with the command, the date, the
machine and the seconds taken. `python -m benchmarks.tables` renders the documentation from these.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mtl_ranker.models.matmul import cores
from mtl_ranker.workspace import write_json

FOLDER = Path(__file__).parent / "results"
STARTED = time.perf_counter()


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--json", type=Path, help="write the figures to this file")
    found.add_argument(
        "--save",
        action="store_true",
        help="write them to benchmarks/results/ too, with command, date and machine",
    )
    found.add_argument("--threads", type=int, default=0, help="of torch; 0 = all cores")
    return found


def parse(found: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's options; sets torch's threads."""
    chosen = found.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    return chosen


def show(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], title: str = ""
) -> None:
    """Print a table."""
    table = Table(*headings, title=title or None, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write(chosen: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """The figures to where the options say."""
    figures = json.loads(json.dumps(figures, default=str))
    write_json(chosen.json, figures)
    if chosen.save:
        script = Path(sys.argv[0]).stem
        path = FOLDER / f"{script}.json"
        write_json(path, record(script, sys.argv[1:], figures))
        print(f"saved {path}; `python -m benchmarks.tables` puts it into the documentation")


def record(script: str, options: Sequence[str], figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "script": script,
        "command": command(script, options),
        "date": date.today().isoformat(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - STARTED, 1),
        "figures": figures,
    }


def command(script: str, options: Sequence[str]) -> str:
    """How to run it again: without --save and --json, and of absolute paths only the last part."""
    kept, skip = [], False
    for option in options:
        if skip or option == "--save" or option.startswith("--json="):
            skip = False
        elif option == "--json":
            skip = True
        elif Path(option).is_absolute():
            kept.append(f".../{Path(option).name}")
        else:
            kept.append(option)
    return shlex.join(["python", "-m", f"benchmarks.{script}", *kept])


def machine() -> dict[str, Any]:
    """The CPU's model, the cores this process may use, torch's threads and version."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def read(path: Path) -> dict[str, Any]:
    """The figures of a file that --save or --json wrote."""
    content = json.loads(path.read_text("utf-8"))
    return content.get("figures", content)
