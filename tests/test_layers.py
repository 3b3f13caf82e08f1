"""Who may import whom (docs/architecture.md)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_only_the_registry_imports_mlflow_and_only_flows_import_prefect():
    for file in modules("mtl_ranker"):
        names = {name.split(".")[0] for name in imports(file)}
        assert "prefect" not in names, file
        assert "mlflow" not in names or file.name == "registry.py", file
    for file in modules("flows"):
        assert "mlflow" not in {name.split(".")[0] for name in imports(file)}, file


def test_models_and_objectives_need_torch_only():
    for file in [*modules("mtl_ranker/models"), ROOT / "mtl_ranker/objectives.py"]:
        ours = {n for n in imports(file) if n.startswith("mtl_ranker")}
        assert all(n.startswith("mtl_ranker.models") for n in ours), file
        foreign = {n.split(".")[0] for n in imports(file)} - {"mtl_ranker"}
        assert foreign - set(sys.stdlib_module_names) <= {"torch"}, file


def test_logs_queries_and_config_do_without_torch():
    files = [*modules("mtl_ranker/logs"), ROOT / "mtl_ranker/config.py"]
    for file in [*files, ROOT / "mtl_ranker/features/queries.py"]:
        assert "torch" not in {n.split(".")[0] for n in imports(file)}, file
    for name in ("config.py", "workspace.py"):
        ours = {n for n in imports(ROOT / "mtl_ranker" / name) if n.startswith("mtl_ranker")}
        assert ours <= {"mtl_ranker.errors"}, name
