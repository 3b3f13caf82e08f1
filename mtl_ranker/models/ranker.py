"""The multi-task ranker: embedding → experts → gates → towers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtl_ranker.models.embedding import FeatureEmbedding
from mtl_ranker.models.experts import ExpertBank
from mtl_ranker.models.gates import SoftmaxGates, combine
from mtl_ranker.models.towers import Towers


@dataclass(frozen=True)
class RankerSpec:
    """The wiring that makes a model of the family; see `presets.py`.

    Attributes:
        visible: [T][E], which experts objective t may listen to.
        tied_gate: all objectives share one gate.
        expert_hidden: units of the experts' layers.
        tower_hidden: units of the towers' hidden layers.
        embedding_width: D.
        dropout: on experts' and towers' units.
    """

    visible: tuple[tuple[bool, ...], ...]
    tied_gate: bool = False
    expert_hidden: tuple[int, ...] = (64,)
    tower_hidden: tuple[int, ...] = (16,)
    embedding_width: int = 8
    dropout: float = 0.1


class Ranker(nn.Module):
    """A multi-task ranker of the family that Ma et al. (KDD 2018) compare.

    f^k(x) = Σ_i g^k(x)_i f_i(x) and y_k = h^k(f^k(x)) (eq. 5 to 7), where the specification's
    `visible` and `tied_gate` choose between single-task, shared-bottom, OMoE and MMoE.

    Shape: categorical [B, C], bags [B, slots], numeric [B, F] → logits [B, T].
    """

    def __init__(self, spec: RankerSpec, embedding: FeatureEmbedding) -> None:
        super().__init__()
        visible = torch.tensor(spec.visible, dtype=torch.bool)
        objectives, experts = visible.shape
        self.spec = spec
        self.embedding = embedding
        self.experts = ExpertBank(embedding.outputs, spec.expert_hidden, experts, spec.dropout)
        self.gates = SoftmaxGates(embedding.outputs, visible, spec.tied_gate)
        self.towers = Towers(self.experts.units, spec.tower_hidden, objectives, spec.dropout)

    def forward(self, categorical: Tensor, bags: Tensor, numeric: Tensor) -> Tensor:
        x = self.embedding(categorical, bags, numeric)  # [B, inputs]
        heard = combine(self.gates(x), self.experts(x))  # [T, B, H]
        return self.towers(heard)

    @torch.no_grad()
    def gate_weights(self, categorical: Tensor, bags: Tensor, numeric: Tensor) -> Tensor:
        """The gates' distribution over experts: [B, T, E]."""
        return self.gates(self.embedding(categorical, bags, numeric))

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
