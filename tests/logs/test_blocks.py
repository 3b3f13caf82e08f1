"""Partitions of large days by ascending user, against a stable sort."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.point_in_time import AsOf
from mtl_ranker.features.view import aggregate_dataset
from mtl_ranker.logs import blocks
from mtl_ranker.logs.blocks import sorted_by_user, user_blocks
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST
from tests.projects import write_project

DAYS = [FIRST + timedelta(days=n) for n in range(6)]
NUMBERS = st.integers(-5, 5)
TEXTS = st.text("aäZ_1", max_size=3)


@given(
    users=st.lists(NUMBERS, min_size=1, max_size=40) | st.lists(TEXTS, min_size=1, max_size=40),
    size=st.integers(1, 12),
)
def test_rows_are_sorted_by_user_and_keep_their_order(users, size):
    rows = pl.DataFrame({"user_id": users}).with_row_index("block")  # a log may have such a column
    with (
        tempfile.TemporaryDirectory() as folder,
        sorted_by_user(rows.lazy(), Path(folder), size) as ordered,
    ):
        assert_frame_equal(ordered.collect(), rows.sort("user_id", maintain_order=True))


def test_the_order_of_a_user_is_kept_in_large_parts():
    """An unstable sort keeps it by chance in a few rows."""
    rows = pl.DataFrame({"user_id": [n % 3 for n in range(60_000)]}).with_row_index("n")
    with (
        tempfile.TemporaryDirectory() as folder,
        sorted_by_user(rows.lazy(), Path(folder), 20_000) as ordered,
    ):
        assert_frame_equal(ordered.collect(), rows.sort("user_id", maintain_order=True))


def users_of_groups(workspace: Workspace, dataset: str, day: date) -> list[tuple[int, int]]:
    """First and last user of each row group, by the file's statistics."""
    metadata = pq.read_metadata(workspace.file(workspace.place(dataset, day)))
    column = metadata.schema.names.index("user_id")
    groups = range(metadata.num_row_groups)
    found = [metadata.row_group(group).column(column).statistics for group in groups]
    return [(statistics.min, statistics.max) for statistics in found]


@pytest.fixture(params=[10, 40], ids=["in parts", "at once"])
def large_days(tiny, monkeypatch, request):
    """Days of 40 rows in row groups of 8, with blocks of 10 rows, and the same days as small ones.

    Ingested and aggregated.
    """
    monkeypatch.setattr(blocks, "ROW_GROUP", (8, 8))
    monkeypatch.setattr(blocks, "SORTED_AT_ONCE", request.param)
    opened = []
    for name, size in (("large", 10), ("small", 1000)):
        folder = tiny / name
        folder.mkdir()
        settings = {"block_rows": size}
        write_project(folder, features=settings)
        context = open_context(folder / "project.toml", tiny, folder / "ws")
        for day in context.source.days():
            ingest_day(context, day)
            aggregate_day(context, day)
        opened.append(context)
    return opened


def test_events_and_aggregates_of_users_are_stored_by_user(large_days):
    large, small = large_days
    by_user = [aggregate_dataset(large, keys) for keys in (["user_id"], ["user_id", "tab"])]
    for dataset in ("events", *by_user):
        groups = users_of_groups(large.workspace, dataset, FIRST)
        assert groups == sorted(groups)
        assert all(last <= first for (_, last), (first, _) in zip(groups, groups[1:], strict=False))
    assert len(users_of_groups(large.workspace, "events", FIRST)) == 5
    assert len(users_of_groups(small.workspace, "events", FIRST)) == 1
    rows = [c.workspace.scan("events", [FIRST]).collect() for c in large_days]
    assert_frame_equal(rows[0], rows[1].sort("user_id", maintain_order=True))


def test_examples_do_not_depend_on_the_order_in_which_events_are_stored(large_days):
    day = large_days[0].source.days()[-1]
    found = []
    for context in large_days:
        build_examples(context, day)
        rows = context.workspace.scan("examples", [day]).collect()
        found.append(rows.sort("timestamp", "user_id", "item_id").drop("row of the day"))
    assert_frame_equal(*found)


def test_windows_of_some_users_are_those_of_all(large_days):
    """A user between the least and the greatest of those needed gets no row."""
    large, _ = large_days
    day = large.source.days()[-1]
    rows = large.workspace.scan("events", [day])
    users = rows.select(pl.col("user_id").unique().sort()).collect()["user_id"].to_list()
    some = [users[1], users[-2]]
    every, few = (
        AsOf.build(large, each, day).entities[0].table.sort("user_id")
        for each in (rows, rows.filter(pl.col("user_id").is_in(some)))
    )
    assert_frame_equal(few, every.filter(pl.col("user_id").is_in(some)))
    assert few["user_id"].to_list() == some


def test_another_order_of_a_day_changes_its_provenance(large_days):
    """What refers to events by their place is then built again."""
    large, _ = large_days
    before = {day: large.workspace.published_fingerprint("events", day) for day in DAYS}
    features = large.project.features.model_copy(update={"block_rows": 1000})
    other = replace(large, project=large.project.model_copy(update={"features": features}))
    assert ingest_day(other, FIRST).skipped  # the setting alone builds nothing
    large.workspace.remove(large.workspace.place("events", FIRST))
    assert not ingest_day(other, FIRST).skipped
    after = {day: large.workspace.published_fingerprint("events", day) for day in DAYS}
    assert [day for day in DAYS if after[day] != before[day]] == [FIRST]
    assert aggregate_day(other, FIRST) == "changed: events"
    assert ingest_day(large, FIRST).skipped  # and the order stays


def test_blocks_are_of_whole_users():
    rows = pl.LazyFrame({"user_id": [3, 1, 1, 2, 1, 3]})
    found = [(b.first, b.last, b.rows) for b in user_blocks(rows, 3)]
    assert found == [(1, 1, 3), (2, 3, 3)]
