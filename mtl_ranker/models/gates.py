"""Gates: the weight of each expert in each output of a layer.

A softmax gate's outputs are the gate weights. With AdaTT's native weights added they are the expert
weights, and the sum of the experts' outputs with these weights is the mixture that an output of the
layer is (mixture.py).

Shapes: O outputs and gates, E experts, H units of an expert, S streams, K members, B rows in the
batch. A dimension "K or 1" is 1 where the gates of all members are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtl_ranker.models.embedding import RowInput
from mtl_ranker.models.experts import batched_linear, read_streams


class GateOutput(NamedTuple):
    """Gate weights.

    Attributes:
        weights: [O, K or 1, E, B or 1].
        load: [O, E], expected number of rows per expert under the noise of top-k gates, or None.
    """

    weights: Tensor
    load: Tensor | None = None


class SoftmaxGates(nn.Module):
    """One softmax gate per output, g^k(x) = softmax(W_gk x) (Ma et al., KDD 2018, eq. 7).

    Args:
        inputs: width of x or of a stream.
        visible: [O, E] booleans, which experts each output may use.
        reads: [O], which stream each gate reads; ignored where gates read the rows.
        tied: all outputs share one gate (OMoE, eq. 5).
        dropout: probability that a gate drops an expert for a row, in training.

    Shape: rows x or streams [S, K, inputs, B] → gate weights [O, K or 1, E, B], whose sum over E
    is 1.

    >>> gates = SoftmaxGates(10, torch.ones(2, 4, dtype=torch.bool), reads=[0, 0])
    >>> weights = gates(RowInput(torch.randn(3, 10), torch.randn(3, 0))).weights
    >>> weights.shape, weights.sum(2).allclose(torch.ones(2, 1, 3))
    (torch.Size([2, 1, 4, 3]), True)
    """

    visible: Tensor

    def __init__(
        self,
        inputs: int,
        visible: Tensor,
        reads: Sequence[int],
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.outputs, self.experts = visible.shape
        self.reads = list(reads[:1] if tied else reads)
        self.register_buffer("visible", visible)
        self.all_visible = bool(visible.all())
        self.dropout = dropout
        self.weight = batched_linear(len(self.reads), inputs, self.experts)[0]  # [G, E, inputs]

    def logits(self, x: RowInput | Tensor, weight: Tensor) -> Tensor:
        """W x for each of G gates (1 if tied, else O): [G, K or 1, E, B]."""
        if isinstance(x, RowInput):
            return self._of_gates(x.project(weight.flatten(0, 1), reader=self))
        return torch.matmul(weight.unsqueeze(1), read_streams(x, self.reads))

    def _of_gates(self, product: Tensor) -> Tensor:
        return product.unflatten(0, (-1, self.experts)).unsqueeze(1)

    def weigh(self, logits: Tensor) -> GateOutput:
        """Gate weights from logits [G, K or 1, E, B]."""
        weights = torch.softmax(self.mask(logits), 2)
        return GateOutput(weights.expand(self.outputs, -1, -1, -1))

    def of_product(self, product: Tensor) -> GateOutput:
        """The same as `forward`, from the product of the weight with the rows: [G·E, B]."""
        return self.weigh(self._of_gates(product))

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [O, K or 1, E, B], minus infinity where an expert is not visible or dropped."""
        hidden = ~self.visible[:, None, :, None]  # [O, 1, E, 1]
        if self.training and self.dropout > 0:
            dropped = torch.rand_like(logits) < self.dropout
            nothing_left = (dropped | hidden).all(2, keepdim=True)
            hidden = hidden | (dropped & ~nothing_left)
        elif self.all_visible:
            return logits.expand(self.outputs, -1, -1, -1)
        return logits.masked_fill(hidden, float("-inf"))

    def forward(self, x: RowInput | Tensor) -> GateOutput:
        return self.weigh(self.logits(x, self.weight))


class TopKGates(SoftmaxGates):
    """Noisy top-k gates, which use k experts per row (Shazeer et al., ICLR 2017, eq. 3 to 5).

    H(x)_i = (W_g x)_i + N(0, 1) · softplus((W_noise x)_i); G(x) = softmax(KeepTopK(H(x), k)).
    In evaluation mode there is no noise, H(x) = W_g x. Both weights start at zero, as in the paper.

    Shape: as SoftmaxGates; exactly k gate weights per row are above zero. In training, `load` is
    the probability that an expert is kept under resampled noise, summed over rows (appendix A,
    eq. 8 to 10).

    >>> gates = TopKGates(10, torch.ones(1, 4, dtype=torch.bool), reads=[0], k=2)
    >>> weights = gates(RowInput(torch.randn(3, 10), torch.randn(3, 0))).weights
    >>> (weights > 0).sum(2).tolist()
    [[[2, 2, 2]]]
    """

    def __init__(
        self, inputs: int, visible: Tensor, reads: Sequence[int], k: int, dropout: float = 0.0
    ) -> None:
        super().__init__(inputs, visible, reads, dropout=dropout)
        self.k = k
        self.noise = nn.Parameter(torch.zeros_like(self.weight))
        nn.init.zeros_(self.weight)

    def forward(self, x: RowInput | Tensor) -> GateOutput:
        clean = self.logits(x, self.weight)
        load = None
        if self.training:
            spread = nn.functional.softplus(self.logits(x, self.noise)) + 1e-2
            noisy = self.mask(clean + torch.randn_like(clean) * spread)
            load = self._load(clean, spread, noisy)
        else:
            noisy = self.mask(clean)
        kept = noisy.topk(min(self.k, self.experts), 2)
        others = torch.full_like(noisy, float("-inf"))
        return GateOutput(torch.softmax(others.scatter(2, kept.indices, kept.values), 2), load)

    def _load(self, clean: Tensor, spread: Tensor, noisy: Tensor) -> Tensor | None:
        if self.k >= self.experts:
            return None
        top = noisy.topk(self.k + 1, 2).values
        last_kept, first_dropped = top[:, :, self.k - 1 : self.k], top[:, :, self.k : self.k + 1]
        # The k-th greatest among the other experts: an expert above it is kept.
        threshold = torch.where(noisy >= last_kept, first_dropped, last_kept)
        probability = torch.special.ndtr(((clean - threshold) / spread).clamp(-10.0, 10.0))
        return (probability * self.visible[:, None, :, None]).sum((1, 3))


class StitchGates(nn.Module):
    """Learned constants: x̃_t = Σ_s α_ts x_s (cross-stitch, Misra et al., CVPR 2016, eq. 1).

    Args:
        experts: E, as many as outputs. α_tt starts at 0.9, the others at 0.1 / (E - 1).

    Shape: rows or streams → gate weights [E, 1, E, 1], the same for every row.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        identity = torch.eye(experts)
        others = (1.0 - identity) * (0.1 / max(experts - 1, 1))
        self.weight = nn.Parameter(0.9 * identity + others if experts > 1 else identity)

    def forward(self, x: RowInput | Tensor) -> GateOutput:
        return GateOutput(self.weight[:, None, :, None])


class FixedGates(nn.Module):
    """Each output uses its only visible expert (single-task, shared-bottom).

    Attributes:
        choice: [O], the expert of each output.

    Shape: rows or streams → gate weights [O, 1, E, 1], zeros and ones.
    """

    visible: Tensor

    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        self.register_buffer("visible", visible)
        self.choice: list[int] = visible.int().argmax(1).tolist()

    def forward(self, x: RowInput | Tensor) -> GateOutput:
        return GateOutput(self.visible[:, None, :, None].float())


def combine(weights: Tensor, experts: Tensor) -> Tensor:
    """The mixture of each output, f^k(x) = Σ_i g^k(x)_i f_i(x) (Ma et al., eq. 6).

    Args:
        weights: expert weights [O, K or 1, E, B or 1].
        experts: outputs of the experts [E, K, H, B].

    Returns the mixtures [O, K, H, B].

    >>> combine(torch.full((2, 1, 4, 3), 0.25), torch.ones(4, 1, 8, 3)).shape
    torch.Size([2, 1, 8, 3])
    """
    if torch.compiler.is_compiling():  # it fuses the product with the sum itself
        return (weights.transpose(1, 2).unsqueeze(3) * experts.unsqueeze(0)).sum(1)
    return Combination.apply(weights, experts)


class Combination(torch.autograd.Function):
    """`combine` one expert at a time, into one result of [O, K, H, B].

    The products [O, E, K, H, B] of all experts exist neither in the forward pass nor, for their
    gradient, in the backward pass. Under `torch.vmap` replicas are further members.
    """

    @staticmethod
    def forward(weights: Tensor, experts: Tensor) -> Tensor:
        total = weights[:, :, 0].unsqueeze(2) * experts[0]
        for e in range(1, len(experts)):
            total.addcmul_(weights[:, :, e].unsqueeze(2), experts[e].unsqueeze(0))
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weights, experts = ctx.saved_tensors
        of_weights = of_experts = None
        if ctx.needs_input_grad[0]:
            each = [(gradient * expert).sum(2) for expert in experts]  # of [O, K, B]
            of_weights = torch.stack(each, 2).sum_to_size(weights.shape).to(weights.dtype)
        if ctx.needs_input_grad[1]:
            by_expert = weights.transpose(1, 2).unsqueeze(3)  # [O, E, K or 1, 1, B or 1]
            of_experts = by_expert[0] * gradient[0]
            for o in range(1, len(gradient)):
                of_experts.addcmul_(by_expert[o], gradient[o].unsqueeze(0))
            of_experts = of_experts.to(experts.dtype)
        return of_weights, of_experts

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], weights: Tensor, experts: Tensor
    ) -> tuple[Tensor, int]:
        replicas = info.batch_size
        weights, experts = (
            t.unsqueeze(1).expand(-1, replicas, *t.shape[1:]) if dim is None else t.movedim(dim, 1)
            for t, dim in ((weights, in_dims[0]), (experts, in_dims[1]))
        )  # [O, R, K or 1, E, B or 1] and [E, R, K, H, B]
        weights = weights.expand(-1, -1, experts.shape[2], -1, -1)
        mixture = Combination.apply(weights.flatten(1, 2), experts.flatten(1, 2))
        return mixture.unflatten(1, (replicas, -1)), 1


def imbalance(amount: Tensor) -> Tensor:
    """Squared coefficient of variation over experts (Shazeer et al., eq. 7), mean over outputs.

    Shape: amounts [O, E], such as sums of gate weights → scalar.

    >>> float(imbalance(torch.tensor([[2.0, 2.0]]))), float(imbalance(torch.tensor([[4.0, 0.0]])))
    (0.0, 1.0)
    """
    mean = amount.mean(-1)
    return (amount.var(-1, unbiased=False) / mean.square().clamp(min=1e-10)).mean()


def per_row(weights: Tensor, rows: int) -> Tensor:
    """Weights with the rows first, the mean over members: [O, K or 1, E, B or 1] → [B, O, E].

    >>> per_row(torch.ones(2, 1, 3, 1), rows=5).shape
    torch.Size([5, 2, 3])
    """
    return weights.mean(1).expand(-1, -1, rows).permute(2, 0, 1)
