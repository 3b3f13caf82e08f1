"""The pictures of a training's runs, drawn once for the report and for MLflow."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from mtl_ranker.nightly.results import ModelRun, Suite
from mtl_ranker.reports import plots

# Readable on light and dark pages.
NEUTRAL = "#7d8590"

STYLE: dict[Any, Any] = {
    **{f"{part}.color": NEUTRAL for part in ("text", "xtick", "ytick")},
    "axes.labelcolor": NEUTRAL,
    "axes.edgecolor": NEUTRAL,
    "axes.titlecolor": NEUTRAL,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Picture:
    """An SVG file and its alternative text."""

    svg: bytes
    alternative: str

    @property
    def source(self) -> str:
        """The file as a `data:` address."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


RunPictures = Mapping[str, Mapping[str, Picture]]


def run_pictures(suite: Suite) -> RunPictures:
    """Label of each run → file name → picture.

    Runs that share a network, with trees and without, share the pictures of its training.
    """
    names = [task.name for task in suite.tasks]
    trainings: dict[int, dict[str, Picture]] = {}
    pictures = {}
    for run in suite.runs:
        if id(run.trained) not in trainings:
            trainings[id(run.trained)] = _of_training(names, run)
        shared = trainings[id(run.trained)]
        pictures[run.label] = {**shared, "calibration.svg": _calibration(names, suite, run)}
    return pictures


def picture(draw: Callable[[], Figure], alternative: str) -> Picture:
    """A figure in the report's style."""
    with mpl.rc_context(STYLE):
        figure = draw()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return Picture(buffer.getvalue(), alternative)


def _of_training(names: Sequence[str], run: ModelRun) -> dict[str, Picture]:
    """The losses of a network's training, the cosines of its gradients, and its gates."""
    epochs, best = run.trained.epochs, run.trained.best_epochs
    train = np.array([e.train_loss for e in epochs])
    validate = np.array([e.validate_loss for e in epochs])
    pictures = {
        "learning_curves.svg": picture(
            lambda: plots.learning_curves(names, train, validate, best, ""),
            f"Loss of {run.label} by epoch, training and validation, for {', '.join(names)}; "
            f"best epochs {', '.join(map(str, best))}",
        )
    }
    if len(names) > 1:
        cosine = np.array([e.gradient_cosine for e in epochs])
        last = "; ".join(
            f"{names[a]} and {names[b]} {cosine[-1, a, b]:+.2f}"
            for a in range(len(names))
            for b in range(a)
        )
        pictures["gradient_cosine.svg"] = picture(
            lambda: plots.gradient_cosines(names, cosine, ""),
            f"Cosine between objectives' gradients of {run.label} by epoch; at the end {last}",
        )
    if run.diagnosis.layers:
        layer = run.diagnosis.layers[-1]
        pictures["gates.svg"] = picture(
            lambda: plots.gate_heatmap(layer.outputs, layer.gate_weights, ""),
            f"Mean gate weight of each expert of {run.label} on the test days",
        )
    return pictures


def _calibration(names: Sequence[str], suite: Suite, run: ModelRun) -> Picture:
    predictions = {"as trained": run.raw_prediction, "calibrated": run.test_prediction}
    return picture(
        lambda: plots.calibration(names, suite.held_out.labels, predictions, ""),
        f"Mean prediction and mean label of {run.label} in ten bins of the test rows, "
        f"before and after calibration, for {', '.join(names)}",
    )
