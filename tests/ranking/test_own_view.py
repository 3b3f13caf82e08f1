"""A saved model is scored with its own features, whatever the project file says by then."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.scoring import score_day
from tests.conftest import FIRST, write_log
from tests.projects import TINY, changed, project, write_project

LAST = FIRST + timedelta(days=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A context, a model as it was saved, and its ranking of the next day."""
    folder = tmp_path_factory.mktemp("own_view")
    write_project(folder)
    write_log(folder)
    context = open_context(str(folder / "project.toml"), folder, folder / "ws")
    build_split(context, LAST)
    saved = train_suite(context, LAST).winner.artifact.save(folder / "saved")
    ranker = RegisteredRanker(RankerArtifact.load(saved), "1")
    return context, ranker, ranking(context, ranker)


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
