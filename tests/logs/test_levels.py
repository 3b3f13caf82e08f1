"""Ordinal labels whose levels do not begin with 0."""

from __future__ import annotations

from datetime import timedelta

import polars as pl
import pytest

from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from mtl_ranker.training.network import tasks_of
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import write_project

STARS = pl.Series([1, 2, 3, 4, 5, None, 0, 6] * 5)


@pytest.mark.parametrize(
    ("levels", "good", "labels"),
    [
        ([1, 2, 3, 4, 5], 30, {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, None: None}),
        ([-1, 0, 1], 15, {0: 1, 1: 2, None: None}),
        (5, 30, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, None: None}),
    ],
)
def test_labels_count_from_the_lowest_level(tmp_path, levels, good, labels):
    objective = {
        "name": "stars",
        "group": "satisfaction",
        "kind": "ordinal",
        "label": "stars",
        "levels": levels,
    }
    write_project(tmp_path, log={"max_bad_share": 1.0}, objectives=[objective])
    for n in range(2):
        day = FIRST + timedelta(days=n)
        write_day(tmp_path, day, tiny_events(day, shift=n).with_columns(STARS.alias("stars")))
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    for day in context.source.days():
        report = ingest_day(context, day)
        aggregate_day(context, day)
    assert report.good == good
    lowest = levels[0] if isinstance(levels, list) else 0
    count = len(levels) if isinstance(levels, list) else levels
    assert list(report.reasons) == [f"label of stars not in {lowest}..{lowest + count - 1}"]
    build_examples(context, FIRST + timedelta(days=1))
    events = context.workspace.scan("events", [FIRST + timedelta(days=1)]).collect()
    examples = context.workspace.scan("examples", [FIRST + timedelta(days=1)]).collect()
    given = events.sort("timestamp", "user_id", "item_id")["stars"].to_list()
    assert examples["label_stars"].to_list() == [labels[value] for value in given]
    assert tasks_of(context.project)[0].levels == count
