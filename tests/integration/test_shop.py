"""A night of the simulated shop with its preset, and one on soft labels of the feed's streams."""

from __future__ import annotations

import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mtl_ranker.commands.check import check_project
from mtl_ranker.config import read_project_text
from mtl_ranker.features.audit import audit_day
from mtl_ranker.logs.shop import FIRST, Size, make_shop, write_streams
from mtl_ranker.logs.simulate import Feed, simulate
from tests.nights import run_night
from tests.projects import write_project

DAYS = 34


def preset(folder: Path, name: str, **changes: Any) -> Path:
    """The folder with the preset as its project file, changed for a short night."""
    base = tomllib.loads(read_project_text(name)[0])
    short = {"training": {"epochs": 1, "spread_seeds": 0, "audit_rows": 10}}
    write_project(folder, base, **(short | changes))
    return folder


@pytest.mark.slow
def test_a_night_of_the_shop(tmp_path):
    size = Size(24_000, days=DAYS, delayed=True)
    write_streams(make_shop(size), tmp_path, 0)
    preset(tmp_path, "shop", models={"mmoe": {"preset": "mmoe"}})
    said = "\n".join(check_project(str(tmp_path / "project.toml"), tmp_path))
    assert "ok  returned: " in said
    night = run_night(tmp_path)
    context, last = night.context, FIRST + timedelta(days=DAYS - 1)
    assert context.last_day() == last
    assert night.suite.days.test == [last]
    assert audit_day(context, last, 20).differences == []
    labels = dict(
        zip((t.name for t in night.suite.tasks), night.suite.held_out.labels.T, strict=True)
    )
    assert np.isnan(labels["returned"]).all()
    assert 0.5 < night.suite.winner.metrics["click"]["auc"] < 1
    ranked = context.workspace.scan("rankings", [last + timedelta(days=1)]).collect()
    chance = (ranked["returned"] > 0) & (ranked["returned"] < 0.5)
    assert chance.all()
    weights = context.project.blend_weights
    assert weights["returned"] < 0


@pytest.mark.slow
def test_a_night_on_soft_labels_judges_what_is_final(tmp_path):
    simulate(Feed(20_000, 10, FIRST, users=300, items=200, streams=True), tmp_path)
    night = run_night(preset(tmp_path, "streams", training={"immature": "soft", "epochs": 1}))
    metrics = night.suite.winner.metrics
    assert metrics["click"]["auc"] > 0.5
    assert np.isnan(metrics["like"]["auc"])
    assert any("(like)" in text and "left out" in text for text in night.suite.unlabelled)
    predicted = pl.Series(night.suite.winner.test_prediction[:, 2])
    truth = pl.read_parquet(tmp_path / f"truth/date={night.suite.days.test[0]}/*.parquet")
    expected = (truth["click_probability"] * truth["like_given_click"]).mean()
    assert predicted.mean() == pytest.approx(expected, rel=0.5)
    assert night.ranked.rows > 0
