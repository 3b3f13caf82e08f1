"""Item popularity as a ranker: its predictions are the smoothed means, whatever the kind."""

from __future__ import annotations

import polars as pl
import pytest

from mtl_ranker.nightly.popularity import (
    BASE_RATE,
    NAME,
    fit_base_rate,
    fit_popularity,
    name_of,
    smoothed_means,
)
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.training.network import tasks_of
from tests.projects import project

OBJECTIVES = [
    {"name": "click", "group": "engagement", "label": "click"},
    {"name": "buy", "group": "engagement", "label": "buy", "conditional_on": "click"},
    {"name": "money", "group": "engagement", "label": "m", "kind": "regression"},
    {
        "name": "logged",
        "group": "engagement",
        "label": "m",
        "kind": "regression",
        "transform": "log1p",
    },
    {"name": "seconds", "group": "engagement", "label": "s", "kind": "watch_time"},
    {"name": "stars", "group": "satisfaction", "label": "r", "kind": "ordinal", "levels": 5},
]
ROWS = pl.DataFrame(
    {
        "item_id": ["a", "a", "a", "b", "b", None],
        "label_click": [1, 1, 0, 0, 0, 1],
        "label_buy": [1, 0, 0, 0, 0, 0],
        "label_money": [4.0, 0.0, 2.0, 0.0, 0.0, 0.0],
        "label_logged": [4.0, 0.0, 2.0, 0.0, 0.0, 0.0],
        "label_seconds": [9.0, 3.0, 0.0, 0.0, 0.0, 0.0],
        "label_stars": [4.0, None, 2.0, None, 1.0, None],
    }
)


@pytest.fixture
def popularity():
    settings = project(objectives=OBJECTIVES)
    return fit_popularity(settings, ROWS.lazy(), None)


def test_means_are_smoothed_by_hand():
    means = smoothed_means(tasks_of(project(objectives=OBJECTIVES)), ROWS.lazy())
    assert means["item_id"].to_list() == [None, "a", "b"]
    assert means["click"].to_list() == pytest.approx(
        [0.5, (2 + 20 * 0.5) / 23, (0 + 20 * 0.5) / 22]
    )
    mean = 7 / 3  # of three stars; item a has two of them, b one
    assert means["stars"].to_list() == pytest.approx(
        [mean, (6 + 20 * mean) / 22, (1 + 20 * mean) / 21]
    )


def test_predictions_of_every_kind_are_the_means(popularity):
    means = smoothed_means(popularity.tasks, ROWS.lazy())
    rows = pl.DataFrame({"item_id": ["b", "never seen", "a", None]})
    expected = means[[2, 0, 1, 0]].drop("item_id")
    found = popularity.predict(rows)
    for name in expected.columns:
        assert found[name].to_list() == pytest.approx(expected[name].to_list(), abs=1e-5), name
    assert popularity.columns == ["item_id"]


def test_it_is_saved_and_loaded(popularity, tmp_path):
    rows = pl.DataFrame({"item_id": ["b", "a", "c"]})
    loaded = RankerArtifact.load(popularity.save(tmp_path / "saved"))
    assert loaded.predict(rows).equals(popularity.predict(rows))


def test_an_objective_without_any_label_is_zero():
    rows = ROWS.with_columns(pl.lit(None, pl.Float64).alias("label_stars"))
    means = smoothed_means(tasks_of(project(objectives=OBJECTIVES)), rows.lazy())
    assert means["stars"].to_list() == [0.0, 0.0, 0.0]


def test_the_base_rate_is_popularity_over_no_items(popularity, tmp_path):
    base = fit_base_rate(project(objectives=OBJECTIVES), ROWS.lazy(), None)
    loaded = RankerArtifact.load(base.save(tmp_path / "saved"))
    means = smoothed_means(base.tasks, ROWS.lazy()).row(0, named=True)
    found = loaded.predict(pl.DataFrame({"item_id": ["b", "never seen", None]}))
    for task in base.tasks:
        assert found[task.name].to_list() == pytest.approx([means[task.name]] * 3, abs=1e-5)
    assert loaded.fixed
    assert (name_of(loaded), name_of(popularity)) == (BASE_RATE, NAME)
