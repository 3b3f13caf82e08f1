"""Soft labels of recent impressions, whose actions may still come.

An impression without an action is either a negative, or a positive whose action has yet to come.
After Chapelle ("Modeling Delayed Feedback in Display Advertising", KDD 2014, section 4.2: the
expectation of EM), one of age a counts as positive with the probability

    w = p (1 − F(a)) / (1 − p F(a)),

where p is the probability that it is a positive in the end, and F(a) the share of positives whose
action is known at age a. The loss of a label w is that of two rows, a positive of weight w and a
negative of weight 1 − w. Only trainings read soft labels; whatever is judged reads final ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl

from mtl_ranker.context import Context
from mtl_ranker.features.arrivals import Arrival, arrivals
from mtl_ranker.features.columns import LABEL, OPEN
from mtl_ranker.features.examples import soft_objectives
from mtl_ranker.training.distributed import World
from mtl_ranker.workspace import Workspace, fingerprint

MOST_CERTAIN = 1 - 1e-6  # p, so that an action that has not come is never certain to come


@dataclass(frozen=True)
class Prior:
    """Where p comes from: a model's calibrated predictions.

    Attributes:
        predict: raw examples [N] → a column of predictions for each objective.
        objectives: those whose label is the model's.
        digest: of the model.
    """

    predict: Callable[[pl.DataFrame], pl.DataFrame]
    objectives: Sequence[str]
    digest: str


@dataclass(frozen=True)
class SoftLabels:
    """What the labels of open impressions are estimated from.

    Attributes:
        night: D, at whose end actions are known.
        objectives: binary ones whose label an action can only raise.
        curves: objective → its arrival on days whose labels are final; without one, or without a
            positive on these days, a negative that may still turn is missing.
        prior: p; without it, and for objectives that it does not have, p is the share of positives
            on the days of the curve.
    """

    night: date
    objectives: Sequence[str]
    curves: Mapping[str, Arrival]
    prior: Prior | None = None

    @property
    def digest(self) -> str:
        """A hash of what decides the labels, given the examples."""
        curves = [(name, each.rate, each.shares) for name, each in self.curves.items()]
        return fingerprint(self.night, curves, None if self.prior is None else self.prior.digest)

    def of(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Examples with the labels that a training reads; final labels stay."""
        observed = {name: frame[OPEN + name] for name in self.objectives}
        negative = pl.any_horizontal(pl.col(OPEN + name) == 0 for name in self.objectives)
        rows = frame.select(negative.fill_null(False)).to_series()
        unfinished = frame.filter(rows)
        age = unfinished.select((self.night - pl.col("date")).dt.total_days()).to_series()
        predicted = None
        if self.prior is not None and len(unfinished):
            predicted = self.prior.predict(unfinished)
        columns = []
        for name in self.objectives:
            estimate = np.full(frame.height, np.nan)
            if name in self.curves:
                p: float | np.ndarray = self.curves[name].rate
                if predicted is not None and self.prior and name in self.prior.objectives:
                    p = predicted[name].cast(pl.Float64).to_numpy()
                known = np.array(self.curves[name].shares)[
                    np.minimum(age.to_numpy(), len(self.curves[name].shares) - 1)
                ]
                estimate[rows.to_numpy()] = positive_probability(p, known)
            turned = pl.Series(estimate, dtype=pl.Float32).fill_nan(None)
            label = (
                pl.when(observed[name] == 1)
                .then(pl.lit(1.0, pl.Float32))
                .when(observed[name] == 0)
                .then(turned)
                .otherwise(LABEL + name)
            )
            columns.append(label.alias(LABEL + name))
        return frame.with_columns(columns)

    def files(
        self, workspace: Workspace, scratch: Path, paths: Sequence[Path], world: World
    ) -> list[Path]:
        """Files of the same examples with the labels that a training reads.

        Those of open days are written below a temporary folder, by the first rank.
        """
        found = []
        for path in paths:
            scan = pl.scan_parquet(path, glob=False)
            is_open = [pl.col(OPEN + name).is_not_null().any() for name in self.objectives]
            if not any(scan.select(is_open).collect(engine="streaming").row(0)):
                found.append(path)
                continue
            target = scratch / SOFT / path.parent.name / path.name
            if world.rank == 0:
                with workspace.staged(target) as temporary:
                    self.of(pl.read_parquet(path, hive_partitioning=False)).write_parquet(temporary)
            found.append(target)
        world.wait()
        return found


ENCODED = "encoded"  # temporary folder of a training
SOFT = "soft"  # below it, examples with soft labels


def positive_probability(p: float | np.ndarray, known: np.ndarray) -> np.ndarray:
    """The probability that rows without an action are positives: [N].

    Args:
        p: that of a positive before anything is known, one or [N].
        known: [N], F of each row's age.
    """
    p = np.clip(p, 0.0, MOST_CERTAIN)
    return p * (1 - known) / (1 - p * known)


def soft_labels(context: Context, night: date, prior: Prior | None = None) -> SoftLabels | None:
    """What a training on D estimates labels from; None without `training.immature = "soft"`."""
    objectives = soft_objectives(context.project)
    if not objectives:
        return None
    found = {each.objective: each for each in arrivals(context, night) if each.positives}
    curves = {name: found[name] for name in objectives if name in found}
    return SoftLabels(night, objectives, curves, prior)
