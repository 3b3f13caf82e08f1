"""The part of this package that a stored model needs, and the versions of what it imports."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import (
    PackageNotFoundError,
    distribution,
    packages_distributions,
    version,
)
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
    # A local version, as of a CPU build, is not in the package index.
    return sorted(
        f"{name}=={version(name).split('+')[0]}"
        for name in map(_distribution, {*names, *EXCHANGED})
    )


def _distribution(package: str) -> str:
    """The distribution that installed an imported package: of the same name, if it has it.

    Otherwise the files of every installed distribution are listed, which takes a second.
    """
    try:
        own = Path(str(distribution(package).locate_file(package))).exists()
    except PackageNotFoundError:
        own = False
    return package if own else _distributions()[package][0].lower()


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


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
    body = [node for node in _statements(file) if not _is_for_type_checkers(node)]
    names = set()
    for node in body if loading else _with_inner(body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@cache
def _statements(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text("utf-8")).body


def _is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _with_inner(statements: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Statements with those inside of them; `ast.walk` would visit every expression as well."""
    for node in statements:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, part, [])
            yield from _with_inner(inner if isinstance(inner, list) else [])


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
