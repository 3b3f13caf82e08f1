"""Imports point downwards through the layers of docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom to the top: a package imports only packages of the lines above its own.
LAYERS = [
    {"errors"},
    {"stores"},
    {"config", "workspace", "environment", "models"},
    {"context"},
    {"logs"},
    {"features"},
    {"training"},
    {"ranking"},
    {"evaluation"},
    {"nightly", "studies"},
    {"reports"},
    {"tracking", "library"},
    {"flows"},
    {"commands"},
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}


def imports(file: Path) -> set[str]:
    """Every imported name in full, also of imports inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def package(name: str) -> str | None:
    """`logs` for `mtl_ranker.logs.ingest`, `flows` for `flows.train`, None for other packages."""
    first, *rest = name.split(".")
    if first == "flows":
        return "flows"
    return rest[0] if first == "mtl_ranker" and rest and rest[0] != "__version__" else None


@pytest.mark.parametrize("file", [*modules("mtl_ranker"), *modules("flows")], ids=str)
def test_imports_point_downwards(file: Path):
    importer = package(".".join(file.relative_to(ROOT).with_suffix("").parts))
    if importer in (None, "__init__"):
        return
    for name in imports(file):
        imported = package(name)
        if imported not in (None, importer):
            assert LEVEL[imported] < LEVEL[importer], f"{importer} imports {name}"


def test_few_modules_are_outside_a_package():
    loose = [f.name for f in (ROOT / "mtl_ranker").glob("*.py") if f.name != "__init__.py"]
    assert len(loose) <= 7, loose


def test_mlflow_and_prefect_are_imported_in_one_package_each():
    for file in [*modules("mtl_ranker"), *modules("flows")]:
        parts = file.relative_to(ROOT).parts
        names = {name.split(".")[0] for name in imports(file)}
        assert "mlflow" not in names or parts[:2] == ("mtl_ranker", "tracking"), file
        assert "prefect" not in names or parts[0] == "flows", file


def test_models_need_torch_only():
    for file in modules("mtl_ranker/models"):
        names = imports(file)
        ours = {n for n in names if n.startswith("mtl_ranker")}
        assert all(n.startswith("mtl_ranker.models") for n in ours), file
        foreign = {n.split(".")[0] for n in names} - {"mtl_ranker"}
        assert foreign - set(sys.stdlib_module_names) <= {"torch"}, file


@pytest.mark.parametrize(
    "module",
    [
        "mtl_ranker.commands.app",
        "mtl_ranker.logs.ingest",
        "mtl_ranker.training.specs",
        "mtl_ranker.features.examples",
        "flows.ingest",
        "flows.features",
    ],
)
def test_works_without_torch_scikit_learn_and_mlflow(module: str):
    heavy = ("torch", "sklearn", "mlflow")
    code = f"import sys, {module}; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
