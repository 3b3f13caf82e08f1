"""Gates and experts of a trained ranker: weights, similarity, dead units and ablation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtl_ranker.evaluation.metrics import evaluate, quality_metric
from mtl_ranker.models.gates import SoftmaxGates, per_row
from mtl_ranker.models.mixture import MixtureLayer
from mtl_ranker.models.objectives import Task, predictions
from mtl_ranker.models.ranker import Ranker

COLLAPSED = 0.95  # a gate is collapsed if one expert has at least this mean weight
UNUSED = 0.01  # an expert is unused if every output's mean weight on it is below this
SAME = 0.98  # two experts with at least this similarity are nearly the same function
DEAD = 0.99  # an expert is dead if at least this share of its units is zero on every row
BLOCK_ROWS = 4_096


@dataclass(frozen=True, kw_only=True)
class LayerDiagnosis:
    """One layer of O outputs and E experts, over N rows.

    Attributes:
        outputs: the objective that each output predicts, or the input stream of the next layer.
        gate_weights: [O, E] mean weight of the gate, without AdaTT's native experts.
        effective_experts: [O] effective number of experts per row: exp of the mean entropy of the
            gate's weights. NaN for weights that are not a softmax gate's.
        gate_information: [O] mutual information between row and expert, as a share of log E: 0 =
            the same mixture for every row, 1 = one expert per row, all used equally often. NaN for
            weights that are not a softmax gate's.
        expert_weights: [O, E] mean weight with the native experts.
        utilisation: [E] share of all outputs' weight, native experts included.
        similarity: [E, E] linear CKA of the experts' outputs (Kornblith et al., ICML 2019, eq. 3
            of section 3): 1 = the same function up to rotation and scale.
        dead_units: [E] share of units that are zero on every row.
        ablation: [E, T] change of each objective's quality when the expert is ablated.
    """

    outputs: list[str]
    gate_weights: np.ndarray
    effective_experts: np.ndarray
    gate_information: np.ndarray
    expert_weights: np.ndarray
    utilisation: np.ndarray
    similarity: np.ndarray
    dead_units: np.ndarray
    ablation: np.ndarray

    @property
    def experts(self) -> int:
        return len(self.utilisation)


@dataclass(frozen=True)
class Diagnosis:
    """Every layer of one model, and warnings about its gates and experts."""

    layers: list[LayerDiagnosis]
    warnings: list[str]


def diagnose(
    model: Ranker, inputs: tuple[Tensor, Tensor, Tensor], labels: np.ndarray, tasks: Sequence[Task]
) -> Diagnosis:
    """Diagnose a trained model on N labelled rows.

    Args:
        inputs: categorical [N, C], bags [N, slots], numeric [N, F].
        labels: [N, T] in the labels' own unit; NaN = missing.
    """
    model.eval()
    full_quality = _quality(model, inputs, labels, tasks)
    names = [task.name for task in tasks]
    layers: list[LayerDiagnosis] = []
    traces = _traced(model, inputs)
    for depth, module in enumerate(model.layers):
        assert isinstance(module, MixtureLayer)
        last = depth == len(model.layers) - 1
        gate_weights, expert_weights, experts = traces[depth]
        outputs = gate_weights.shape[1]
        softmax = isinstance(module.gates, SoftmaxGates)
        effective, information = _gate_entropy(gate_weights) if softmax else _undefined(outputs)
        total_weight = np.abs(expert_weights).sum((0, 1))
        ablation = [
            _quality(model, inputs, labels, tasks, {depth: [e]}) - full_quality
            for e in range(experts.shape[1])
        ]
        layers.append(
            LayerDiagnosis(
                outputs=names if last else [f"next layer, stream {o + 1}" for o in range(outputs)],
                gate_weights=gate_weights.mean(0),
                effective_experts=effective,
                gate_information=information,
                expert_weights=expert_weights.mean(0),
                utilisation=total_weight / max(total_weight.sum(), 1e-12),
                similarity=similarity(experts),
                dead_units=(experts <= 0).all(0).mean(1) if softmax else np.zeros(len(ablation)),
                ablation=np.stack(ablation),
            )
        )
    return Diagnosis(layers, _warnings(layers))


def similarity(experts: np.ndarray) -> np.ndarray:
    """Linear CKA between experts' outputs [N, E, H]: [E, E].

    ‖X_iᵀ X_j‖² / (‖X_iᵀ X_i‖ ‖X_jᵀ X_j‖) of centred outputs, in Frobenius norms (Kornblith et al.,
    ICML 2019); 0 for an expert with constant output.
    """
    centred = experts - experts.mean(0)
    count = experts.shape[1]
    norm = np.empty((count, count))
    for i in range(count):
        for j in range(i + 1):
            product = centred[:, i].T @ centred[:, j]
            norm[i, j] = norm[j, i] = np.linalg.norm(product)
    expert_norm = np.sqrt(np.diag(norm))
    scale = np.outer(expert_norm, expert_norm)
    cka = np.where(scale > 1e-12, (norm / np.maximum(scale, 1e-12)) ** 2, 0.0)
    np.fill_diagonal(cka, 1.0)
    return cka


def _traced(
    model: Ranker, inputs: tuple[Tensor, Tensor, Tensor]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Each layer's gate weights [N, O, E], expert weights [N, O, E] and experts [N, E, K·H]."""
    blocks: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), BLOCK_ROWS):
            categorical, bags, numeric = (t[start : start + BLOCK_ROWS] for t in inputs)
            trace = model.trace(categorical, bags, numeric)
            layers_of_block = []
            for module, gates, experts in zip(
                model.layers, trace.gates, trace.experts, strict=True
            ):
                assert isinstance(module, MixtureLayer)
                gate_weights, expert_weights = (
                    per_row(weights, len(categorical)).numpy()
                    for weights in (gates.weights, module.expert_weights(gates))
                )
                outputs = experts.permute(3, 0, 1, 2).flatten(2)  # [B, E, K·H]
                layers_of_block.append((gate_weights, expert_weights, outputs.numpy()))
            blocks.append(layers_of_block)
    layers = zip(*blocks, strict=True)
    return [tuple(np.concatenate(part) for part in zip(*layer, strict=True)) for layer in layers]  # type: ignore[misc]


def _quality(
    model: Ranker,
    inputs: tuple[Tensor, Tensor, Tensor],
    labels: np.ndarray,
    tasks: Sequence[Task],
    ablated: dict[int, list[int]] | None = None,
) -> np.ndarray:
    """Each objective's AUC or R² [T], without the `ablated` experts (layer → experts)."""
    blocks = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), BLOCK_ROWS):
            categorical, bags, numeric = (t[start : start + BLOCK_ROWS] for t in inputs)
            logits = model.trace(categorical, bags, numeric, ablated=ablated).logits
            blocks.append(predictions(logits, tasks, model.cutpoints).numpy())
    predicted = np.concatenate(blocks)
    lists = np.zeros(len(predicted), np.int64)
    return np.array(
        [
            evaluate(task.kind, labels[:, t], predicted[:, t], lists)[quality_metric(task.kind)]
            for t, task in enumerate(tasks)
        ]
    )


def _gate_entropy(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Effective experts per row [O] and the gate's information about the row [O].

    Args:
        weights: [N, O, E].
    """
    per_row_entropy = _entropy(weights).mean(0)
    overall = _entropy(weights.mean(0))
    information = (overall - per_row_entropy) / max(np.log(weights.shape[2]), 1e-12)
    return np.exp(per_row_entropy), information


def _entropy(weights: np.ndarray) -> np.ndarray:
    p = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-12)
    return -(p * np.log(np.maximum(p, 1e-12))).sum(-1)


def _undefined(outputs: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(outputs, np.nan), np.full(outputs, np.nan)


def _warnings(layers: Sequence[LayerDiagnosis]) -> list[str]:
    warnings = []
    for depth, layer in enumerate(layers):
        prefix = f"layer {depth + 1}: " if len(layers) > 1 else ""
        for o, output in enumerate(layer.outputs):
            e = int(layer.gate_weights[o].argmax())
            has_choice = (layer.gate_weights[o] > 0).sum() > 1
            if (
                has_choice
                and not np.isnan(layer.effective_experts[o])
                and layer.gate_weights[o, e] >= COLLAPSED
            ):
                warnings.append(
                    f"{prefix}the gate of {output} has collapsed: {layer.gate_weights[o, e]:.0%} "
                    f"of its weight is on expert {e + 1}; try gate_dropout = 0.1, balance = 0.01 "
                    "or fewer experts"
                )
        active = []
        for e in range(layer.experts):
            if layer.dead_units[e] >= DEAD:
                warnings.append(
                    f"{prefix}expert {e + 1} is dead: {layer.dead_units[e]:.0%} of its units are "
                    "zero on every row; try a lower training.learning_rate or fewer experts"
                )
            elif layer.experts > 1 and np.abs(layer.expert_weights[:, e]).max() < UNUSED:
                warnings.append(
                    f"{prefix}expert {e + 1} is unused: no output gives it more than "
                    f"{np.abs(layer.expert_weights[:, e]).max():.1%} of its weight; try "
                    "balance = 0.01 or fewer experts"
                )
            else:
                active.append(e)
        pairs = [(i, j) for i in active for j in active if i < j]
        for i, j in pairs:
            if layer.similarity[i, j] < SAME:
                continue
            warnings.append(
                f"{prefix}experts {i + 1} and {j + 1} are nearly the same function (CKA "
                f"{layer.similarity[i, j]:.3f}); try fewer experts, gate_dropout = 0.1, or "
                "expert_groups or expert_kinds that make them differ"
            )
    return warnings
