"""A back-test lives the nights that `nightly` would have lived, and looks at each day once."""

from __future__ import annotations

from datetime import timedelta

import pytest

from mtl_ranker.config import load_project
from mtl_ranker.context import Context, without_log
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.metrics import evaluate_all
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.days import split_days
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_source
from mtl_ranker.nightly.backtest import POLICIES, backtest
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST, write_log


@pytest.fixture
def nine_days(tiny):
    write_log(tiny, days=9)
    return load_project(str(tiny / "project.toml")), open_source_of(tiny), Workspace(tiny / "ws")


def open_source_of(root):
    return open_source(load_project(str(root / "project.toml")), root)


def test_kept_is_the_first_nights_model_and_retrained_the_last_ones(nine_days):
    project, source, workspace = nine_days
    first, last = FIRST + timedelta(days=6), FIRST + timedelta(days=8)
    found = backtest(Context(project, source, workspace), first, last)
    assert found.days == [first, first + timedelta(days=1), last]
    nights = {(r.day, r.policy): r.night for r in found.replayed}
    for day in found.days:
        assert nights[day, "kept"] == first - timedelta(days=1)
        assert nights[day, "retrained"] == day - timedelta(days=1)
        assert nights[day, "champion"] < day
    first_day = [r.metrics for r in found.replayed if r.day == first]
    assert first_day[0] == first_day[1] == first_day[2]
    assert len(found.replayed) == len(POLICIES) * 3
    assert set(found.gains) == {(p, o) for p in POLICIES[1:] for o in ("click", "long")}


def test_a_day_is_ranked_as_a_night_by_hand_would(nine_days, tmp_path):
    """The retrained policy's metrics are those of a training on the night before, no day later."""
    project, source, workspace = nine_days
    day = FIRST + timedelta(days=7)
    found = backtest(Context(project, source, workspace), day, day)
    alone = Workspace(tmp_path / "alone")
    night = day - timedelta(days=1)
    for each in source.days()[:8]:
        ingest_day(Context(project, source, alone), each)
        aggregate_day(Context(project, source, alone), each)
    split = split_days(project, source.days()[:7], night)
    for each in [*split.train, *split.validate, *split.test, day]:
        build_examples(Context(project, source, alone), each)
    winner = train_suite(without_log(project, alone), night).winner
    frame = alone.scan("examples", [day]).collect()
    names = [task.name for task in winner.artifact.tasks]
    labels = frame.select([f"label_{n}" for n in names]).cast(float).fill_null(float("nan"))
    expected = evaluate_all(
        list(winner.artifact.tasks),
        labels.to_numpy(),
        winner.artifact.predict(frame).select(names).to_numpy(),
        frame["user_id"].to_numpy(),
    )
    retrained = next(r for r in found.replayed if r.policy == "retrained")
    for name in names:
        assert retrained.metrics[name] == pytest.approx(expected[name], nan_ok=True)


def test_a_span_without_a_night_before_it_is_named(nine_days):
    project, source, workspace = nine_days
    with pytest.raises(ProjectError, match=r"--from 2026-03-02: the night before needs 2026-03-01"):
        backtest(Context(project, source, workspace), FIRST, FIRST + timedelta(days=2))
    with pytest.raises(ProjectError, match=r"split\.(train|validate)_days.*empty"):
        backtest(
            Context(project, source, workspace),
            FIRST + timedelta(days=2),
            FIRST + timedelta(days=3),
        )
    late = FIRST + timedelta(days=50)
    with pytest.raises(ProjectError, match="no day of the log; days found: 2026-03-02 to"):
        backtest(Context(project, source, workspace), late, late)
