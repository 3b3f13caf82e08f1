"""Each picture of a run has the run's own figures; a training is drawn once."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.reports import plots
from mtl_ranker.reports.pictures import picture, run_pictures
from tests.nightly.test_suite import LAST, prepared
from tests.projects import write_project
from tests.reports.test_page import MODELS


@pytest.fixture
def suite(tiny, monkeypatch):
    """Of two models, without a date or random ids in the pictures."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    write_project(tiny, models=MODELS, training={"epochs": 3})
    with mpl.rc_context({"svg.hashsalt": "fixed"}):
        yield train_suite(prepared(tiny), LAST)


@pytest.mark.slow
def test_pictures_are_of_the_runs_own_figures(suite):
    names = [task.name for task in suite.tasks]
    runs = [replace(run, raw_prediction=0.9 * run.test_prediction) for run in suite.runs]
    suite = replace(suite, runs=runs)
    found = run_pictures(suite)
    assert set(found) == {run.label for run in suite.runs}
    assert any("gates.svg" in of_run for of_run in found.values())
    for run in suite.runs:
        epochs = run.trained.epochs
        train, validate = (
            np.array([getattr(epoch, f"{part}_loss") for epoch in epochs])
            for part in ("train", "validate")
        )
        lines = {"as trained": run.raw_prediction, "calibrated": run.test_prediction}
        labels, best = suite.held_out.labels, run.trained.best_epochs
        cosine = np.array([epoch.gradient_cosine for epoch in epochs])
        drawn: dict[str, tuple[Any, ...]] = {
            "learning_curves": (plots.learning_curves, names, train, validate, best),
            "calibration": (plots.calibration, names, labels, lines),
            "gradient_cosine": (plots.gradient_cosines, names, cosine),
        }
        if run.diagnosis.layers:
            last = run.diagnosis.layers[-1]
            drawn["gates"] = (plots.gate_heatmap, last.outputs, last.gate_weights)
        assert {f"{name}.svg" for name in drawn} == set(found[run.label])
        for name, (draw, *figures) in drawn.items():
            svg = found[run.label][f"{name}.svg"].svg
            assert ET.fromstring(svg).tag.endswith("svg")
            assert svg == picture(partial(draw, *figures, ""), "").svg, name


def test_runs_with_one_network_share_its_pictures(suite):
    first = suite.runs[0]
    beside = replace(first, name="again", test_prediction=first.test_prediction / 2)
    found = run_pictures(replace(suite, runs=[first, beside]))
    one, other = found[first.label], found[beside.label]
    assert one["learning_curves.svg"] is other["learning_curves.svg"]
    assert one["calibration.svg"].svg != other["calibration.svg"].svg
