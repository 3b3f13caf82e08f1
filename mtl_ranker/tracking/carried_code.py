"""The part of this package that a stored model needs, and the versions of what it imports."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from sys import stdlib_module_names

PACKAGE = Path(__file__).parents[1]
ROOT = "mtl_ranker.tracking.served"
# Read by polars to exchange frames with pandas, without an import in our modules.
EXCHANGED = ("pandas", "pyarrow")


def copy_code(folder: Path) -> Path:
    """Copy the modules that `ROOT` needs to `folder/mtl_ranker`; returns that path."""
    target = folder / PACKAGE.name
    for file in _modules():
        place = target / file.relative_to(PACKAGE)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    return target


@cache
def requirements() -> list[str]:
    """The packages that those modules import, as `name==version` of this process, ascending."""
    names = {name.split(".")[0] for file in _modules() for name in _imports(file, loading=True)}
    names -= {PACKAGE.name, *stdlib_module_names}
    distributions = packages_distributions()
    # Several distributions install into the package `mlflow`.
    found = {
        name if name in distributions[name] else distributions[name][0].lower()
        for name in (*names, *EXCHANGED)
    }
    # A local version, as of a CPU build, is not in the package index.
    return sorted(f"{name}=={version(name).split('+')[0]}" for name in found)


@cache
def _modules() -> frozenset[Path]:
    """The file of `ROOT`, of each module of this package that it imports, and so on."""
    found: set[Path] = set()
    waiting = list(_files([ROOT]))
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _files(_imports(file, loading=False))
    return frozenset(found)


def _imports(file: Path, loading: bool) -> set[str]:
    """Imported names in full; with `loading` only those that are imported with the module.

    What a module imports for type checkers only is left out.
    """
    body = [
        node
        for node in ast.parse(file.read_text("utf-8")).body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    names = set()
    for node in body if loading else (inner for outer in body for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _files(names: Iterable[str]) -> Iterator[Path]:
    """The files of those names that are modules of this package, and of the packages above them."""
    for name in names:
        first, *parts = name.split(".")
        if first != PACKAGE.name:
            continue
        for length in range(len(parts) + 1):
            place = PACKAGE.joinpath(*parts[:length])
            for file in (place / "__init__.py", place.with_suffix(".py")):
                if file.is_file() and file.is_relative_to(PACKAGE):
                    yield file
