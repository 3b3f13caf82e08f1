"""How dependably does a model train? (Ma et al., KDD 2018, section 5.2, figure 6): the spread of
final losses over random starts and data, with and without gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from mtl_ranker.evaluation.intervals import Interval, mean_interval
from mtl_ranker.studies.synthetic import Found

BAD = 1.5  # a start is bad when its loss is this many times the best model's median


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One model's final losses at one correlation.

    Attributes:
        mean: with Student's interval over starts.
        deviation: standard deviation over starts.
        bad: share of starts that end above BAD times the best model's median.
        quantiles: 5 %, 50 % and 95 %.
    """

    model: str
    correlation: float
    mean: Interval
    deviation: float
    bad: float
    quantiles: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A gated model against the shared bottom, start by start.

    Attributes:
        gain: mean of shared bottom's loss minus the model's, as a share of shared bottom's mean.
        better: p of the Wilcoxon signed-rank test that the losses differ.
        steadier: p of the Brown-Forsythe test that the spreads differ.
        spread_ratio: the model's standard deviation over shared bottom's.
    """

    model: str
    correlation: float
    gain: Interval
    better: float
    steadier: float
    spread_ratio: float


def spreads(found: Found) -> list[Spread]:
    rows = []
    for p in found.correlations:
        best = min(float(np.median(found.mean(m, p))) for m in found.parameters)
        for model in found.parameters:
            loss = found.mean(model, p)
            low, middle, high = np.quantile(loss, [0.05, 0.5, 0.95])
            rows.append(
                Spread(
                    model=model,
                    correlation=p,
                    mean=mean_interval(loss),
                    deviation=float(loss.std(ddof=1)),
                    bad=float((loss > BAD * best).mean()),
                    quantiles=(float(low), float(middle), float(high)),
                )
            )
    return rows


def contrasts(found: Found, base: str = "shared_bottom") -> list[Contrast]:
    """Every other model against `base`, whose start s had the same tasks and rows."""
    rows = []
    for p in found.correlations:
        reference = found.mean(base, p)
        for model in found.parameters:
            if model == base:
                continue
            loss = found.mean(model, p)
            gain = (reference - loss) / reference.mean()
            rows.append(
                Contrast(
                    model=model,
                    correlation=p,
                    gain=mean_interval(gain),
                    better=float(stats.wilcoxon(reference, loss).pvalue),
                    steadier=float(stats.levene(reference, loss, center="median").pvalue),
                    spread_ratio=float(loss.std(ddof=1) / reference.std(ddof=1)),
                )
            )
    return rows


def mean_loss(found: Found, rows: Sequence[Spread]) -> Figure:
    """Mean final loss by correlation, with intervals and the middle 90 % of starts (figure 4)."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for number, model in enumerate(found.parameters):
        own = [row for row in rows if row.model == model]
        x = np.array([row.correlation for row in own])
        colour = f"C{number}"
        axis.plot(x, [r.mean.value for r in own], marker="o", color=colour, label=model)
        axis.fill_between(
            x, [r.mean.low for r in own], [r.mean.high for r in own], color=colour, alpha=0.3
        )
        ends = ([r.quantiles[0] for r in own], [r.quantiles[2] for r in own])
        axis.fill_between(x, *ends, color=colour, alpha=0.08)
    axis.set(xlabel="correlation of the tasks' weights", ylabel="mean squared error on new rows")
    axis.legend(frameon=False)
    axis.set_title("Mean final loss (dark: 95 % interval; light: 90 % of starts)", fontsize=10)
    return figure


def distributions(found: Found) -> Figure:
    """Kernel density and cumulative share of final losses: a column per correlation (figure 6)."""
    columns = len(found.correlations)
    figure = Figure(figsize=(3.6 * columns, 5.4), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for column, p in enumerate(found.correlations):
        everything = np.concatenate([found.mean(m, p) for m in found.parameters])
        grid = np.linspace(everything.min(), everything.max(), 200)
        for model in found.parameters:
            loss = np.sort(found.mean(model, p))
            axes[0, column].plot(grid, stats.gaussian_kde(loss)(grid), label=model)
            share = np.arange(1, len(loss) + 1) / len(loss)
            axes[1, column].step(loss, share, where="post", label=model)
        axes[0, column].set(title=f"correlation {p:g}", ylabel="density" if column == 0 else "")
        axes[1, column].set(
            xlabel="final loss", ylabel="share of starts below" if column == 0 else ""
        )
    axes[0, 0].legend(frameon=False)
    return figure
