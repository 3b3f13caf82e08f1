"""Which impressions make a list: a user's on one day, further divided by columns or requests."""

from __future__ import annotations

from datetime import date

import numpy as np
import polars as pl
import pytest

from mtl_ranker.config import Log
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.lists import list_ids
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.training.dataset import load_dataset
from tests.conftest import tiny_events, write_day
from tests.features.test_examples import build_days, tiny_context
from tests.projects import edit_project

FRAME = pl.DataFrame(
    {
        "date": [date(2026, 3, 2)] * 5 + [date(2026, 3, 3)],
        "user_id": [1, 1, 1, 1, 2, 1],
        "tab": ["a", "b", None, None, "a", "a"],
        "request": [7, 7, 8, None, 7, 7],
    }
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 0, 0, 0, 1, 2]),
        ({"list": ["user_id", "tab"]}, [0, 1, 2, 3, 4, 5]),
        ({"list": ["tab", "user_id"]}, [0, 1, 2, 3, 4, 5]),
        ({"request": "request"}, [0, 0, 1, 2, 3, 4]),
    ],
)
def test_a_list_is_of_one_day_and_user_and_of_every_further_column(settings, expected):
    """A row without a surface or a request is a list of its own."""
    found = list_ids(FRAME, Log(**settings).list_keys)
    numbers = {value: n for n, value in enumerate(dict.fromkeys(found.tolist()))}
    assert [numbers[value] for value in found.tolist()] == expected


def test_a_list_is_the_same_in_a_part_of_the_rows():
    keys = Log(list=["user_id", "tab"]).list_keys
    whole, rest = list_ids(FRAME, keys), list_ids(FRAME[4:], keys)
    np.testing.assert_array_equal(whole[4:], rest)


def with_requests(root):
    """The tiny log, each user's impressions of a day served two at a time."""
    for n in range(6):
        day = date(2026, 3, 2 + n)
        request = (pl.int_range(pl.len()).over("u") // 2).alias("request")
        write_day(root, day, tiny_events(day, shift=n).with_columns(request))


def test_the_request_of_an_impression_is_read_though_no_feature_uses_it(tiny):
    with_requests(tiny)
    edit_project(tiny, log={"request": "request"})
    context = tiny_context(tiny)
    build_days(context)
    days = context.source.days()
    for day in days:
        build_examples(context, day)
    dataset = load_dataset(context, days[-1])
    frame = dataset.held_out.frame
    served = frame.select("date", "user_id", "request").unique().height
    assert len(np.unique(dataset.held_out.lists)) == served
    assert served > frame["user_id"].n_unique()
    train, rows = dataset.frames["train"], dataset.examples["train"]
    assert len(rows.lists.unique()) == train.select("date", "user_id", "request").unique().height


def test_another_list_of_known_columns_rebuilds_nothing(tiny):
    context = tiny_context(tiny)
    build_days(context)
    last = context.source.days()[-1]
    build_examples(context, last)
    edit_project(tiny, log={"list": ["user_id", "tab"]})  # tab is context, which examples have
    context = tiny_context(tiny)
    assert ingest_day(context, last).skipped
    assert build_examples(context, last) is None


def test_a_list_column_that_the_log_lacks_is_named(tiny):
    edit_project(tiny, log={"list": ["user_id", "surface"]})
    context = tiny_context(tiny)
    with pytest.raises(ProjectError, match=r"column 'surface' \(named by log\.list\) is missing"):
        ingest_day(context, context.source.days()[-1])
