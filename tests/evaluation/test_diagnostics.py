"""Diagnostics on rankers whose faults are known because they were put there by hand."""

from __future__ import annotations

import numpy as np
import torch

from mtl_ranker.evaluation.diagnostics import diagnose, similarity
from mtl_ranker.evaluation.metrics import auc
from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear
from mtl_ranker.models.objectives import Task
from mtl_ranker.models.presets import make
from mtl_ranker.models.ranker import Ranker

TASKS = [Task("click", "binary"), Task("like", "binary")]
ROWS = 5_000


def ranker(**settings) -> Ranker:
    torch.manual_seed(0)
    edges = [[-2.0, -1.0, 0.0, 1.0, 2.0]] * 2
    embedding = FeatureEmbedding([5], [], PiecewiseLinear(edges, [False, False]), 4)
    return Ranker(make("m", {"preset": "mmoe", **settings}, 2), embedding).eval()


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    categorical = torch.randint(0, 5, (ROWS, 1), generator=rng)
    return categorical, categorical[:, :0], torch.randn(ROWS, 2, generator=rng)


def labels() -> np.ndarray:
    return (np.random.default_rng(2).random((ROWS, 2)) < 0.3).astype(np.float32)


def look(model: Ranker):
    return diagnose(model, rows(), labels(), TASKS)


def test_fresh_model_has_no_fault_and_its_gates_are_gates():
    found = look(ranker(experts=3))
    layer = found.layers[0]
    assert found.warnings == []
    assert layer.outputs == ["click", "like"]
    np.testing.assert_allclose(layer.gate_weights.sum(1), 1.0, rtol=1e-5)
    expected = ranker(experts=3).expert_weights(*rows())[0].double().mean(0)
    np.testing.assert_allclose(layer.gate_weights, expected, rtol=1e-4)
    np.testing.assert_allclose(layer.utilisation, layer.gate_weights.mean(0), rtol=1e-5)
    assert (layer.effective_experts > 1).all()
    assert (layer.effective_experts <= 3).all()


def test_collapsed_gate_and_unused_expert_are_named():
    model = ranker(experts=3)
    gate = model.layers[0].gates.weight
    with torch.no_grad():
        gate.zero_()
        gate[:, 1, -8:] = 9.0  # inputs of the numbers, almost always above zero
        gate[:, 2, -8:] = -9.0
    words = " | ".join(look(model).warnings)
    for part in ("gate of click has collapsed", "gate of like", "expert 2; try gate_dropout"):
        assert part in words
    assert "expert 3 is unused" in words


def test_identical_experts_are_named():
    model = ranker(experts=3)
    bank = model.layers[0].banks[0]
    with torch.no_grad():
        for parameter in (*bank.weights, *bank.biases):
            parameter[2] = parameter[0]
    found = look(model)
    assert found.layers[0].similarity[0, 2] > 1 - 1e-6
    assert found.layers[0].similarity[0, 1] < 0.98
    assert [w for w in found.warnings if "experts 1 and 3 are nearly the same" in w]


def test_dead_expert_is_named():
    model = ranker(experts=3)
    with torch.no_grad():
        model.layers[0].banks[0].biases[0][1] = -1e3
    found = look(model)
    assert found.layers[0].dead_units[1] == 1.0
    assert [w for w in found.warnings if "expert 2 is dead" in w]


def test_removal_is_the_quality_without_the_expert():
    model, truth = ranker(experts=3), labels()
    found = look(model).layers[0].ablation
    gates = model.layers[0].gates
    with torch.no_grad():
        before = torch.sigmoid(model(*rows()))[0].numpy()
        gates.visible[:, 1] = False  # the gate's other weights are a softmax without it
        gates.all_visible = False
        after = torch.sigmoid(model(*rows()))[0].numpy()
    for t in range(2):
        expected = auc(truth[:, t], after[:, t]) - auc(truth[:, t], before[:, t])
        np.testing.assert_allclose(found[1, t], expected, atol=1e-6)


def test_expert_of_another_objective_is_worth_nothing():
    torch.manual_seed(0)
    model = ranker(preset="ple", layers=1)
    ablation = look(model).layers[0].ablation
    assert ablation[0, 1] == ablation[1, 0] == 0
    assert ablation[0, 0] != 0


def test_every_layer_and_every_kind_of_gate_is_diagnosed():
    for preset, depth in (("ple", 2), ("adatt", 2), ("cross_stitch", 2), ("sparse_mmoe", 1)):
        found = look(ranker(preset=preset))
        assert len(found.layers) == depth
        for layer in found.layers:
            assert layer.gate_weights.shape == (len(layer.outputs), layer.experts)
            assert layer.ablation.shape == (layer.experts, 2)
            assert np.isfinite(layer.ablation).all()
            assert abs(layer.utilisation.sum() - 1) < 1e-5
            if preset != "cross_stitch":
                np.testing.assert_allclose(layer.gate_weights.sum(1), 1.0, rtol=1e-4)
                native = {"adatt": 1.0}.get(preset, 0.0)
                np.testing.assert_allclose(layer.expert_weights.sum(1), 1.0 + native, rtol=1e-4)


def test_similarity_is_one_for_a_rotation_and_a_scale_and_small_for_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2_000, 6))
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    experts = np.stack([x, 3 * x @ turn, rng.normal(size=(2_000, 6)), np.zeros((2_000, 6))], 1)
    found = similarity(experts)
    assert abs(found[0, 1] - 1) < 1e-9
    assert found[0, 2] < 0.02
    assert found[0, 3] == 0
