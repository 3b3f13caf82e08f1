"""The pictures of a training, drawn with matplotlib's object interface (no display, no state)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mtl_ranker.evaluation.metrics import calibration_bins


def learning_curves(
    names: Sequence[str],
    train: np.ndarray,
    validate: np.ndarray,
    best_epochs: Sequence[int],
    title: str,
) -> Figure:
    """Loss per objective over epochs; train and validate are [epochs, T]."""
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    epochs = np.arange(1, len(train) + 1)
    for t, (axis, name) in enumerate(zip(axes, names, strict=True)):
        axis.plot(epochs, train[:, t], marker="o", markersize=3, label="train")
        axis.plot(epochs, validate[:, t], marker="o", markersize=3, label="validation")
        axis.axvline(best_epochs[t], color="0.6", linestyle=":", label="best epoch")
        axis.set(title=name, xlabel="epoch", ylabel="loss" if t == 0 else "")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def gradient_cosines(names: Sequence[str], cosine: np.ndarray, title: str) -> Figure:
    """Cosine between each two objectives' gradients over epochs; cosine is [epochs, T, T].

    Below zero, a step for one objective hurts the other.
    """
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    epochs = np.arange(1, len(cosine) + 1)
    for a in range(len(names)):
        for b in range(a):
            axis.plot(epochs, cosine[:, a, b], marker="o", label=f"{names[b]} and {names[a]}")
    axis.axhline(0.0, color="0.6", linestyle=":")
    axis.set(xlabel="epoch", ylabel="gradient cosine", ylim=(-1.05, 1.05))
    axis.set_xticks(epochs)
    axis.legend(frameon=False)
    if title:
        axis.set_title(title)
    return figure


def calibration(
    names: Sequence[str], labels: np.ndarray, prediction: np.ndarray, title: str
) -> Figure:
    """Observed against predicted in bins of equal rows; labels and prediction are [N, T]."""
    figure = Figure(figsize=(3.8 * len(names), 3.6), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for t, (axis, name) in enumerate(zip(axes, names, strict=True)):
        known = ~np.isnan(labels[:, t])
        predicted, observed, _ = calibration_bins(labels[known, t], prediction[known, t])
        top = 1.05 * max(predicted.max(), observed.max(), 1e-6)
        axis.plot([0, top], [0, top], color="0.7", linestyle="--", label="perfect")
        axis.plot(predicted, observed, marker="o", label="10 bins")
        axis.set(title=name, xlabel="predicted", ylabel="observed" if t == 0 else "")
    axes[0].legend(frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def gate_heatmap(names: Sequence[str], mean_gate: np.ndarray, title: str) -> Figure:
    """Mean gate weight of each objective (row) on each expert (column); mean_gate is [T, E]."""
    objectives, experts = mean_gate.shape
    size = (1.6 + 0.75 * experts, 1.4 + 0.55 * objectives)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(mean_gate, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(experts), [f"expert {e}" for e in range(experts)], rotation=45)
    axis.set_yticks(range(objectives), list(names))
    for t in range(objectives):
        for e in range(experts):
            weight = mean_gate[t, e]
            colour = "white" if weight > 0.6 else "black"
            axis.text(e, t, f"{weight:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="mean gate weight")
    axis.set_title(title, fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path
