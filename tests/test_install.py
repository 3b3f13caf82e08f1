"""What works with fewer packages than `make install` installs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Packages by the names that are imported, where these are others.
IMPORTED = {"scikit-learn": "sklearn"}
BLOCK = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *place):
        return None if name.split(".")[0] in BLOCKED else self.finder.find_spec(name, *place)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
MODELS = """
import torch
from mtl_ranker.models import (
    attention, experts, gates, list_losses, mixture, objectives, pairs, presets, towers, trees
)
from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear
from mtl_ranker.models.ranker import Ranker
spec = presets.make("m", {"preset": "mmoe", "experts": 3}, 2)
embedding = FeatureEmbedding([4, 5], [], PiecewiseLinear([[0.0, 1.0]], [True]), spec.embedding_dim)
rows = torch.ones(6, 2, dtype=torch.long), torch.zeros(6, 0, dtype=torch.long), torch.rand(6, 1)
print(tuple(Ranker(spec, embedding)(*rows).shape))
"""
LIBRARY = """
import torch
import mtl_ranker as mr
numeric = torch.randn(200, 3)
labels = {"click": (numeric[:, 0] > 0).float(), "like": (numeric[:, 1] > 1).float()}
model = mr.train(mr.Data.of_tensors(numeric, labels), "mmoe", mr.Training(epochs=1))
print(model.gates(mr.Data.of_tensors(numeric, labels).train).height)
[getattr(mr, name) for name in mr.__all__]
"""
COMMAND = """
from mtl_ranker.commands.app import main
main()
"""


def packages(*extras: str) -> set[str]:
    """The imported names of the base's or of these extras' packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] if not extras else []
    lines = lines + [line for extra in extras for line in project["optional-dependencies"][extra]]
    names = [re.split(r"[^\w-]", line)[0] for line in lines]
    return {IMPORTED.get(name, name).replace("-", "_") for name in names}


def run_without(blocked: set[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"BLOCKED = {blocked!r}\n{BLOCK}{code}"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


EXTRAS = packages("nightly", "servers", "studies", "cluster", "stores", "onnx", "docs", "dev")


@pytest.mark.slow
def test_models_are_used_with_torch_and_numpy_only():
    blocked = (packages() | EXTRAS | {"scipy", "pandas"}) - {"torch", "numpy"}
    assert {"polars", "pydantic", "mlflow", "prefect", "sklearn"} <= blocked
    done = run_without(blocked, MODELS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 6, 2)"


@pytest.mark.slow
def test_the_library_works_without_the_extras():
    done = run_without(EXTRAS, LIBRARY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


@pytest.mark.slow
def test_a_command_names_the_extra_that_it_needs(tmp_path):
    done = run_without({"mlflow"}, COMMAND, "rollback", "-c", "simulated", "-w", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "error mlflow is not installed: pip install 'mtl_ranker[nightly]'\n"
