"""From objectives to one score: Σ w·p, or Π p^w (Zhao et al., RecSys 2019, section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from mtl_ranker.config import Project


def blend(project: Project) -> pl.Expr:
    """The blended score as an expression over the objectives' columns: Σ w·p, or Π p^w."""
    weights = project.blend_weights
    if project.scoring.blend == "weighted_sum":
        return pl.sum_horizontal(pl.col(name) * weight for name, weight in weights.items())
    logs = [pl.col(name).clip(lower_bound=1e-9).log() * w for name, w in weights.items()]
    return pl.sum_horizontal(logs).exp()


def blended(how: str, weights: Sequence[float], prediction: np.ndarray) -> np.ndarray:
    """One score per row: Σ w·p, or Σ w·ln p, which orders rows as Π p^w does.

    Args:
        how: weighted_sum or weighted_product.
        prediction: [N, T].
    """
    w = np.asarray(weights, np.float64)
    if how == "weighted_sum":
        return prediction.astype(np.float64) @ w
    return np.log(np.clip(prediction.astype(np.float64), 1e-9, None)) @ w
