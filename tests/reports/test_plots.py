"""Pictures of a training: everything that is drawn lies within the picture."""

from __future__ import annotations

import numpy as np
import pytest

from mtl_ranker.reports import plots

NAMES = ["click", "watch", "like"]


@pytest.mark.parametrize("scale", [1e-6, 0.0123, 543.2, 1.7e7])
def test_panels_hold_their_labels_whatever_the_scale(scale: float) -> None:
    losses = scale * np.array([[0.51, 1.0, 0.9], [0.42, 0.98, 0.91], [0.433, 0.97, 0.905]])
    labels = scale * np.linspace(0, 1, 300).reshape(100, 3)
    figures = [
        plots.learning_curves(NAMES, losses, 1.1 * losses, [2, 3, 1], "mmoe seed 0"),
        plots.calibration(NAMES, labels, {"as trained": 0.9 * labels}, "mmoe seed 0"),
    ]
    for figure in figures:
        figure.canvas.draw()
        width, height = figure.bbox.size
        for panel in figure.axes:
            drawn = panel.get_tightbbox()
            assert drawn is not None
            assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) >= 0
        for left, right in zip(figure.axes, figure.axes[1:], strict=False):
            assert left.get_tightbbox().x1 <= right.get_tightbbox().x0
