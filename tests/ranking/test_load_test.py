"""A saved ranker in a fresh process, and the limits on its speed and size."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pytest

from mtl_ranker.context import Context
from mtl_ranker.features.days import split_days
from mtl_ranker.nightly.popularity import fit_popularity
from mtl_ranker.nightly.promotion import ChallengerEvidence, compare_artifacts, unfit
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.load_test import Serving, try_serving
from tests import projects
from tests.nightly.test_suite import LAST, prepared


def with_promotion(context: Context, **settings: float) -> Context:
    project = context.project
    promotion = project.promotion.model_copy(update=settings)
    project = project.model_copy(update={"promotion": promotion})
    return dataclasses.replace(context, project=project)


@pytest.fixture
def saved(tiny, tmp_path):
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    artifact = suite.winner.artifact
    return context, artifact, artifact.save(tmp_path / "saved"), suite.held_out.frame


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_scores_with_speed_and_size(saved):
    _, artifact, folder, frame = saved
    serving = try_serving(folder, frame, artifact.predict(frame))
    assert serving.failed is None
    assert serving.seconds_per_million > 0
    on_disk = sum(f.stat().st_size for f in folder.iterdir())
    assert serving.megabytes == pytest.approx(on_disk / 1e6)


@pytest.mark.slow
def test_other_scores_and_a_broken_artifact_are_reported(saved):
    _, artifact, folder, frame = saved
    expected = artifact.predict(frame)
    different = try_serving(folder, frame, expected.with_columns(pl.col("click") + 0.01))
    assert "differ by up to 0.01" in different.failed
    (folder / "weights.safetensors").write_bytes(b"not weights")
    broken = try_serving(folder, frame, expected)
    assert "Safetensor" in broken.failed


@pytest.mark.slow
def test_an_artifact_that_cannot_be_served_is_not_promoted_even_as_the_first_model(saved):
    context, artifact, folder, _ = saved
    # Forty rows are too few to be calibrated on, which is not tested here.
    limits = {
        "max_calibration_ratio": 1e9,
        "max_calibration_shift": 1e9,
        "max_seconds_per_million": 1e9,
    }
    loose = with_promotion(context, **limits)
    first = compare_artifacts(loose, LAST, artifact, None, folder)
    assert first.promoted
    assert first.reason.startswith(
        "promoted: the first model becomes champion; its blended quality"
    )
    tight = with_promotion(loose, max_megabytes=1e-6)
    too_large = compare_artifacts(tight, LAST, artifact, None, folder)
    assert "MB, allowed 1e-06 (promotion.max_megabytes)" in too_large.reason
    # Item popularity, which becomes champion then, is that of the training days.
    days = split_days(context.project, context.workspace.days("events"), LAST).train
    rows = context.workspace.scan("examples", days)
    expected = fit_popularity(context.project, rows, None)
    items = pl.DataFrame({"item_id": range(13)})
    assert too_large.fallback.predict(items).equals(expected.predict(items))
    later = fit_popularity(context.project, context.workspace.scan("examples", [LAST]), None)
    assert not later.predict(items).equals(expected.predict(items))
    (folder / "model.json").write_text("{")
    broken = compare_artifacts(loose, LAST, artifact, None, folder)
    assert not broken.promoted
    assert "does not serve in a fresh process" in broken.reason


def test_a_slow_model_is_refused_with_the_limit():
    project = projects.project()
    none = np.zeros((3, 0))
    slow = ChallengerEvidence(
        tasks=[],
        labels=none,
        user=np.arange(3),
        lists=np.arange(3),
        challenger=none,
        serving=Serving(1.0, 500.0),
    )
    assert unfit(project, slow) == [
        "it takes 500 s to score a million rows, allowed 120 (promotion.max_seconds_per_million)"
    ]
    fast = dataclasses.replace(slow, serving=Serving(1.0, 3.0))
    assert unfit(project, fast) == []
