"""The gates a challenger must pass by itself: loads elsewhere, fast and small enough."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pytest

from mtl_ranker.context import without_log
from mtl_ranker.nightly.promotion import compare_artifacts, unfit
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.load_test import Serving, try_serving
from tests import projects
from tests.nightly.test_suite import LAST, prepared


@pytest.fixture
def saved(tiny, tmp_path):
    project, workspace = prepared(tiny)
    suite = train_suite(without_log(project, workspace), LAST)
    artifact = suite.winner.artifact
    return project, workspace, artifact, artifact.save(tmp_path / "saved"), suite.held_out.frame


def test_a_fresh_process_gives_the_same_scores_and_its_time_and_size(saved):
    _, _, artifact, folder, frame = saved
    found = try_serving(folder, frame, artifact.predict(frame))
    assert found.failed is None
    assert found.seconds_per_million > 0
    on_disk = sum(f.stat().st_size for f in folder.iterdir())
    assert found.megabytes == pytest.approx(on_disk / 1e6)


def test_an_artifact_that_differs_or_does_not_load_is_told(saved):
    _, _, artifact, folder, frame = saved
    expected = artifact.predict(frame)
    other = try_serving(folder, frame, expected.with_columns(pl.col("click") + 0.01))
    assert "differ by up to 0.01" in other.failed
    (folder / "weights.safetensors").write_bytes(b"not weights")
    broken = try_serving(folder, frame, expected)
    assert "Safetensor" in broken.failed


def test_what_does_not_serve_is_not_promoted_even_as_the_first_model(saved):
    project, workspace, artifact, folder, _ = saved
    # Forty rows train nothing, so calibration is not what is tested here.
    rules = {"max_calibration_error": 1.0, "max_seconds_per_million": 1e9}
    loose = project.promotion.model_copy(update=rules)
    project = project.model_copy(update={"promotion": loose})
    first = compare_artifacts(without_log(project, workspace), LAST, artifact, None, folder)
    assert first.promoted
    assert first.reason == "promoted: the first model becomes champion"
    tight = loose.model_copy(update={"max_megabytes": 1e-6})
    small = project.model_copy(update={"promotion": tight})
    assert "MB, allowed 0 (promotion.max_megabytes)" in (
        compare_artifacts(without_log(small, workspace), LAST, artifact, None, folder).reason
    )
    (folder / "model.json").write_text("{")
    broken = compare_artifacts(without_log(project, workspace), LAST, artifact, None, folder)
    assert not broken.promoted
    assert "does not serve in a fresh process" in broken.reason


def test_a_slow_model_is_told_by_the_rule_it_breaks():
    project = projects.project()
    slow = Serving(1.0, 500.0)
    found = unfit(project, [], np.zeros((3, 0)), np.zeros((3, 0)), slow)
    assert found == [
        "it takes 500 s to score a million rows, allowed 120 (promotion.max_seconds_per_million)"
    ]
    assert (
        unfit(
            project,
            [],
            np.zeros((3, 0)),
            np.zeros((3, 0)),
            dataclasses.replace(slow, seconds_per_million=3.0),
        )
        == []
    )
