"""A ranker as a `torch.export` program and as an ONNX model, against `RankerArtifact.predict`."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from mtl_ranker.errors import ProjectError
from mtl_ranker.models.presets import PRESETS, make
from mtl_ranker.ranking.blend import BlendChoice
from mtl_ranker.ranking.calibration import Calibration, Map
from mtl_ranker.ranking.onnx_model import check_installed, export_onnx, load_onnx
from mtl_ranker.ranking.program import (
    FILE,
    CalibrationMap,
    Latency,
    export_program,
    program_inputs,
)
from mtl_ranker.training.network import build_ranker
from tests.ranking.test_scoring import HISTORY, all_examples, random_ranker

PLATT = Map([0.0, 1.0], [0.3, 0.8], straight=True)
STEPS = Map([-2.0, 0.0, 1.0], [-1.0, -0.9, 2.0], straight=False)


@pytest.mark.parametrize(
    "points",
    [
        PLATT,
        STEPS,
        Map([0.5], [0.1], straight=False, scale="identity"),
        Map([0.0, 1.0], [0.2, 1.2], True, "log1p"),
        Map([0.0, 1.0], [-0.2, 0.8], True, "log"),
        Map([0.0, 1.0], [0.5, 1.5], True, "identity"),
        Map([0.0, 1.0], [0.5, 1.5], True, "log_odds", top=4.0),
        Map([0.1, 0.4, 3.0], [0.2, 0.3, 5.0], False, "identity"),
    ],
    ids=str,
)
def test_a_map_in_torch_is_the_map(points):
    values = np.r_[0.0, 1e-9, np.linspace(0.01, 0.99, 37), 1.0, 3.9]
    values = values if points.top > 1 or points.scale != "log_odds" else values[values <= 1]
    found = CalibrationMap(points)(torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(found, points(values), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_program_predicts_as_the_model_with_trees_calibration_and_blend(tmp_path):
    context, artifact = random_ranker(tmp_path, features=HISTORY)
    surfaces = {"click": {"home": STEPS, "search": PLATT.part(0.5)}}
    chained = {"long": "click"}
    everywhere = {"click": PLATT, "long": STEPS}
    artifact = replace(artifact, calibration=Calibration("tab", everywhere, surfaces, chained))
    choice = BlendChoice("weighted_product", {"click": 1.0, "long": -0.5}, [])
    rows = all_examples(context).with_columns(
        pl.when(pl.int_range(pl.len()) % 3 == 0).then(None).otherwise(pl.col("tab")).alias("tab")
    )
    for ranker in (artifact, artifact.with_blend(choice)):
        assert export_program(ranker, rows.head(50), tmp_path) < 1e-5
    content = json.loads((tmp_path / "program.json").read_text())
    assert content["outputs"] == ["click", "long", "score"]
    assert content["surface"] == {"column": "tab", "values": ["home", "search"]}
    program = torch.export.load(tmp_path / FILE).module()
    for part in (rows, rows.tail(7)):  # numbers of rows that it was not exported with
        found = program(*program_inputs(ranker, ["home", "search"], part)).detach().numpy()
        np.testing.assert_allclose(found, ranker.predict(part).to_numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_program_that_differs_is_refused(tmp_path, monkeypatch):
    context, artifact = random_ranker(tmp_path)
    rows = all_examples(context).head(20)
    with monkeypatch.context() as patched:
        patched.setattr("mtl_ranker.ranking.program.averaged", lambda network, *rest: network)
        with pytest.raises(ProjectError, match=r"differ by up to .* allowed: 1e-05"):
            export_program(artifact, rows, tmp_path)


def test_latency_is_of_the_requests_after_the_first_ones():
    calls = []
    found = Latency.of(lambda: calls.append(1), 20)
    assert len(calls) == 22
    assert 0 < found.p50 <= found.p99


@pytest.mark.slow
def test_an_onnx_model_predicts_as_the_model_with_trees_calibration_and_blend(tmp_path):
    context, artifact = random_ranker(tmp_path, features=HISTORY)
    surfaces = {"click": {"home": STEPS, "search": PLATT.part(0.5)}}
    everywhere = {"click": PLATT, "long": STEPS}
    chained = {"long": "click"}
    artifact = replace(artifact, calibration=Calibration("tab", everywhere, surfaces, chained))
    rows = all_examples(context).with_columns(
        pl.when(pl.int_range(pl.len()) % 3 == 0).then(None).otherwise(pl.col("tab")).alias("tab")
    )
    assert export_onnx(artifact, rows.head(50), tmp_path) < 1e-5
    run = load_onnx(tmp_path)
    for part in (rows, rows.tail(7)):  # numbers of rows that it was not exported with
        found = run(program_inputs(artifact, ["home", "search"], part))
        np.testing.assert_allclose(found, artifact.predict(part).to_numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_model_of_the_family_is_an_onnx_model(tmp_path, preset):
    """Without maps and trees, so that the surface is not among its inputs."""
    context, artifact = random_ranker(tmp_path)
    tasks = artifact.tasks
    torch.manual_seed(1)
    model = build_ranker(make("m", {"preset": preset}, len(tasks)), artifact.encoder, tasks).eval()
    for parameter in model.parameters():  # no equal gate weights, of which top-k takes any
        torch.nn.init.normal_(parameter, std=0.3)
    artifact = replace(artifact, model=model, trees=None)
    rows = all_examples(context).head(40)
    assert export_onnx(artifact, rows, tmp_path) < 1e-5
    assert json.loads((tmp_path / "program.json").read_text())["outputs"][-1] == "score"


def test_without_the_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("mtl_ranker.ranking.onnx_model.PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ProjectError, match=r"not installed: no_such_package; .*mtl_ranker\[onnx\]"):
        check_installed()
