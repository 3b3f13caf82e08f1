"""A saved model is scored with its own features, whatever the project file says by then."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtl_ranker.context import Context
from mtl_ranker.features.view import view_digest, views_of
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST, write_log
from tests.projects import TINY, changed, project, write_project

LAST = FIRST + timedelta(days=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A context, a model as it was saved, and its ranking of the next day."""
    folder = tmp_path_factory.mktemp("own_view")
    context = opened(folder)
    build_split(context, LAST)
    saved = train_suite(context, LAST).winner.artifact.save(folder / "saved")
    ranker = RegisteredRanker(RankerArtifact.load(saved), "1")
    return context, ranker, ranking(context, ranker)


def opened(folder) -> Context:
    write_project(folder)
    write_log(folder)
    return open_context(str(folder / "project.toml"), folder, folder / "ws")


def ranking(context, ranker) -> pl.DataFrame:
    return pl.read_parquet(score_day(context, ranker, LAST + timedelta(days=1)).path)


entities = st.lists(
    st.sampled_from([["user_id"], ["item_id"], ["tab"], ["user_id", "tab"], ["item_id", "tab"]]),
    min_size=1,
    unique_by=tuple,
)
edits = st.fixed_dictionaries(
    {},
    optional={
        "windows": st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True).map(sorted),
        "rates": st.sampled_from(["absolute", "relative"]),
        "smoothing": st.floats(0.5, 100),
        "entities": entities,
        "signals": st.sampled_from([{}, {"seconds": "play"}, {"half": "play / 2", "one": "1"}]),
        "categoricals": st.sampled_from([[], [{"column": "item_id"}], [{"column": "tab"}]]),
        "numeric_encoding": st.sampled_from(["piecewise_linear", "standardise"]),
        "bins": st.integers(2, 16),
    },
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(edits)
def test_an_edit_of_the_features_changes_nothing_in_a_saved_models_ranking(trained, features):
    context, ranker, expected = trained
    edited = replace(context, project=project(features=features))
    assert ranking(edited, ranker).equals(expected)


@pytest.mark.parametrize(
    "objectives",
    [
        TINY["objectives"][::-1],
        changed(TINY["objectives"], 1, name="longer"),
        changed(TINY["objectives"], 1, label="case when play > 3 then 1 else 0 end"),
        TINY["objectives"][:1],
    ],
    ids=["reordered", "renamed", "another label", "one removed"],
)
def test_nor_does_an_edit_of_the_objectives(trained, objectives):
    context, ranker, expected = trained
    edited = replace(context, project=project(objectives=objectives))
    assert ranking(edited, ranker).equals(expected)


def test_top_k_is_tonights(trained):
    context, ranker, expected = trained
    edited = replace(context, project=project(scoring={"top_k": 2}))
    assert ranking(edited, ranker).equals(expected.filter(pl.col("rank") <= 2))


def test_only_the_views_of_models_with_other_features_are_needed(trained):
    context, ranker, _ = trained
    model = (ranker.artifact.project, ranker.artifact.sql)
    other = (project(features={"rates": "relative"}), ranker.artifact.sql)
    assert views_of(context, [model]) == set()
    edited = replace(context, project=project(features={"windows": [2]}))
    [own] = views_of(edited, [model])
    assert views_of(edited, [model, other]) == {own} | views_of(edited, [other])
    assert own not in views_of(edited, [other])


@pytest.mark.parametrize(
    "features",
    [
        {"windows": [2]},
        {"smoothing": 7.0},
        {"rates": "relative"},
        {"entities": [["user_id"]]},
        {"signals": {"half": "play / 2"}},
        {"categoricals": [{"column": "tab"}]},
        {"lists": [{"column": "tags"}]},
        {"numerics": ["price"]},
        {"histories": [{"signal": "click", "columns": ["tab"], "length": 2}]},
    ],
    ids=lambda features: next(iter(features)),
)
def test_every_setting_that_changes_a_feature_changes_the_view(trained, features):
    """Examples of the champion would otherwise be taken from those of the project file."""
    context, _, _ = trained
    edited = replace(context, project=project(features=features))
    assert view_digest(edited) != view_digest(context)
    same = replace(context, project=project(features={"bins": 3}))
    assert view_digest(same) == view_digest(context)


def test_days_that_only_the_models_windows_read_are_ingested(trained, tmp_path):
    """The project's windows were shortened and nights were missed, so that days are unpublished."""
    context, ranker, expected = trained
    short = replace(
        context, project=project(features={"windows": [1]}), workspace=Workspace(tmp_path)
    )
    ingest_day(short, LAST)
    assert ranking(short, ranker).equals(expected)


def test_a_last_day_that_cannot_be_read_is_not_needed(trained, tmp_path):
    """After a failed ingest of the last day the champion ranks with the days before."""
    context = opened(tmp_path)
    for day in context.source.days()[:-1]:
        ingest_day(context, day)
    (tmp_path / "log" / f"date={LAST}" / "part-0.parquet").write_bytes(b"PAR1 and no more")
    _, ranker, _ = trained
    assert ranking(context, ranker).height > 0
    assert LAST not in context.workspace.days("events")
