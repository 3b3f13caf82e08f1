"""Candidate sets: given with keys of other types, incomplete ones, and generated ones."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import polars as pl
import pytest

from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from mtl_ranker.ranking.candidates import (
    cast_keys,
    describe_candidates,
    generate_candidates,
    load_candidates,
    prepared_candidates,
)
from tests.conftest import FIRST, tiny_events, write_day, write_log
from tests.projects import write_project
from tests.ranking.test_scoring import write_candidates


@pytest.fixture
def context(tmp_path):
    write_project(tmp_path, scoring={"candidates": "candidates"})
    write_log(tmp_path)
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    for day in context.source.days():
        ingest_day(context, day)
    return context


def events_of(context) -> pl.Schema:
    return context.workspace.scan("events", [FIRST]).collect_schema()


def test_given_candidates_are_cast_to_the_logs_types(context):
    write_candidates(context, FIRST, pl.DataFrame({"u": ["1", "2"], "i": [3.0, 4.0]}))
    rows = load_candidates(context, FIRST)
    cast = cast_keys(rows, events_of(context), FIRST).collect()
    assert cast.rows() == [(1, 3), (2, 4)]
    assert cast.dtypes == [pl.Int64, pl.Int64]


def test_an_id_that_is_no_number_is_an_error(context):
    write_candidates(context, FIRST, pl.DataFrame({"u": ["1", "anna"], "i": [3, 4]}))
    rows = load_candidates(context, FIRST)
    with pytest.raises(ProjectError, match=r"'user_id' is String and holds \['anna'\].*Int64"):
        cast_keys(rows, events_of(context), FIRST)


def test_a_surface_is_cast_to_the_logs_type(context):
    write_candidates(context, FIRST, pl.DataFrame({"u": [1], "i": [3], "tab": [1]}))
    rows = load_candidates(context, FIRST)
    assert cast_keys(rows, events_of(context), FIRST, ["tab"]).collect()["tab"].to_list() == ["1"]


def test_a_missing_set_column_or_user_is_an_error(context):
    with pytest.raises(ProjectError, match="no candidate set for 2026-03-02"):
        load_candidates(context, FIRST)
    write_candidates(context, FIRST, pl.DataFrame({"u": [1], "item": [3]}))
    with pytest.raises(ProjectError, match=r"column 'i' \(the item\) is missing; it has: u, item"):
        load_candidates(context, FIRST)
    write_candidates(
        context, FIRST + timedelta(days=1), pl.DataFrame({"u": [1, None], "i": [3, 3]})
    )
    with pytest.raises(ProjectError, match="1 rows lack a user or an item"):
        load_candidates(context, FIRST + timedelta(days=1))


def test_generated_candidates_are_active_users_times_recent_items_with_context(context):
    day = FIRST + timedelta(days=6)
    candidates = generate_candidates(context, day).collect()
    last = context.workspace.scan("events", [day - timedelta(days=1)]).collect()
    assert set(candidates["user_id"]) == set(last["user_id"])
    active = last.group_by("user_id").len().sort(["len", "user_id"], descending=[True, False])
    assert candidates["user_id"].unique(maintain_order=True).equals(active["user_id"])
    assert candidates.group_by("user_id").len()["len"].unique().to_list() == [13]
    for user, rows in last.group_by("user_id"):
        modes = rows["tab"].mode().to_list()
        assert set(candidates.filter(pl.col("user_id") == user[0])["tab"]) <= set(modes)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"u": [1.9], "i": [3]}, r"'user_id' is Float64 and holds \[1.9\], but it is Int64"),
        ({"u": [2.0**53 + 2], "i": [3]}, r"'user_id' is Float64 and holds"),
        ({"u": ["01"], "i": [3]}, r"'user_id' is String and holds \['01'\]"),
        ({"u": [True], "i": [3]}, "'user_id' is Boolean, but it is Int64 in the log; allowed"),
        ({"u": [[1]], "i": [3]}, r"'user_id' is List\(Int64\), but it is Int64"),
        ({"u": [1], "user_id": [1], "i": [3]}, "has both 'u' and 'user_id'"),
        ({"u": [1], "i": [3], "tab": [["a"]]}, r"'tab' is List\(String\), but it is String"),
    ],
)
def test_values_that_are_no_ids_are_refused(context, frame, message):
    write_candidates(context, FIRST, pl.DataFrame(frame))
    with pytest.raises(ProjectError, match=message):
        prepared_candidates(context, FIRST)


def test_files_of_different_kinds_are_refused_and_of_different_widths_are_read(context):
    write_candidates(context, FIRST, pl.DataFrame({"u": [1], "i": [3]}))
    other = context.source.root / f"candidates/date={FIRST}/b.parquet"
    pl.DataFrame({"u": [2], "i": [4]}).cast(pl.Int16).write_parquet(other)
    rows = prepared_candidates(context, FIRST).collect()
    assert rows.select("user_id", "item_id").rows() == [(1, 3), (2, 4)]
    pl.DataFrame({"u": ["2"], "i": [4]}).write_parquet(other)
    with pytest.raises(ProjectError, match=r"b.parquet: column 'u' is String, but Int64 in .*a.p"):
        prepared_candidates(context, FIRST)


def test_unknown_users_and_items_and_repeated_pairs_are_counted(context):
    rows = {"u": [1, 99, 99, 1], "i": [3, 3, 77, 3], "tab": ["home", "home", "home", "search"]}
    day = FIRST + timedelta(days=3)
    write_candidates(context, day, pl.DataFrame(rows))
    text = describe_candidates(context, day)
    assert "4 candidates of 2 users and 2 items" in text
    assert "without an event in the last 3 days: 1 users, 1 items" in text


def test_context_values_that_no_event_has_are_counted(context):
    rows = {"u": [1, 1, 1, 1], "i": [3, 4, 5, 6], "tab": ["home", "shop", "cart", "shop"]}
    day = FIRST + timedelta(days=3)
    write_candidates(context, day, pl.DataFrame(rows))
    text = describe_candidates(context, day)
    assert text.endswith("; 3 rows with a tab that no event has (cart, shop)")


def test_a_context_value_outside_the_logs_range_is_refused(tmp_path):
    write_project(
        tmp_path,
        log={"context": ["tab", "price"], "ranges": {"price": {"min": 0, "max": 9}}},
        scoring={"candidates": "candidates"},
    )
    write_day(tmp_path, FIRST, tiny_events(FIRST).with_columns(price=pl.lit(1.5)))
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    ingest_day(context, FIRST)
    rows = pl.DataFrame({"u": [1, 1, 1], "i": [3, 4, 5], "price": [9.0, 9.5, None]})
    write_candidates(context, FIRST, rows)
    message = r"'price' holds \[9.5\] in 1 rows, outside \[0, 9\] \(log.ranges.price\)"
    with pytest.raises(ProjectError, match=message):
        prepared_candidates(context, FIRST)
    prepared_candidates(context, FIRST, checked=True)


def test_a_context_column_that_left_the_log_is_null(context):
    """The last day has no such column, but a saved model has it as context."""
    log = context.project.log.model_copy(update={"context": ["tab", "gone"]})
    moved = replace(context, project=context.project.model_copy(update={"log": log}))
    write_candidates(context, FIRST, pl.DataFrame({"u": [1], "i": [3], "tab": ["home"]}))
    assert prepared_candidates(moved, FIRST).collect()["gone"].to_list() == [None]


def test_a_number_that_depends_on_the_item_is_the_items_in_generated_candidates(tmp_path):
    """Prices are the item's, warmth is the user's; both are context."""
    write_project(tmp_path, log={"context": ["tab", "price", "warmth"]})
    for number in range(4):
        day = FIRST + timedelta(days=number)
        frame = tiny_events(day).with_columns(
            price=pl.col("i") * 10.0 + number, warmth=pl.col("u") * 1.5
        )
        write_day(tmp_path, day, frame)
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    for day in context.source.days():
        ingest_day(context, day)
    candidates = generate_candidates(context, FIRST + timedelta(days=4)).collect()
    # The median of the last three days, of which the second is 2.
    expected = candidates["item_id"] * 10.0 + 2
    assert candidates["price"].to_list() == expected.to_list()
    assert candidates["warmth"].to_list() == (candidates["user_id"] * 1.5).to_list()
