"""What gates and experts do in a trained ranker, and what each expert is worth."""

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

COLLAPSED = 0.95  # a gate with this mean weight on one expert has stopped choosing
UNHEARD = 0.01  # an expert with less of every gate's weight than this is heard by nobody
SAME = 0.98  # two experts with this similarity are nearly the same function
DEAD = 0.99  # an expert with this share of units that are always zero
BLOCK = 4_096


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer of O outputs and E experts, over N rows.

    Attributes:
        outputs: what each output feeds: an objective, or an expert of the next layer.
        gate: [O, E] mean weight of the gate, without AdaTT's native experts.
        heard: [O] effective number of experts a row: exp of the mean entropy of its weights.
        chosen: [O] how much the weights depend on the row: the mutual information between row and
            expert, of log E; 0 = the same mix for every row, 1 = one expert a row, all used
            alike. NaN, like `heard`, where weights are no gate's.
        listening: [O, E] mean weight with the native experts.
        utilisation: [E] share of all outputs' weight, native experts included.
        similarity: [E, E] linear CKA of the experts' outputs (Kornblith et al., ICML 2019, eq. 3
            of section 3): 1 = the same function up to rotation and scale.
        dead_units: [E] share of units that are zero on every row.
        removal: [E, T] change of each objective's quality when the expert is silenced.
    """

    outputs: list[str]
    gate: np.ndarray
    heard: np.ndarray
    chosen: np.ndarray
    listening: np.ndarray
    utilisation: np.ndarray
    similarity: np.ndarray
    dead_units: np.ndarray
    removal: np.ndarray

    @property
    def experts(self) -> int:
        return len(self.utilisation)


@dataclass(frozen=True)
class Diagnosis:
    """Every layer of one model, and what is wrong with it, in words."""

    layers: list[LayerDiagnosis]
    warnings: list[str]


def diagnose(
    model: Ranker, inputs: tuple[Tensor, Tensor, Tensor], labels: np.ndarray, tasks: Sequence[Task]
) -> Diagnosis:
    """Look into a trained model on N labelled rows.

    Args:
        inputs: categorical [N, C], bags [N, slots], numeric [N, F].
        labels: [N, T] in their own unit; NaN = missing.
    """
    model.eval()
    base = _quality(model, inputs, labels, tasks)
    names = [task.name for task in tasks]
    layers: list[LayerDiagnosis] = []
    traces = _traced(model, inputs)
    for depth, module in enumerate(model.layers):
        assert isinstance(module, MixtureLayer)
        last = depth == len(model.layers) - 1
        weights, listening, experts = traces[depth]
        count = weights.shape[1]
        outputs = names if last else [f"next layer, stream {o + 1}" for o in range(count)]
        removal = np.stack(
            [
                _quality(model, inputs, labels, tasks, {depth: [e]}) - base
                for e in range(experts.shape[1])
            ]
        )
        gated = isinstance(module.gates, SoftmaxGates)
        heard, chosen = _choice(weights) if gated else _none(count)
        share = np.abs(listening).sum((0, 1))
        layers.append(
            LayerDiagnosis(
                outputs,
                weights.mean(0),
                heard,
                chosen,
                listening.mean(0),
                share / max(share.sum(), 1e-12),
                similarity(experts),
                (experts <= 0).all(0).mean(1) if gated else np.zeros(experts.shape[1]),
                removal,
            )
        )
    return Diagnosis(layers, _warnings(layers))


def similarity(experts: np.ndarray) -> np.ndarray:
    """Linear CKA between experts' outputs [N, E, H]: [E, E].

    ‖X_iᵀ X_j‖² / (‖X_iᵀ X_i‖ ‖X_jᵀ X_j‖) of centred outputs, in Frobenius norms; 0 with an expert
    that never varies.
    """
    centred = experts - experts.mean(0)
    count = experts.shape[1]
    norm = np.empty((count, count))
    for i in range(count):
        for j in range(i + 1):
            product = centred[:, i].T @ centred[:, j]
            norm[i, j] = norm[j, i] = np.linalg.norm(product)
    own = np.sqrt(np.diag(norm))
    scale = np.outer(own, own)
    found = np.where(scale > 1e-12, (norm / np.maximum(scale, 1e-12)) ** 2, 0.0)
    np.fill_diagonal(found, 1.0)
    return found


def _traced(
    model: Ranker, inputs: tuple[Tensor, Tensor, Tensor]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Each layer's gates and what outputs listen to [N, O, E], and experts [N, E, K·H]."""
    blocks: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), BLOCK):
            a, b, c = (tensor[start : start + BLOCK] for tensor in inputs)
            trace = model.trace(a, b, c)
            found = []
            for module, gated, experts in zip(
                model.layers, trace.gated, trace.experts, strict=True
            ):
                assert isinstance(module, MixtureLayer)
                both = [
                    per_row(weights, len(a)).numpy()
                    for weights in (gated.weights, module.listening(gated))
                ]
                made = experts.permute(3, 0, 1, 2).flatten(2)  # [B, E, K·H]
                found.append((both[0], both[1], made.numpy()))
            blocks.append(found)
    layers = zip(*blocks, strict=True)
    return [tuple(np.concatenate(part) for part in zip(*layer, strict=True)) for layer in layers]  # type: ignore[misc]


def _quality(
    model: Ranker,
    inputs: tuple[Tensor, Tensor, Tensor],
    labels: np.ndarray,
    tasks: Sequence[Task],
    silent: dict[int, list[int]] | None = None,
) -> np.ndarray:
    blocks = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), BLOCK):
            a, b, c = (tensor[start : start + BLOCK] for tensor in inputs)
            logits = model.trace(a, b, c, silent=silent).logits
            blocks.append(predictions(logits, tasks, model.cutpoints).numpy())
    predicted = np.concatenate(blocks)
    user = np.zeros(len(predicted), np.int64)
    return np.array(
        [
            evaluate(task.kind, labels[:, t], predicted[:, t], user)[quality_metric(task.kind)]
            for t, task in enumerate(tasks)
        ]
    )


def _choice(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Effective experts a row [O], and how much of the choice depends on the row [O]."""
    each = _entropy(weights).mean(0)
    overall = _entropy(weights.mean(0))
    return np.exp(each), (overall - each) / max(np.log(weights.shape[2]), 1e-12)


def _entropy(weights: np.ndarray) -> np.ndarray:
    p = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-12)
    return -(p * np.log(np.maximum(p, 1e-12))).sum(-1)


def _none(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, np.nan), np.full(count, np.nan)


def _warnings(layers: Sequence[LayerDiagnosis]) -> list[str]:
    found = []
    for depth, layer in enumerate(layers):
        place = f"layer {depth + 1}: " if len(layers) > 1 else ""
        for o, output in enumerate(layer.outputs):
            e = int(layer.gate[o].argmax())
            several = (layer.gate[o] > 0).sum() > 1
            if several and not np.isnan(layer.heard[o]) and layer.gate[o, e] >= COLLAPSED:
                found.append(
                    f"{place}the gate of {output} has collapsed: {layer.gate[o, e]:.0%} of its "
                    f"weight is on expert {e + 1}; try gate_dropout = 0.1, balance = 0.01 or "
                    "fewer experts"
                )
        alive = []
        for e in range(layer.experts):
            if layer.dead_units[e] >= DEAD:
                found.append(
                    f"{place}expert {e + 1} is dead: {layer.dead_units[e]:.0%} of its units are "
                    "zero on every row; try a lower training.learning_rate or fewer experts"
                )
            elif layer.experts > 1 and np.abs(layer.listening[:, e]).max() < UNHEARD:
                found.append(
                    f"{place}expert {e + 1} is heard by nobody: no gate gives it more than "
                    f"{np.abs(layer.listening[:, e]).max():.1%} of its weight; try balance = 0.01 "
                    "or fewer experts"
                )
            else:
                alive.append(e)
        same = [(i, j) for i in alive for j in alive if i < j and layer.similarity[i, j] >= SAME]
        for i, j in same:
            found.append(
                f"{place}experts {i + 1} and {j + 1} are nearly the same function (CKA "
                f"{layer.similarity[i, j]:.3f}); try fewer experts, gate_dropout = 0.1, or "
                "expert_groups or expert_kinds that make them differ"
            )
    return found
