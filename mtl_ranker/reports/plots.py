"""Figures of a training, with matplotlib's object interface (no display, no global state)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtl_ranker.evaluation.metrics import calibration_bins
from mtl_ranker.evaluation.pareto import Point

POWERS = (-2, 4)  # tick labels of other orders of magnitude have a common power of ten


def learning_curves(
    names: Sequence[str],
    train: np.ndarray,
    validate: np.ndarray,
    best_epochs: Sequence[int],
    title: str,
) -> Figure:
    """Loss of each of T objectives over epochs.

    Args:
        train, validate: [epochs, T].
        best_epochs: [T], counted from 1.
    """
    figure, axes = _panels(len(names), 4.2, 3.4, title)
    epochs = np.arange(1, len(train) + 1)
    for t, (axis, name) in enumerate(zip(axes, names, strict=True)):
        axis.plot(epochs, train[:, t], marker="o", markersize=3, label="train")
        if np.isfinite(validate[:, t]).any():  # a refit has no validation rows
            axis.plot(epochs, validate[:, t], marker="o", markersize=3, label="validation")
            axis.axvline(best_epochs[t], color="0.6", linestyle=":", label="best epoch")
        axis.set(title=name, xlabel="epoch", ylabel="loss" if t == 0 else "")
        axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axis.ticklabel_format(axis="y", scilimits=POWERS)
    axes[0].legend(frameon=False)
    return figure


def gradient_cosines(names: Sequence[str], cosine: np.ndarray, title: str) -> Figure:
    """Cosine between the gradients of each two objectives over epochs.

    Below zero, a step that reduces one objective's loss increases the other's.

    Args:
        cosine: [epochs, T, T].
    """
    figure, (axis,) = _panels(1, 7.6, 3.2, title)
    epochs = np.arange(1, len(cosine) + 1)
    for a in range(len(names)):
        for b in range(a):
            axis.plot(epochs, cosine[:, a, b], marker="o", label=f"{names[b]} and {names[a]}")
    axis.axhline(0.0, color="0.6", linestyle=":")
    axis.set(xlabel="epoch", ylabel="gradient cosine", ylim=(-1.05, 1.05))
    axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    box = axis.get_position()
    axis.set_position((box.x0, box.y0, 0.62 - box.x0, box.height))  # beside the legend
    return figure


def calibration(
    names: Sequence[str], labels: np.ndarray, predictions: Mapping[str, np.ndarray], title: str
) -> Figure:
    """Mean label against mean prediction in ten bins of equal numbers of rows.

    Args:
        labels: [N, T].
        predictions: legend → [N, T].
    """
    figure, axes = _panels(len(names), 3.8, 3.6, title)
    for t, (axis, name) in enumerate(zip(axes, names, strict=True)):
        known = ~np.isnan(labels[:, t])
        top = 1e-6
        for name_of_line, prediction in predictions.items():
            if not known.any():
                continue
            predicted, observed, _ = calibration_bins(labels[known, t], prediction[known, t])
            axis.plot(
                predicted, observed, marker="o", markersize=4, label=f"{name_of_line}, 10 bins"
            )
            top = max(top, 1.05 * predicted.max(), 1.05 * observed.max())
        axis.plot([0, top], [0, top], color="0.7", linestyle="--", label="perfect", zorder=0)
        axis.set(title=name, xlabel="predicted", ylabel="observed" if t == 0 else "")
        axis.ticklabel_format(scilimits=POWERS)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def gate_heatmap(names: Sequence[str], mean_gate: np.ndarray, title: str) -> Figure:
    """Mean gate weight [T, E] of each objective (row) on each expert (column)."""
    objectives, experts = mean_gate.shape
    size = (1.6 + 0.75 * experts, 1.4 + 0.55 * objectives)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(mean_gate, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(experts), [f"expert {e + 1}" for e in range(experts)], rotation=45)
    axis.set_yticks(range(objectives), list(names))
    for t in range(objectives):
        for e in range(experts):
            weight = mean_gate[t, e]
            colour = "white" if weight > 0.6 else "black"
            axis.text(e, t, f"{weight:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="mean gate weight")
    axis.set_title(title, fontsize=9)
    return figure


def pareto_front(points: Sequence[Point], marked: Mapping[str, Point], title: str) -> Figure:
    """Engagement against satisfaction NDCG@10 of every choice of weights.

    Args:
        marked: legend → point to highlight.
    """
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    axis = figure.subplots()
    front = sorted((p for p in points if p.best), key=lambda p: p.engagement)
    others = [p for p in points if not p.best]
    axis.plot(
        [p.engagement for p in others],
        [p.satisfaction for p in others],
        ".",
        color="0.7",
        label=f"{len(others)} other choices",
    )
    axis.plot(
        [p.engagement for p in front],
        [p.satisfaction for p in front],
        "o-",
        markersize=4,
        label="Pareto front",
    )
    for number, (name, point) in enumerate(marked.items()):
        weights = ", ".join(f"{n} {w:g}" for n, w in point.weights.items())
        axis.plot(
            point.engagement,
            point.satisfaction,
            "*X^"[number % 3],
            markersize=13,
            color=f"C{number + 1}",
            label=f"{name}: {weights}",
        )
    axis.set(xlabel="engagement NDCG@10", ylabel="satisfaction NDCG@10")
    figure.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=3)
    if title:
        axis.set_title(title, fontsize=10)
    return figure


def curves_over_days(
    days: Sequence[object], curves: Mapping[str, Mapping[str, Sequence[float]]], title: str
) -> Figure:
    """A panel per measure with a line per policy.

    Args:
        curves: measure → policy → value of each day.
    """
    columns = min(len(curves), 4)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.9 * columns, 3.0 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (measure, policies) in zip(axes, curves.items(), strict=False):
        for number, (policy, values) in enumerate(policies.items()):
            style = ("o-", "s--", "^:")[number % 3]
            axis.plot(range(len(days)), values, style, markersize=4, label=policy)
        axis.set_title(measure, fontsize=10)
        axis.set_xticks(range(len(days)), [str(d)[5:] for d in days], rotation=45, fontsize=8)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    if len(next(iter(curves.values()))) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _panels(count: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, `width` × `height` inches each.

    The margins are fixed: finding them by a layout engine takes longer than drawing the figure, and
    a night draws some for each run.
    """
    figure = Figure(figsize=(width * count, height))
    left, right, bottom = 0.85, 0.15, 0.5  # inches: tick labels with the label of the axis
    top = 0.65 if title else 0.35
    inner = width - left - right
    axes = figure.subplots(
        1,
        count,
        squeeze=False,
        gridspec_kw={
            "left": left / (width * count),
            "right": 1 - right / (width * count),
            "bottom": bottom / height,
            "top": 1 - top / height,
            "wspace": (left + right) / inner,
        },
    )
    if title:
        figure.suptitle(title)
    return figure, list(axes[0])


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
