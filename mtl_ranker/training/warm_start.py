"""Continue a training from the weights and the optimisers' moments of an earlier one.

Parameters are matched by name, rows of the table of embeddings by the values that they belong to. A
categorical value that the earlier encoder lacks starts with the row of its field's unknown value,
which it had until then, so that predictions start as they were. In a list such values were skipped;
there a new one starts at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, SparseAdam

from mtl_ranker.features.encoders import Encoder
from mtl_ranker.models.embedding import table_layout
from mtl_ranker.models.ranker import Ranker

TABLE = "embedding.table.weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, with the shape of their parameter
RANDOM = -1  # in place of a row of the earlier table
STEP = "step"  # of Adam, a number per parameter


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Where a training continues from.

    Attributes:
        encoder: of the rows that the weights were trained on.
        weights: name → tensor, of `Ranker.state_dict`.
        positions: number of positions with a bias.
        moments: of `moments_of`; None to start with empty optimisers.
    """

    encoder: Encoder
    weights: Mapping[str, Tensor]
    positions: int
    moments: Mapping[str, Tensor] | None = None


def table_rows(earlier: Encoder, later: Encoder) -> Tensor:
    """For each row of the later encoder's table the row of the earlier one's: [V], V rows.

    A categorical value that the earlier encoder lacks has the row of its field's unknown value, a
    value of a list alone RANDOM.
    """
    starts, _ = _layout(earlier)
    later_starts, total = _layout(later)
    rows = torch.zeros(total, dtype=torch.long)
    fields = list(zip(_fields(earlier), starts, _fields(later), later_starts, strict=True))
    for before, start, after, place in reversed(fields):  # categoricals last, as lists may share
        kept = torch.arange(start, start + before.size)
        new = torch.full((after.size - before.size,), start if after.max_length is None else RANDOM)
        rows[place : place + after.size] = torch.cat([kept, new])
    return rows


def load_weights(model: Ranker, start: WarmStart, encoder: Encoder) -> None:
    """Replace the model's parameters with those of the start; buffers stay the model's own.

    Args:
        encoder: of the model; its vocabularies begin with the start's (`Encoder.extended`).
    """
    rows = table_rows(start.encoder, encoder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = start.weights[name]
            if name == TABLE:
                random = (rows == RANDOM).unsqueeze(1)
                weight = torch.where(random, parameter, weight[rows.clamp(min=0)])
            parameter.copy_(weight)


def shrink_and_perturb(model: Ranker, fresh: Mapping[str, Tensor], by: tuple[float, float]) -> None:
    """θ ← λ θ + σ θ₀ for matrices and embeddings (Ash & Adams, NeurIPS 2020, section 4).

    The noise is a random start θ₀ times σ, with each layer's own scale, where the paper has
    N(0, σ²). Biases stay, since they hold the objectives' mean rates.

    Args:
        fresh: name → parameter of a random start of this model.
        by: λ and σ.
    """
    shrink, perturb = by
    chosen = {id(p) for p in (*model.matrices(), model.embedding.table.weight)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in chosen:
                parameter.mul_(shrink).add_(fresh[name], alpha=perturb)


def moments_of(model: Ranker, optimisers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """`PARAMETER/exp_avg`, `PARAMETER/exp_avg_sq` and `PARAMETER/step` → a copy of the tensor."""
    found: dict[str, Tensor] = {}
    for name, optimiser, parameter in _optimised(model, optimisers):
        state = optimiser.state.get(parameter)
        if state:
            found |= {f"{name}/{key}": state[key].detach().clone() for key in MOMENTS}
            found[f"{name}/{STEP}"] = torch.tensor(float(state[STEP]))
    return found


def restore_moments(
    model: Ranker, optimisers: Sequence[Optimizer], start: WarmStart, encoder: Encoder
) -> None:
    """Continue the optimisers with the start's moments; those of new values are zero.

    Parameters without moments, such as those that a method of loss balancing learns, begin anew.
    """
    moments = start.moments or {}
    rows = table_rows(start.encoder, encoder)
    is_new = _is_new(start.encoder, encoder).unsqueeze(1)
    for name, optimiser, parameter in _optimised(model, optimisers):
        if f"{name}/{STEP}" not in moments:
            continue
        step = moments[f"{name}/{STEP}"]
        state: dict[str, Any] = {
            STEP: int(step)
            if isinstance(optimiser, SparseAdam)
            else step.clone().float().to(parameter.device if capturable(optimiser) else "cpu")
        }
        for key in MOMENTS:
            moment = moments[f"{name}/{key}"]
            if name == TABLE:
                moment = moment[rows.clamp(min=0)].masked_fill(is_new, 0.0)
            state[key] = moment.to(parameter.device, parameter.dtype, copy=True)
        optimiser.state[parameter] = state


def capturable(optimiser: Optimizer) -> bool:
    """Whether a CUDA graph may hold the optimiser's steps; it then counts them on the device."""
    return bool(optimiser.defaults.get("capturable"))


def combined(parts: Sequence[Mapping[str, Tensor]], axes: Mapping[str, int]) -> dict[str, Tensor]:
    """Part t's share of every tensor for objective t of T, put together.

    Args:
        parts: T state dictionaries, or T results of `moments_of`.
        axes: parameter → the axis along which it is divided among the objectives; other tensors,
            and steps, are the first part's.
    """
    result = dict(parts[0])
    for key in result:
        name, _, what = key.partition("/")
        if name in axes and what != STEP:
            blocks = [p[key].chunk(len(parts), axes[name])[t] for t, p in enumerate(parts)]
            result[key] = torch.cat(blocks, axes[name])
    return result


def _is_new(earlier: Encoder, later: Encoder) -> Tensor:
    """Which rows of the later encoder's table belong to values that the earlier lacks: [V]."""
    starts, total = _layout(later)
    new = torch.zeros(total, dtype=torch.bool)
    for before, after, place in zip(_fields(earlier), _fields(later), starts, strict=True):
        new[place + before.size : place + after.size] = True
    return new


def _fields(encoder: Encoder) -> list[Any]:
    return [*encoder.categoricals, *encoder.lists]


def _layout(encoder: Encoder) -> tuple[list[int], int]:
    fields = _fields(encoder)
    starts, total = table_layout([v.size for v in fields], [v.share for v in fields])
    return starts, max(total, 1)


def _optimised(
    model: Ranker, optimisers: Sequence[Optimizer]
) -> list[tuple[str, Optimizer, Tensor]]:
    """Each parameter of the model that an optimiser trains, with its name and that optimiser."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (names[id(parameter)], optimiser, parameter)
        for optimiser in optimisers
        for group in optimiser.param_groups
        for parameter in group["params"]
        if id(parameter) in names
    ]
