"""The one layer that every model is made of: experts, and gates that weigh them for each output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtl_ranker.models.embedding import RowInput
from mtl_ranker.models.experts import BANKS, MultilayerBank, read_streams
from mtl_ranker.models.gates import (
    FixedGates,
    GateOutput,
    SoftmaxGates,
    StitchGates,
    TopKGates,
    combine,
    imbalance,
)

Mask = tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class LayerSpec:
    """The wiring of one layer of E experts and O outputs.

    Attributes:
        visible: [O][E], which experts output o may use.
        reads: [E], which stream expert e reads; a first layer has one stream, the row.
        hidden: units of the experts' layers; the last is H.
        gate: softmax, tied (one for all), top_k (noisy), or stitch (constants).
        gate_reads: [O], which stream the gate of output o reads; empty: the row.
        native: [O][E], the experts of an output's own, added with learned weights (AdaTT).
        kinds: kind of each expert in turn: mlp, cross, fm or tucker.
        groups: patterns of features that each expert in turn sees; empty: all.
        top_k: experts a row, of gate = top_k.
        gate_dropout: see SoftmaxGates.
    """

    visible: Mask
    reads: tuple[int, ...]
    hidden: tuple[int, ...] = (64,)
    gate: str = "softmax"
    gate_reads: tuple[int, ...] = ()
    native: Mask = ()
    kinds: tuple[str, ...] = ("mlp",)
    groups: tuple[tuple[str, ...], ...] = ()
    top_k: int = 0
    gate_dropout: float = 0.0

    @property
    def experts(self) -> int:
        return len(self.reads)


class LayerOutput(NamedTuple):
    """Outputs [O, K, H, B] ([1, K, H, B] where all are the same), experts [E, K, H, B], gates."""

    outputs: Tensor
    experts: Tensor
    gates: GateOutput


class MixtureLayer(nn.Module):
    """E experts and O gated outputs (Ma et al., KDD 2018, eq. 6), wired by a LayerSpec.

    Args:
        spec: the wiring.
        inputs: width of what the experts read.
        gate_inputs: width of what the gates read.
        dropout: on the experts' units.
        members: K of an ensemble inside the network; only a first layer makes it.
        mask: [E, inputs] booleans, which inputs each expert sees.

    Shape: rows x or streams [S, K, inputs, B] → outputs [O, K, H, B].
    """

    order: Tensor
    native_mask: Tensor

    def __init__(
        self,
        spec: LayerSpec,
        inputs: int,
        gate_inputs: int,
        dropout: float = 0.0,
        members: int = 1,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.members = members
        kinds = [spec.kinds[e % len(spec.kinds)] for e in range(spec.experts)]
        self.banks = nn.ModuleList()
        order: list[int] = []
        for kind in dict.fromkeys(kinds):
            chosen = [e for e, own in enumerate(kinds) if own == kind]
            order += chosen
            settings: dict[str, Any] = {"mask": mask[chosen]} if mask is not None else {}
            if kind == "mlp" and members > 1:
                settings["members"] = members
            reads = [spec.reads[e] for e in chosen]
            self.banks.append(BANKS[kind](inputs, spec.hidden, reads, dropout, **settings))
        self.register_buffer("order", torch.tensor(order).argsort(), persistent=False)
        visible = torch.tensor(spec.visible, dtype=torch.bool)
        gate_reads = spec.gate_reads or (0,) * len(spec.visible)
        self.gates: nn.Module
        if spec.gate == "stitch":
            self.gates = StitchGates(spec.experts)
        elif bool((visible.sum(1) == 1).all()):
            self.gates = FixedGates(visible)
        elif spec.gate == "top_k":
            self.gates = TopKGates(gate_inputs, visible, gate_reads, spec.top_k, spec.gate_dropout)
        else:
            tied = spec.gate == "tied"
            self.gates = SoftmaxGates(gate_inputs, visible, gate_reads, tied, spec.gate_dropout)
        self.native = None
        if spec.native:
            own = torch.tensor(spec.native, dtype=torch.bool)
            self.register_buffer("native_mask", own, persistent=False)
            # A single native expert is added as it is; of several a combination is learned.
            start = own / own.sum(1, keepdim=True).clamp(min=1)
            learned = bool((own.sum(1) > 1).any())
            self.native = nn.Parameter(start, requires_grad=learned)

    @property
    def units(self) -> int:
        return self.spec.hidden[-1]

    def forward(
        self, x: RowInput | Tensor, row: RowInput, ablated: Sequence[int] = ()
    ) -> LayerOutput:
        """`ablated` experts get no weight; the other weights are scaled up to the same sum."""
        product = None
        if isinstance(x, RowInput) and self._product_in_common():
            product, gates = self._read_once(x)
        else:
            gates = self.gates(x if self.spec.gate_reads else row)
        if ablated:
            gates = GateOutput(ablate(gates.weights, ablated))
        experts = self._experts(x, gates) if product is None else self.banks[0](x, product)
        if isinstance(self.gates, FixedGates) and self.native is None and not ablated:
            alike = self.spec.experts == 1  # every output is this expert
            outputs = experts if alike else read_streams(experts, self.gates.choice)
            return LayerOutput(outputs, experts, gates)
        weights = self.expert_weights(gates, ablated)
        if self.spec.gate == "tied" and self.native is None and self.gates.all_visible:
            weights = weights[:1]  # every output is the same mixture
        return LayerOutput(combine(weights, experts), experts, gates)

    def expert_weights(self, gates: GateOutput, ablated: Sequence[int] = ()) -> Tensor:
        """The weight of each expert in each output: the gate's and the native one (AdaTT).

        Shape: [O, K or 1, E, B or 1].
        """
        if self.native is None:
            return gates.weights
        native = self.native * self.native_mask
        if ablated:
            native = ablate(native.unsqueeze(2), ablated, rescale=False).squeeze(2)
        return gates.weights + native[:, None, :, None]

    def _product_in_common(self) -> bool:
        """Whether experts and gates read the rows with one product; in training, where gradients
        must be divided again, that gains nothing.
        """
        bank = self.banks[0]
        return (
            not torch.is_grad_enabled()
            and type(self.gates) is SoftmaxGates
            and isinstance(bank, MultilayerBank)
            and len(self.banks) == 1
        )

    def _read_once(self, row: RowInput) -> tuple[Tensor, GateOutput]:
        """The experts' first product and the gates, of one product that reads x once."""
        bank, gates = self.banks[0], self.gates
        assert isinstance(bank, MultilayerBank)
        assert isinstance(gates, SoftmaxGates)
        weight, shift = bank.heads()
        own = gates.weight.flatten(0, 1)
        if shift is not None:
            shift = torch.cat([shift, shift.new_zeros(len(own))])
        product = row.project(torch.cat([weight, own]), shift, self)
        made, seen = product.split([len(weight), len(own)])
        return made, gates.of_product(seen)

    def _experts(self, x: RowInput | Tensor, gates: GateOutput) -> Tensor:
        bank = self.banks[0]
        if (
            isinstance(self.gates, TopKGates)
            and self.gates.k < self.spec.experts
            and isinstance(bank, MultilayerBank)
            and len(self.banks) == 1
            and self.members == 1
            and not torch.compiler.is_exporting()  # shapes that depend on the data
        ):
            chosen = (gates.weights[:, 0] > 0).any(0)  # [E, B]
            return bank.of_selected(x, chosen)
        made = [bank(x) for bank in self.banks]
        if len(made) == 1:
            return made[0]
        wide = [m.expand(-1, self.members, -1, -1) for m in made]
        return torch.cat(wide).index_select(0, self.order)

    def imbalance(self, gates: GateOutput) -> Tensor:
        """How unevenly experts are used in this batch: importance and load (Shazeer, eq. 6, 11)."""
        if not isinstance(self.gates, SoftmaxGates):
            return torch.zeros(())
        total = imbalance(gates.weights.sum((1, 3)))
        return total if gates.load is None else total + imbalance(gates.load)


def ablate(weights: Tensor, experts: Sequence[int], rescale: bool = True) -> Tensor:
    """Weights [..., E, B] with some experts at zero, the others scaled up to the same sum."""
    left = torch.ones(weights.shape[-2], 1)
    left[list(experts)] = 0.0
    kept = weights * left
    if not rescale:
        return kept
    return kept * (weights.sum(-2, keepdim=True) / kept.sum(-2, keepdim=True).clamp(min=1e-12))
