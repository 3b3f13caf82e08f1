"""Writes the figures of `benchmarks/results/` into the documentation.

In a page, `<!-- table: NAME -->` … `<!-- end -->` holds the table NAME that a script's function
`tables(figures)` makes, and `<!-- figures: SCRIPT -->` … `<!-- end -->` what its `summary(figures)`
says. A script without a results file leaves its tables as they are, and has no summary. With
`--check` nothing is written: the exit code is 1 when a page differs from the results.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER

ROOT = Path(__file__).parents[1]
INDEX = Path(__file__).with_name("README.md")
NOT_RUN = "not run on this version"
MARKED = re.compile(r"(<!-- (table|figures): ([^>]+?) -->)(.*?)(<!-- end -->)", re.DOTALL)


def scripts() -> list[str]:
    """The modules of this package that are benchmarks: those with a function `tables`."""

    def is_benchmark(file: Path) -> bool:
        body = ast.parse(file.read_text("utf-8")).body
        return any(isinstance(node, ast.FunctionDef) and node.name == "tables" for node in body)

    return sorted(file.stem for file in Path(__file__).parent.glob("*.py") if is_benchmark(file))


def pages() -> list[Path]:
    return [*sorted((ROOT / "docs").rglob("*.md")), INDEX]


def rendered(folder: Path = FOLDER) -> dict[tuple[str, str], str]:
    """(table or figures, name) → Markdown, of every script; of its tables only with a result."""
    found: dict[tuple[str, str], str] = {}
    for script in scripts():
        path = folder / f"{script}.json"
        if not path.is_file():
            found["figures", script] = NOT_RUN
            continue
        result = json.loads(path.read_text("utf-8"))
        module = importlib.import_module(f"benchmarks.{script}")
        found["figures", script] = f"{module.summary(result['figures'])} ({origin(result)})"
        for name, text in module.tables(result["figures"]).items():
            found["table", name] = text
    return found


def origin(result: Mapping[str, Any]) -> str:
    """When, where and how long a result was measured."""
    machine, minutes = result["machine"], result["seconds"] / 60
    spent = f"{minutes:.0f} min" if minutes >= 1 else f"{result['seconds']:.0f} s"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return f"{result['date']}, {machine['cpu']}, {threads}, torch {machine['torch']}, {spent}"


def updated(text: str, found: Mapping[tuple[str, str], str]) -> str:
    """A page with every marked place that has a rendering replaced by it."""

    def replace(match: re.Match[str]) -> str:
        start, kind, name, _, end = match.groups()
        if (kind, name) not in found:
            return match[0]
        new = found[kind, name]
        return f"{start}\n\n{new}\n\n{end}" if kind == "table" else f"{start}{new}{end}"

    return MARKED.sub(replace, text)


def update(paths: Iterable[Path], found: Mapping[tuple[str, str], str], write: bool) -> list[Path]:
    """The pages that differ from the results, which are written if `write`."""
    differing = []
    for path in paths:
        old = path.read_text("utf-8")
        new = updated(old, found)
        if new != old:
            differing.append(path)
            if write:
                path.write_text(new, "utf-8")
    return differing


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--check", action="store_true", help="write nothing; 1 on a difference")
    options.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    chosen = options.parse_args()
    differing = update(pages(), rendered(chosen.results), write=not chosen.check)
    for path in differing:
        words = "differs from the results" if chosen.check else "updated"
        print(f"{path.relative_to(ROOT)}: {words}")
    sys.exit(1 if chosen.check and differing else 0)


if __name__ == "__main__":
    main()
