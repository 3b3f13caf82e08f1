"""Diagnostics on rankers with faults that the test puts there."""

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


def diagnosis_of(model: Ranker):
    return diagnose(model, rows(), labels(), TASKS)


def test_untrained_model_has_no_warnings_and_its_gates_sum_to_one():
    diagnosis = diagnosis_of(ranker(experts=3))
    layer = diagnosis.layers[0]
    assert diagnosis.warnings == []
    assert layer.outputs == ["click", "like"]
    np.testing.assert_allclose(layer.gate_weights.sum(1), 1.0, rtol=1e-5)
    expected = ranker(experts=3).expert_weights(*rows())[0].double().mean(0)
    np.testing.assert_allclose(layer.gate_weights, expected, rtol=1e-4)
    np.testing.assert_allclose(layer.utilisation, layer.gate_weights.mean(0), rtol=1e-5)
    assert (layer.effective_experts > 1).all()
    assert (layer.effective_experts <= 3).all()


def test_collapsed_gate_and_unused_expert_are_reported():
    model = ranker(experts=3)
    gate = model.layers[0].gates.weight
    with torch.no_grad():
        gate.zero_()
        gate[:, 1, -8:] = 9.0  # inputs of the numbers, almost always above zero
        gate[:, 2, -8:] = -9.0
    warnings = " | ".join(diagnosis_of(model).warnings)
    for text in ("gate of click has collapsed", "gate of like", "expert 2; try gate_dropout"):
        assert text in warnings
    assert "expert 3 is unused" in warnings


def test_identical_experts_are_reported():
    model = ranker(experts=3)
    bank = model.layers[0].banks[0]
    with torch.no_grad():
        for parameter in (*bank.weights, *bank.biases):
            parameter[2] = parameter[0]
    diagnosis = diagnosis_of(model)
    assert diagnosis.layers[0].similarity[0, 2] > 1 - 1e-6
    assert diagnosis.layers[0].similarity[0, 1] < 0.98
    assert [w for w in diagnosis.warnings if "experts 1 and 3 are nearly the same" in w]


def test_dead_expert_is_reported():
    model = ranker(experts=3)
    with torch.no_grad():
        model.layers[0].banks[0].biases[0][1] = -1e3
    diagnosis = diagnosis_of(model)
    assert diagnosis.layers[0].dead_units[1] == 1.0
    assert [w for w in diagnosis.warnings if "expert 2 is dead" in w]


def test_ablation_is_the_quality_without_the_expert():
    model, truth = ranker(experts=3), labels()
    ablation = diagnosis_of(model).layers[0].ablation
    gates = model.layers[0].gates
    with torch.no_grad():
        before = torch.sigmoid(model(*rows()))[0].numpy()
        gates.visible[:, 1] = False  # the gate's other weights are a softmax without it
        gates.all_visible = False
        after = torch.sigmoid(model(*rows()))[0].numpy()
    for t in range(2):
        expected = auc(truth[:, t], after[:, t]) - auc(truth[:, t], before[:, t])
        np.testing.assert_allclose(ablation[1, t], expected, atol=1e-6)


def test_ablating_an_expert_of_another_objective_changes_nothing():
    torch.manual_seed(0)
    model = ranker(preset="ple", layers=1)
    ablation = diagnosis_of(model).layers[0].ablation
    assert ablation[0, 1] == ablation[1, 0] == 0
    assert ablation[0, 0] != 0


def test_every_layer_and_every_kind_of_gate_is_diagnosed():
    for preset, depth in (("ple", 2), ("adatt", 2), ("cross_stitch", 2), ("sparse_mmoe", 1)):
        diagnosis = diagnosis_of(ranker(preset=preset))
        assert len(diagnosis.layers) == depth
        for layer in diagnosis.layers:
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
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    experts = np.stack([x, 3 * x @ rotation, rng.normal(size=(2_000, 6)), np.zeros((2_000, 6))], 1)
    cka = similarity(experts)
    assert abs(cka[0, 1] - 1) < 1e-9
    assert cka[0, 2] < 0.02
    assert cka[0, 3] == 0
