"""Experts: banks of networks of the same shape, computed with batched matrix products.

The experts of a model's first layer read the input x of the rows. Those of further layers read
streams, the outputs (mixtures) of the layer below; expert e reads the stream `reads[e]`.

Shapes: E experts, H units of an expert, S streams, B rows in the batch; K members of an ensemble
inside the network (see `MultilayerBank`), 1 without one. From the experts to the towers the batch
is the last dimension: sums over experts and softmaxes of gates then access memory contiguously,
which makes them several times faster than with the batch first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mtl_ranker.models.embedding import RowInput


class MultilayerBank(nn.Module):
    """E multi-layer perceptrons of the same shape (f_i in Ma et al., KDD 2018, eq. 5).

    Expert e computes `relu(W_e x + b_e)` per hidden layer. The first layer is one matrix product of
    the batch with the weights of all experts, and each further layer one batched product. Experts
    start at different random weights.

    With K > 1 members, the first layer of member m is `relu(s_em ⊙ W_e x + b_em)`, with its own
    signs and bias: the output adapter of BatchEnsemble (Wen et al., ICLR 2020) as in TabM
    (Gorishniy et al., ICLR 2025), started at random signs. The members share the product W_e x.

    Args:
        inputs: width of x or of a stream.
        hidden: units of each hidden layer; the last is H.
        reads: [E], which stream each expert reads.
        dropout: on the units of every layer.
        members: K; more than 1 only in a first layer.
        mask: [E, inputs] booleans, which inputs each expert uses; None for all.

    Shape: rows x or streams [S, K, inputs, B] → [E, K, H, B].

    >>> bank = MultilayerBank(inputs=10, hidden=[32, 16], reads=[0] * 8)
    >>> bank(RowInput(torch.randn(4, 6), torch.randn(4, 4))).shape
    torch.Size([8, 1, 16, 4])
    """

    mask: Tensor | None

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        reads: Sequence[int],
        dropout: float = 0.0,
        members: int = 1,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        self.reads = list(reads)
        self.units = widths[-1]
        self.dropout = nn.Dropout(dropout)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, units in zip(widths[:-1], widths[1:], strict=True):
            weight, bias = batched_linear(len(reads), fan_in, units)
            self.weights.append(weight)
            self.biases.append(bias)
        self.register_buffer("mask", mask)
        self.signs = None
        if members > 1:
            shape = (len(reads), members, widths[1], 1)
            self.signs = nn.Parameter(torch.randint(0, 2, shape) * 2.0 - 1.0)
            self.biases[0] = nn.Parameter(self.biases[0][:, None, :, None].repeat(1, members, 1, 1))

    def layer_weights(self) -> list[Tensor]:
        """Weights of each layer: [E, units, fan_in]."""
        weights = list(self.weights)
        if self.mask is not None:
            weights[0] = weights[0] * self.mask.unsqueeze(1)
        return weights

    def heads(self) -> tuple[Tensor, Tensor | None]:
        """The first layer's weights [E·units, inputs], and its biases [E·units] if K = 1."""
        shift = self.biases[0].flatten() if self.signs is None else None
        return self.layer_weights()[0].flatten(0, 1), shift

    def forward(self, x: RowInput | Tensor, product: Tensor | None = None) -> Tensor:
        """`product`: of the rows with `heads()`, if computed already: [E·units, B]."""
        weights = self.layer_weights()
        biases = list(self.biases)
        if isinstance(x, RowInput):
            if product is None:
                product = x.project(*self.heads(), self)
            h = self._first(product)
            weights, biases = weights[1:], biases[1:]
        else:
            h = read_streams(x, self.reads)
        members = h.shape[1]
        h = h.flatten(0, 1)  # [E·K, ·, B]
        for weight, bias in zip(weights, biases, strict=True):
            if members > 1:
                weight, bias = (p.repeat_interleave(members, 0) for p in (weight, bias))
            h = self.dropout(torch.baddbmm(bias.unsqueeze(2), weight, h).relu_())
        return h.unflatten(0, (-1, members))

    def _first(self, product: Tensor) -> Tensor:
        h = product.unflatten(0, (len(self.reads), -1)).unsqueeze(1)  # [E, 1, H, B]
        if self.signs is not None:
            h = torch.addcmul(self.biases[0], h, self.signs)  # [E, K, H, B]
        return self.dropout(functional.relu(h, inplace=torch.is_inference_mode_enabled()))

    def of_selected(self, x: RowInput | Tensor, selected: Tensor) -> Tensor:
        """The same for K = 1, computed only for the selected pairs of expert and row.

        Shape: selected [E, B] booleans → [E, 1, H, B], zero where not selected.
        """
        # [B, I] or [S, B, I]: batch first, since rows are selected.
        rows = x.row() if isinstance(x, RowInput) else x[:, 0].transpose(1, 2)
        expert, row = selected.nonzero(as_tuple=True)  # sorted by expert
        count = selected.sum(1)
        slot = torch.arange(len(expert), device=rows.device) - (count.cumsum(0) - count)[expert]
        capacity = int(count.max()) if len(expert) else 0
        reads = torch.tensor(self.reads, device=rows.device)
        inputs = rows[row] if rows.dim() == 2 else rows[reads[expert], row]
        h = inputs.new_zeros(len(self.reads), capacity, inputs.shape[-1])
        h = h.index_put((expert, slot), inputs)  # [E, capacity, I]
        for weight, bias in zip(self.layer_weights(), self.biases, strict=True):
            h = torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))
            h = self.dropout(h.relu_())
        out = h.new_zeros(len(self.reads), selected.shape[1], self.units)
        return out.index_put((expert, row), h[expert, slot]).transpose(1, 2).unsqueeze(1)

    def distance(self) -> Tensor:
        """Σ_{s<t} ‖θ_s − θ_t‖² over pairs of experts (Duong et al., ACL 2015, eq. 3)."""
        total = self.biases[0].new_zeros(())
        for parameter in (*self.weights, *self.biases):
            centred = parameter - parameter.mean(0, keepdim=True)
            total = total + len(self.reads) * centred.square().sum()
        return total


class TuckerBank(MultilayerBank):
    """Experts whose weights form one low-rank tensor (Yang & Hospedales, ICLR 2017, eq. 6, Tucker).

    W[e] = Σ_abc S[a,b,c] U_out[:,a] U_in[:,b] U_expert[e,c]. With one expert per objective this is
    the tensor-factorisation baseline of Ma et al. (KDD 2018).

    Args:
        rank: greatest rank of the output and the input mode; the expert mode has full rank.

    Shape: as MultilayerBank.

    >>> bank = TuckerBank(inputs=10, hidden=[6], reads=[0, 0], rank=4)
    >>> bank(RowInput(torch.randn(4, 10), torch.randn(4, 0))).shape
    torch.Size([2, 1, 6, 4])
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        reads: Sequence[int],
        dropout: float = 0.0,
        rank: int = 16,
    ) -> None:
        super().__init__(inputs, hidden, reads, dropout)
        self.cores = nn.ParameterList()
        self.modes = nn.ModuleList()
        experts = len(reads)
        for weight in self.weights:
            units, fan_in = weight.shape[1:]
            a, b = min(rank, units), min(rank, fan_in)
            outer = torch.linalg.qr(torch.randn(units, a)).Q
            inner = torch.linalg.qr(torch.randn(fan_in, b)).Q
            # With orthonormal factors the core alone determines the scale of W, here nn.Linear's.
            size = math.sqrt(units / (3 * a * b))
            self.cores.append(nn.Parameter(torch.randn(a, b, experts) * size))
            mix = torch.linalg.qr(torch.randn(experts, experts)).Q
            self.modes.append(nn.ParameterList([outer, inner, mix]))
        self.weights = nn.ParameterList()

    def layer_weights(self) -> list[Tensor]:
        return [
            torch.einsum("abc,oa,ib,ec->eoi", core, *modes.parameters())
            for core, modes in zip(self.cores, self.modes, strict=True)
        ]


class ExpertLayer(nn.Module):
    """One layer of E experts, `relu(W_e h + b_e)`: [E, K, inputs, B] → [E, K, units, B]."""

    def __init__(self, experts: int, inputs: int, units: int, dropout: float) -> None:
        super().__init__()
        self.weight, self.bias = batched_linear(experts, inputs, units)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        h = torch.matmul(self.weight.unsqueeze(1), h) + self.bias[:, None, :, None]
        return self.dropout(h.relu_())


class CrossBank(nn.Module):
    """E low-rank cross networks (DCN-v2, Wang et al., WWW 2021, eq. 2), then a layer to H units.

    x_{l+1} = x_0 ⊙ (U_l V_lᵀ x_l + b_l) + x_l, `relu(W x_L + b)`.

    Args:
        rank: of U and V.
        layers: L.

    Shape: as MultilayerBank, with `hidden[-1]` = H.

    >>> CrossBank(10, [6], reads=[0, 0])(RowInput(torch.randn(4, 7), torch.randn(4, 3))).shape
    torch.Size([2, 1, 6, 4])
    """

    mask: Tensor | None

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        reads: Sequence[int],
        dropout: float = 0.0,
        mask: Tensor | None = None,
        rank: int = 8,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.reads = list(reads)
        experts = len(reads)
        self.down = nn.ParameterList(
            batched_linear(experts, inputs, rank)[0] for _ in range(layers)
        )
        pairs = [batched_linear(experts, rank, inputs) for _ in range(layers)]
        self.up = nn.ParameterList(weight for weight, _ in pairs)
        self.shift = nn.ParameterList(bias for _, bias in pairs)
        self.last = ExpertLayer(experts, inputs, hidden[-1], dropout)
        self.register_buffer("mask", mask)

    def forward(self, x: RowInput | Tensor) -> Tensor:
        start = visible_input(x, self.reads, self.mask)  # [E, K, I, B]
        h = start
        for down, up, shift in zip(self.down, self.up, self.shift, strict=True):
            low = torch.matmul(down.unsqueeze(1), h)  # [E, K, rank, B]
            h = start * (torch.matmul(up.unsqueeze(1), low) + shift[:, None, :, None]) + h
        return self.last(h)


class FactorisationBank(nn.Module):
    """E factorisation machines (Rendle, ICDM 2010, eq. 5), pooled by factor, then a layer to H.

    p = ½ ((xV)² − x² V²) per factor (bi-interaction, He & Chua, SIGIR 2017, eq. 4), then
    `relu(W p + b)`.

    Args:
        factors: columns of V.

    Shape: as MultilayerBank, with `hidden[-1]` = H.

    >>> bank = FactorisationBank(10, [6], reads=[0, 0])
    >>> bank(RowInput(torch.randn(4, 7), torch.randn(4, 3))).shape
    torch.Size([2, 1, 6, 4])
    """

    mask: Tensor | None

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        reads: Sequence[int],
        dropout: float = 0.0,
        mask: Tensor | None = None,
        factors: int = 16,
    ) -> None:
        super().__init__()
        self.reads = list(reads)
        self.factors = nn.Parameter(torch.randn(len(reads), inputs, factors) / math.sqrt(inputs))
        self.last = ExpertLayer(len(reads), factors, hidden[-1], dropout)
        self.register_buffer("mask", mask)

    def forward(self, x: RowInput | Tensor) -> Tensor:
        h = visible_input(x, self.reads, self.mask)  # [E, K, I, B]
        v = self.factors.transpose(1, 2).unsqueeze(1)  # [E, 1, factors, I]
        return self.last((torch.matmul(v, h).square() - torch.matmul(v.square(), h.square())) / 2)


def read_streams(streams: Tensor, reads: Sequence[int]) -> Tensor:
    """The stream that each expert reads: [S, K, I, B] → [E, K, I, B]."""
    if list(reads) == list(range(streams.shape[0])):
        return streams
    if streams.shape[0] == 1:
        return streams.expand(len(reads), -1, -1, -1)
    return streams.index_select(0, torch.tensor(reads, device=streams.device))


def visible_input(x: RowInput | Tensor, reads: Sequence[int], mask: Tensor | None) -> Tensor:
    """The input of each expert, zero where masked: [E, K, I, B]."""
    if isinstance(x, RowInput):
        inputs = x.row().t()[None, None].expand(len(reads), -1, -1, -1)
    else:
        inputs = read_streams(x, reads)
    return inputs if mask is None else inputs * mask[:, None, :, None]


def batched_linear(networks: int, fan_in: int, units: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights [networks, units, fan_in] and biases [networks, units], initialised as nn.Linear."""
    bound = 1.0 / math.sqrt(fan_in)
    weight = torch.empty(networks, units, fan_in).uniform_(-bound, bound)
    bias = torch.empty(networks, units).uniform_(-bound, bound)
    return nn.Parameter(weight), nn.Parameter(bias)


BANKS = {
    "mlp": MultilayerBank,
    "tucker": TuckerBank,
    "cross": CrossBank,
    "fm": FactorisationBank,
}
