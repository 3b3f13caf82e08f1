"""The multi-task ranker: embedding → mixture layers → towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtl_ranker.models.embedding import FeatureEmbedding, RowInput
from mtl_ranker.models.experts import MultilayerBank
from mtl_ranker.models.gates import GateOutput, per_row
from mtl_ranker.models.mixture import MixtureLayer
from mtl_ranker.models.spec import RankerSpec
from mtl_ranker.models.towers import PositionBias, Towers

# Parts of names of parameters that are no matrix products, whatever their shape.
NO_MATRICES = ("embedding.table", "position_bias", "steps", "biases", "recency", "native")
CACHED_FLOATS = 1 << 19  # 2 MiB
ACCELERATOR_ROWS = 1 << 17  # of a block; some 3 GB of activations of a wide model


class Trace(NamedTuple):
    """What one forward pass computes.

    Attributes:
        logits: [K, B, T].
        gates: gate weights of each layer.
        experts: for each layer, the outputs of its experts [E, K, H, B].
    """

    logits: Tensor
    gates: list[GateOutput]
    experts: list[Tensor]


class Ranker(nn.Module):
    """A multi-task ranker of the family that Ma et al. (KDD 2018) compare.

    f^k(x) = Σ_i g^k(x)_i f_i(x) and y_k = h^k(f^k(x)) (eq. 5 to 7): experts f_i, gate weights g^k,
    the mixture f^k and the tower h^k of objective k. The specification defines the experts, which
    of them each output uses, and how layers are stacked.

    Args:
        embedding: of the encoded rows.
        positions: P, number of positions for which a bias is trained; 0 without positions.
        cutpoints: for ordinal objectives, the highest number of levels minus 1; else 0.
        position_dropout: see PositionBias.

    Shape: categorical [B, C], bags [B, slots], numeric [B, F] → logits [K, B, T]. The model's
    prediction is the mean over K members (1 without an ensemble).
    """

    def __init__(
        self,
        spec: RankerSpec,
        embedding: FeatureEmbedding,
        positions: int = 0,
        cutpoints: int = 0,
        position_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.positions = positions
        self.embedding = embedding
        self.layers = nn.ModuleList()
        width = embedding.outputs
        for depth, layer in enumerate(spec.layers):
            mask = None
            if spec.unshared:
                parts = range(spec.objectives)
                mask = torch.stack([embedding.columns_of_part(t, len(parts)) for t in parts])
            elif layer.groups:
                groups = [layer.groups[e % len(layer.groups)] for e in range(layer.experts)]
                mask = torch.stack([embedding.columns_of(group) for group in groups])
            gate_inputs = width if layer.gate_reads else embedding.outputs
            members = spec.members if depth == 0 else 1
            self.layers.append(MixtureLayer(layer, width, gate_inputs, spec.dropout, members, mask))
            width = layer.hidden[-1]
        self.towers = Towers(width, spec.tower_hidden, spec.objectives, spec.dropout, spec.members)
        self.position_bias = (
            PositionBias(positions, spec.objectives, position_dropout) if positions else None
        )
        # Ascending by construction: the first cut point, and positive steps to the next ones.
        self.steps = nn.Parameter(torch.zeros(spec.objectives, cutpoints)) if cutpoints else None

    def forward(
        self,
        categorical: Tensor,
        bags: Tensor,
        numeric: Tensor,
        position: Tensor | None = None,
    ) -> Tensor:
        return self.trace(categorical, bags, numeric, position).logits

    def trace(
        self,
        categorical: Tensor,
        bags: Tensor,
        numeric: Tensor,
        position: Tensor | None = None,
        ablated: Mapping[int, Sequence[int]] | None = None,
    ) -> Trace:
        """Logits with the gate weights and experts of each layer.

        Args:
            ablated: layer → experts whose weights are set to 0 (see `MixtureLayer.forward`).
        """
        return self.trace_row(self.embedding(categorical, bags, numeric), position, ablated)

    def trace_row(
        self,
        row: RowInput,
        position: Tensor | None = None,
        ablated: Mapping[int, Sequence[int]] | None = None,
    ) -> Trace:
        """The same for embedded rows."""
        x: RowInput | Tensor = row
        gates: list[GateOutput] = []
        experts: list[Tensor] = []
        for depth, layer in enumerate(self.layers):
            output = layer(x, row, (ablated or {}).get(depth, ()))
            gates.append(output.gates)
            experts.append(output.experts)
            x = output.outputs  # [O, K, H, B]
        logits = self.towers.of_rows(row) if isinstance(x, RowInput) else self.towers(x)
        if self.position_bias is not None and position is not None:
            logits = logits + self.position_bias(position)
        return Trace(logits, gates, experts)

    @property
    def device(self) -> torch.device:
        return self.embedding.table.weight.device

    @property
    def block_rows(self) -> int:
        """Rows per block and core for fast prediction: the widest layer's outputs fit the cache.

        Other devices than the CPU take one block of `ACCELERATOR_ROWS` at a time.
        """
        if self.device.type != "cpu":
            return ACCELERATOR_ROWS
        widest = max(
            (layer.experts * max(layer.hidden) * self.spec.members for layer in self.spec.layers),
            default=self.embedding.outputs,
        )
        return min(4_096, max(256, CACHED_FLOATS // widest // 128 * 128))

    def penalty(self, trace: Trace) -> Tensor:
        """Penalties of the specification: on unevenly used experts and on their distance."""
        total = trace.logits.new_zeros(())
        if self.spec.balance > 0:
            for layer, gates in zip(self.layers, trace.gates, strict=True):
                total = total + self.spec.balance * layer.imbalance(gates)  # type: ignore[operator]
        if self.spec.l2_weight > 0:
            for module in self.modules():
                if isinstance(module, MultilayerBank):
                    total = total + self.spec.l2_weight * module.distance()
        return total

    @property
    def cutpoints(self) -> Tensor | None:
        """Ascending cut points of ordinal objectives: [T, levels - 1], or None."""
        if self.steps is None:
            return None
        rise = torch.nn.functional.softplus(self.steps[:, 1:])
        return torch.cat([self.steps[:, :1], rise], 1).cumsum(1)

    def expert_weights(self, categorical: Tensor, bags: Tensor, numeric: Tensor) -> list[Tensor]:
        """Expert weights of each layer: gate weights plus AdaTT's native weights.

        Shape: for each layer [B, O, E], the mean over members.
        """
        with torch.no_grad():
            trace = self.trace(categorical, bags, numeric)
            return [
                per_row(layer.expert_weights(gates), len(categorical))  # type: ignore[operator]
                for layer, gates in zip(self.layers, trace.gates, strict=True)
            ]

    def objective_axes(self) -> dict[str, int]:
        """For `unshared` objectives: the axis along which each parameter is divided among them."""
        by_column = ("embedding.table", "position_bias")
        return {n: int(n.startswith(by_column)) for n, _ in self.named_parameters()}

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters below the towers, which the objectives share; without a sparse table.

        A sparse table is left out because gradients are concatenated (see balancing.py).
        """
        shared = [self.layers] if self.embedding.sparse else [self.embedding, self.layers]
        return [p for module in shared for p in module.parameters() if p.requires_grad]

    def matrices(self) -> list[nn.Parameter]:
        """The trained matrices: not embeddings, biases, cut points or constant expert weights."""
        return [
            parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
            and parameter.dim() >= 2
            and not any(part in name for part in NO_MATRICES)
        ]

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
