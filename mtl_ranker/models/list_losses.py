"""Losses on the order of a list's rows, beside the loss of each row (models/objectives.py).

Each is chosen per binary objective (`Task.list_loss`) and added to its cross-entropy with
`Task.list_weight`. The rows of a list are what was served together (features/lists.py). Time and
memory are linear in the rows, of pairs in the pairs of one list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mtl_ranker.models.objectives import Task, chain_log_probability

MOST_PAIRS = 1 << 20  # of a batch; with more, each positive meets evenly spaced negatives
SMALLEST = 1e-30  # sum of a list whose rows have no weight


@dataclass(frozen=True)
class _Rows:
    """The n labelled rows of one objective in a batch.

    Attributes:
        z: [..., n], log-odds.
        positive: [n] booleans.
        weight: [n].
        lists: [n], the row's list as a number below `count`.
        total: weight of all rows of the batch, labelled or not.
    """

    z: Tensor
    positive: Tensor
    weight: Tensor
    lists: Tensor
    count: int
    total: Tensor

    def log_sum(self, values: Tensor) -> Tensor:
        """log Σ w exp(v) over each row's list: [..., n], of values [..., n]."""
        index = self.lists.expand_as(values)
        top = values.new_full((*values.shape[:-1], self.count), -torch.inf)
        top = top.scatter_reduce(-1, index, values.detach(), "amax")
        terms = self.weight * torch.exp(values - top.gather(-1, index))
        sums = torch.zeros_like(top).scatter_add(-1, index, terms)
        return (sums.clamp(min=SMALLEST).log() + top).gather(-1, index)

    def mean(self, terms: Tensor) -> Tensor:
        """The weighted mean of terms [..., n] over labelled rows and leading dimensions."""
        return (self.weight * terms).sum(-1).mean() / self.weight.sum().clamp(min=1e-12)


def pair_loss(rows: _Rows) -> Tensor:
    """RankNet's loss on pairs of one list (Burges et al., ICML 2005, eq. 3).

    Σ w_i w_j log(1 + exp(z_j − z_i)) over pairs of a positive i and a negative j of the same list,
    divided by Σ w over the batch's rows.
    """
    better, worse = _pairs(rows)
    if not len(better):
        return rows.z.new_zeros(())
    each = functional.softplus(rows.z[..., worse] - rows.z[..., better])
    summed = (each * (rows.weight[better] * rows.weight[worse])).sum(-1).mean()
    return summed / rows.total.clamp(min=1e-12)


def _pairs(rows: _Rows) -> tuple[Tensor, Tensor]:
    """Row numbers of the positive and the negative of every pair of one list."""
    positive = rows.positive.nonzero().squeeze(1)
    negative = (~rows.positive).nonzero().squeeze(1)
    negative = negative[rows.lists[negative].argsort(stable=True)]  # runs of one list
    in_list = torch.bincount(rows.lists[negative], minlength=rows.count)
    start = in_list.cumsum(0) - in_list
    partners = in_list[rows.lists[positive]]
    first = start[rows.lists[positive]] - (partners.cumsum(0) - partners)
    better = positive.repeat_interleave(partners)
    place = torch.arange(len(better), device=better.device) + first.repeat_interleave(partners)
    return better, negative[place]


def rcr_loss(rows: _Rows) -> Tensor:
    """The list term of regression compatible ranking (Bai et al., arXiv 2211.01494, section 4).

    Mean over rows of −y log(p / Σ p of the list), with p = σ(z). Labels are not divided by their
    sum in the list: the expectation of a list's terms is then lowest where p is proportional to
    P(y = 1), which the minimiser of the cross-entropy is.
    """
    log_p = functional.logsigmoid(rows.z)
    return rows.mean(rows.positive * (rows.log_sum(log_p) - log_p))


def jrc_loss(rows: _Rows) -> Tensor:
    """The generative term of joint ranking and calibration (Sheng et al., KDD 2023, eq. 7).

    Mean over rows of −log(exp f(x)[y] / Σ exp f(x')[y] over the list), for the row's label y. The
    network has one logit z for an objective, so f(x)[1] = z / 2 and f(x)[0] = −z / 2; the paper's
    network has two, whose difference is z.
    """
    half = rows.z / 2
    own = torch.where(rows.positive, half, -half)
    among = torch.where(rows.positive, rows.log_sum(half), rows.log_sum(-half))
    return rows.mean(among - own)


def combined_pair_loss(rows: _Rows) -> Tensor:
    """RankNet's loss on pairs of the whole batch (Lin et al., KDD 2024, eq. 5: Combined-Pair).

    The weighted mean of log(1 + exp(z_j − z_i)) over all pairs of a positive i and a negative j,
    for objectives so rare that few lists have both labels.
    """
    positive = rows.positive.nonzero().squeeze(1)
    negative = (~rows.positive).nonzero().squeeze(1)
    if not len(positive) or not len(negative):
        return rows.z.new_zeros(())
    step = min(-(-len(positive) * len(negative) // MOST_PAIRS), len(negative))
    device = rows.z.device
    spaced = torch.arange(0, len(negative) - step + 1, step, device=device)
    offset = torch.arange(len(positive), device=device).unsqueeze(1) % step
    worse = negative[offset + spaced]  # [P, m]
    each = functional.softplus(rows.z[..., worse] - rows.z[..., positive].unsqueeze(-1))
    weight = rows.weight[positive].unsqueeze(1) * rows.weight[worse]
    return (each * weight).sum((-2, -1)).mean() / weight.sum().clamp(min=1e-12)


LIST_LOSSES: dict[str, Callable[[_Rows], Tensor]] = {
    "pairs": pair_loss,
    "rcr": rcr_loss,
    "jrc": jrc_loss,
    "combined_pair": combined_pair_loss,
}
WITHIN_LISTS = ("pairs", "rcr", "jrc")


def needs_lists(tasks: Sequence[Task]) -> bool:
    """Whether an objective's loss compares rows of one list, which a batch must hold together."""
    return any(task.list_loss in WITHIN_LISTS for task in tasks)


def list_losses(
    logits: Tensor,
    labels: Tensor,
    lists: Tensor | None,
    tasks: Sequence[Task],
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Each objective's list loss (`Task.list_loss`), 0 for objectives without: [T].

    A row of weight 2 counts as two rows. With `conditional_on`, the log-odds are those of the
    chain's probability. The mean over leading dimensions.

    Args:
        logits: [..., B, T].
        labels: [B, T]; rows with a missing label (NaN) do not count. A label y between 0 and 1 is a
            positive of weight y and a negative of weight 1 − y.
        lists: [B] integers, equal for rows of the same list; None makes one list of each row.
        sample_weight: [B], or None for 1.
    """
    if any(task.conditional_on for task in tasks):
        log_p, log_not = chain_log_probability(logits, tasks)
        logits = log_p - log_not
    weight = logits.new_ones(len(labels)) if sample_weight is None else sample_weight
    codes = torch.arange(len(labels), device=labels.device)
    if lists is not None:
        codes = torch.unique(lists, return_inverse=True)[1]
    by_task = []
    for t, task in enumerate(tasks):
        y = labels[:, t]
        known = (~torch.isnan(y)).nonzero().squeeze(1)
        if task.list_loss is None or not len(known):
            by_task.append(logits.new_zeros(()))
            continue
        soft = ((y > 0) & (y < 1)).nonzero().squeeze(1)
        share = torch.where((y > 0) & (y < 1), y, torch.ones_like(y))
        known = torch.cat([known, soft])
        own = torch.cat([share[known[: len(known) - len(soft)]], 1 - y[soft]])
        positive = y[known] > 0
        positive[len(known) - len(soft) :] = False
        rows = _Rows(
            z=logits[..., known, t],
            positive=positive,
            weight=weight[known] * own,
            lists=codes[known],
            count=len(labels),
            total=weight.sum(),
        )
        by_task.append(LIST_LOSSES[task.list_loss](rows))
    return torch.stack(by_task)
