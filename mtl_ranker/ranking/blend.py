"""From objectives to one score: Σ w·v, or Π v^w (Zhao et al., RecSys 2019, section 4.4).

An objective with `where` is predicted given its condition: stars given a purchase. Where the
condition is that another objective's label is 1, its value v is what can be expected of an
impression, P(condition) · E[label | condition], along the whole chain of conditions; otherwise, and
for the objectives in `scoring.conditional`, it is the prediction itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from mtl_ranker.config import Project


class BlendChoice(NamedTuple):
    """How a model blends: method, objective → weight, and objectives that are not chained."""

    how: str
    weights: Mapping[str, float]
    conditional: Sequence[str] = ()

    @property
    def content(self) -> dict[str, Any]:
        """For JSON; `blend_choice` reads it."""
        weights, given = dict(self.weights), list(self.conditional)
        return {"blend": self.how, "weights": weights, "conditional": given}


def chosen_blend(project: Project) -> BlendChoice:
    """A project's own choice."""
    scoring = project.scoring
    return BlendChoice(scoring.blend, project.blend_weights, scoring.conditional)


def blend_choice(content: Mapping[str, Any], project: Project) -> BlendChoice:
    """The choice that was stored as `content` with a model.

    Where an earlier version stored it, the weights are for predictions given their conditions.

    Args:
        project: the model's.
    """
    unchained = [o.name for o in project.objectives if o.where is not None]
    return BlendChoice(content["blend"], content["weights"], content.get("conditional", unchained))


def conditions(project: Project) -> dict[str, str]:
    """Objective with `where` → the binary objective whose label is 1 exactly where that holds.

    Recognised are `purchase = 1` and its like where `purchase` is the objective's label, the
    condition of a label `case when … then 1 else 0 end`, and two such conditions of one chain
    joined by `and`. Other conditions are not in the result.
    """
    parts = [_Label(o.name, o.kind, o.label, o.where, o.conditional_on) for o in project.objectives]
    return dict(_conditions(tuple(parts)))


def conditional(project: Project) -> list[str]:
    """The objectives with `where` whose condition is no other objective."""
    known = conditions(project)
    return [o.name for o in project.objectives if o.where is not None and o.name not in known]


class _Label(NamedTuple):
    """What decides the conditions of an objective; as the objective's settings."""

    name: str
    kind: str
    label: str
    where: str | None
    conditional_on: str | None


@lru_cache(maxsize=32)
def _conditions(objectives: tuple[_Label, ...]) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    chained = {o.name: o.conditional_on for o in objectives if o.conditional_on is not None}
    # A chain is recognised from its start: conditions of two objectives need their order.
    for _ in objectives:
        for o in objectives:
            if o.where is None or o.name in found:
                continue
            parent = next(
                (
                    c.name
                    for c in objectives
                    if c.kind == "binary"
                    and c.name != o.name
                    and o.name not in _ancestors(c.name, found | chained)
                    and _holds_where(o.where, c, _ancestors(c.name, found | chained), objectives)
                ),
                None,
            )
            if parent is not None:
                found[o.name] = parent
    return tuple(found.items())


def _holds_where(
    where: str, objective: _Label, ancestors: Sequence[str], objectives: Sequence[_Label]
) -> bool:
    """Whether a condition is that the objective's label is 1."""
    expression = pl.sql_expr(where)
    if pl.sql_expr(f"case when {where} then 1 else 0 end").meta.eq(pl.sql_expr(objective.label)):
        return True
    before = [o for o in objectives if o.name in ancestors]
    pairs = [pair for o in before for pair in ((objective, o), (o, objective))]
    forms = [*_label_is_1(objective.label)] + [
        f"({a}) and ({b})"
        for one, other in pairs
        for a in _label_is_1(one.label)
        for b in _label_is_1(other.label)
    ]
    return any(expression.meta.eq(pl.sql_expr(form)) for form in forms)


def _label_is_1(label: str) -> Iterator[str]:
    yield label
    yield from (f"({label}) {rest}" for rest in ("= 1", "= 1.0", "> 0", ">= 1", "= true"))


def _ancestors(name: str, parents: Mapping[str, str]) -> list[str]:
    found: list[str] = []
    while name in parents:
        name = parents[name]
        found.append(name)
    return found


def factors(project: Project) -> dict[str, list[str]]:
    """Objective → the objectives whose probabilities its prediction is multiplied by."""
    parents, names = conditions(project), project.blend_weights
    return {
        name: [] if name in project.scoring.conditional else _ancestors(name, parents)
        for name in names
    }


def blend(project: Project) -> pl.Expr:
    """The blended score as an expression over the objectives' columns: Σ w·v, or Π v^w."""
    values = blend_values(project)
    weights = project.blend_weights
    if project.scoring.blend == "weighted_sum":
        return pl.sum_horizontal(values[name] * weight for name, weight in weights.items())
    logs = [values[name].clip(lower_bound=1e-9).log() * w for name, w in weights.items()]
    return pl.sum_horizontal(logs).exp()


def blend_values(project: Project) -> dict[str, pl.Expr]:
    """Objective → its value v as an expression over the objectives' columns."""
    values = {}
    for name, multiplied in factors(project).items():
        value = pl.col(name)
        for other in multiplied:
            value = value * pl.col(other)
        values[name] = value
    return values


def value_matrix(project: Project, prediction: np.ndarray) -> np.ndarray:
    """The values v [N, T] of predictions [N, T]."""
    values = prediction.astype(np.float64)
    index = {name: t for t, name in enumerate(project.blend_weights)}
    return np.stack(
        [
            values[:, [index[name], *(index[other] for other in multiplied)]].prod(1)
            for name, multiplied in factors(project).items()
        ],
        axis=1,
    )


def label_matrix_of_values(project: Project, labels: np.ndarray) -> np.ndarray:
    """What the values v predict, from labels [N, T]: 0 where the condition does not hold.

    NaN where it is not known whether the condition holds, or the label is missing where it does.
    """
    found = labels.astype(np.float64)
    index = {name: t for t, name in enumerate(project.blend_weights)}
    for name, multiplied in factors(project).items():
        t = index[name]
        for other in multiplied:
            condition = labels[:, index[other]]
            found[:, t] = np.where(condition == 0, 0.0, found[:, t] * condition)
    return found


def blended(how: str, weights: Sequence[float], values: np.ndarray) -> np.ndarray:
    """One score per row: Σ w·v, or Σ w·ln v, which orders rows as Π v^w does.

    Args:
        how: weighted_sum or weighted_product.
        values: [N, T] of `value_matrix`.
    """
    w = np.asarray(weights, np.float64)
    if how == "weighted_sum":
        return values.astype(np.float64) @ w
    return np.log(np.clip(values.astype(np.float64), 1e-9, None)) @ w
