"""The layer of which every model consists: experts, and a gated mixture of them for each output."""

from __future__ import annotations

from collections.abc import Sequence
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
from mtl_ranker.models.spec import LayerSpec


class LayerOutput(NamedTuple):
    """What a layer computes.

    Attributes:
        outputs: mixtures [O, K, H, B]; [1, K, H, B] where all are the same.
        experts: outputs of the experts [E, K, H, B].
        gates: gate weights.
    """

    outputs: Tensor
    experts: Tensor
    gates: GateOutput


class MixtureLayer(nn.Module):
    """E experts and O outputs, each a gated mixture of them (Ma et al., KDD 2018, eq. 6).

    Args:
        inputs: width of the experts' input.
        gate_inputs: width of the gates' input.
        dropout: on the experts' units.
        members: K members of an ensemble inside the network, for a first layer.
        mask: [E, inputs] booleans, which inputs each expert uses.

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
            chosen = [e for e in range(spec.experts) if kinds[e] == kind]
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
            native = torch.tensor(spec.native, dtype=torch.bool)
            self.register_buffer("native_mask", native, persistent=False)
            # A single native expert has weight 1; the weights of several are learned.
            start = native / native.sum(1, keepdim=True).clamp(min=1)
            learned = bool((native.sum(1) > 1).any())
            self.native = nn.Parameter(start, requires_grad=learned)

    @property
    def units(self) -> int:
        return self.spec.hidden[-1]

    def forward(
        self, x: RowInput | Tensor, row: RowInput, ablated: Sequence[int] = ()
    ) -> LayerOutput:
        """One pass.

        Args:
            x: input of the experts: rows or streams.
            row: input of the gates where `spec.gate_reads` is empty.
            ablated: experts whose weights are set to 0; the other gate weights are scaled up to
                the same sum.
        """
        product = None
        if isinstance(x, RowInput) and self._shares_product():
            product, gates = self._shared_product(x)
        else:
            gates = self.gates(x if self.spec.gate_reads else row)
        if ablated:
            gates = GateOutput(ablate(gates.weights, ablated))
        experts = self._experts(x, gates) if product is None else self.banks[0](x, product)
        if isinstance(self.gates, FixedGates) and self.native is None and not ablated:
            single = self.spec.experts == 1  # every output is this expert
            outputs = experts if single else read_streams(experts, self.gates.choice)
            return LayerOutput(outputs, experts, gates)
        weights = self.expert_weights(gates, ablated)
        if self.spec.gate == "tied" and self.native is None and self.gates.all_visible:
            weights = weights[:1]  # every output is the same mixture
        return LayerOutput(combine(weights, experts), experts, gates)

    def expert_weights(self, gates: GateOutput, ablated: Sequence[int] = ()) -> Tensor:
        """Expert weights: gate weights plus, in AdaTT, the native weights.

        Shape: [O, K or 1, E, B or 1].
        """
        if self.native is None:
            return gates.weights
        native = self.native * self.native_mask
        if ablated:
            native = ablate(native.unsqueeze(2), ablated, rescale=False).squeeze(2)
        return gates.weights + native[:, None, :, None]

    def _shares_product(self) -> bool:
        """Whether experts and gates multiply the rows in one product.

        In training that gains nothing, since the gradients are divided again.
        """
        bank = self.banks[0]
        return (
            not torch.is_grad_enabled()
            and type(self.gates) is SoftmaxGates
            and isinstance(bank, MultilayerBank)
            and len(self.banks) == 1
        )

    def _shared_product(self, row: RowInput) -> tuple[Tensor, GateOutput]:
        """The experts' first product [E·units, B] and the gate weights, from one product."""
        bank, gates = self.banks[0], self.gates
        assert isinstance(bank, MultilayerBank)
        assert isinstance(gates, SoftmaxGates)
        weight, shift = bank.heads()
        gate_weight = gates.weight.flatten(0, 1)
        if shift is not None:
            shift = torch.cat([shift, shift.new_zeros(len(gate_weight))])
        product = row.project(torch.cat([weight, gate_weight]), shift, self)
        of_experts, of_gates = product.split([len(weight), len(gate_weight)])
        return of_experts, gates.of_product(of_gates)

    def _experts(self, x: RowInput | Tensor, gates: GateOutput) -> Tensor:
        """Outputs of the experts [E, K, H, B]; with top-k gates zero where no gate uses them."""
        bank = self.banks[0]
        if (
            isinstance(self.gates, TopKGates)
            and self.gates.k < self.spec.experts
            and isinstance(bank, MultilayerBank)
            and len(self.banks) == 1
            and self.members == 1
            and not torch.compiler.is_exporting()  # shapes that depend on the data
        ):
            selected = (gates.weights[:, 0] > 0).any(0)  # [E, B]
            return bank.of_selected(x, selected)
        outputs = [bank(x) for bank in self.banks]
        if len(outputs) == 1:
            return outputs[0]
        expanded = [output.expand(-1, self.members, -1, -1) for output in outputs]
        return torch.cat(expanded).index_select(0, self.order)

    def imbalance(self, gates: GateOutput) -> Tensor:
        """How unevenly experts are used in this batch: importance and load.

        Shazeer et al., ICLR 2017, eq. 6 and 11.
        """
        if not isinstance(self.gates, SoftmaxGates):
            return gates.weights.new_zeros(())
        total = imbalance(gates.weights.sum((1, 3)))
        return total if gates.load is None else total + imbalance(gates.load)


def ablate(weights: Tensor, experts: Sequence[int], rescale: bool = True) -> Tensor:
    """Weights [..., E, B] with these experts at zero; `rescale`: the others at the same sum."""
    mask = weights.new_ones(weights.shape[-2], 1)
    mask[list(experts)] = 0.0
    kept = weights * mask
    if not rescale:
        return kept
    return kept * (weights.sum(-2, keepdim=True) / kept.sum(-2, keepdim=True).clamp(min=1e-12))
