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
    ContextSource,
    candidate_days,
    cast_keys,
    check_candidates,
    describe_candidates,
    describe_generated,
    generate_candidates,
    generated_context,
    load_candidates,
    prepared_candidates,
)
from tests.conftest import FIRST, tiny_events, write_day, write_log
from tests.projects import edit_project, project, write_project
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
    expected = candidates["item_id"] * 10.0 + 3  # of the last day
    assert candidates["price"].to_list() == expected.to_list()
    assert candidates["warmth"].to_list() == (candidates["user_id"] * 1.5).to_list()


def priced(folder, last_day, **project):
    """A context of four days; the last has further columns."""
    write_project(folder, **project)
    for number in range(4):
        day = FIRST + timedelta(days=number)
        write_day(folder, day, tiny_events(day).with_columns(last_day))
    context = open_context(str(folder / "project.toml"), folder, folder / "ws")
    for day in context.source.days():
        ingest_day(context, day)
    return context


NEXT = FIRST + timedelta(days=4)
STOCK = {"path": "items.parquet", "key": "i", "columns": ["price"]}


def items(folder, **columns):
    pl.DataFrame({"i": range(13), **columns}).write_parquet(folder / "items.parquet")


def test_context_that_is_a_column_of_the_item_table_is_the_tables(tmp_path):
    items(tmp_path, price=[n * 2.5 for n in range(13)])
    log = {"context": ["tab", "price"], "items": STOCK}
    context = priced(tmp_path, pl.lit(1.0).alias("price"), log=log)
    candidates = generate_candidates(context, NEXT).collect()
    assert candidates["price"].to_list() == (candidates["item_id"] * 2.5).to_list()


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pl.col("i") * 3, ContextSource("extra", "item")),
        (pl.col("i").cast(pl.String), ContextSource("extra", "item")),
        (pl.col("i") > 6, ContextSource("extra", "item")),
        (pl.col("u") * 3, ContextSource("extra", "user")),
        (pl.col("u").cast(pl.String), ContextSource("extra", "user")),
        (pl.lit("same"), ContextSource("extra", "user")),
        # The item says what it is apart from the user's discount of a quarter of the range.
        (pl.col("i") * 100.0 + pl.col("u") * 20.0, ContextSource("extra", "item")),
    ],
)
def test_where_generated_context_is_from(tmp_path, column, expected):
    context = priced(tmp_path, column.alias("extra"), log={"context": ["tab", "extra"]})
    assert generated_context(context, NEXT) == [ContextSource("tab", "user"), expected]
    line = next(describe_generated(context, NEXT))
    assert line.startswith("generated from the log: tab")


def test_context_that_varies_within_a_request_is_never_the_users(tmp_path):
    """Four items a request. The distance is of user and item, the hour is of the request."""
    request = (pl.int_range(40) // 4).alias("request")
    distance = ((pl.col("u") * 7 + pl.col("i") * 11) % 13 * 1.5).alias("distance")
    log = {"context": ["hour", "distance"], "request": "request"}
    columns = [request, distance, (pl.int_range(40) // 4 % 3).alias("hour")]
    features = {"entities": [["user_id"], ["item_id"]], "categoricals": [{"column": "hour"}]}
    context = priced(tmp_path, columns, log=log, features=features)
    found = generated_context(context, NEXT)
    assert found == [ContextSource("hour", "user"), ContextSource("distance", "item", True)]
    _, warning = describe_generated(context, NEXT)
    assert "'distance' depends on the item and on other things" in warning
    rows = generate_candidates(context, NEXT).collect()
    assert rows.group_by("item_id").agg(pl.col("distance").n_unique())["distance"].max() == 1


@pytest.mark.parametrize("dtype", [pl.Boolean, pl.Int8])
def test_only_eligible_items_are_candidates(tmp_path, dtype):
    """Of 13 items three are in stock, one is unknown; 99 is not in the table."""
    stock = pl.Series([n in (2, 3, 5) for n in range(12)] + [None]).cast(dtype)
    items(tmp_path, price=[1.0] * 13, in_stock=stock)
    scoring = {"eligible": "in_stock", "generated_items": 2}
    context = priced(tmp_path, [], log={"items": STOCK}, scoring=scoring)
    generated = prepared_candidates(context, NEXT).collect()
    assert len(set(generated["item_id"])) == 2
    assert set(generated["item_id"]) < {2, 3, 5}
    edit_project(tmp_path, scoring={"candidates": "candidates"})
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    rows = pl.DataFrame({"u": [1] * 6, "i": [5, 4, 2, 99, 12, 3]})
    write_candidates(context, NEXT, rows)
    given = prepared_candidates(context, NEXT).collect()
    assert given["item_id"].to_list() == [5, 2, 3]
    assert given.columns == ["user_id", "item_id", "tab"]
    assert "; 3 more are of items that are not in_stock" in describe_candidates(context, NEXT)


def test_eligible_is_a_flag_of_the_item_table(tmp_path):
    with pytest.raises(ProjectError, match=r"scoring.eligible: 'in_stock'; allowed: a column of"):
        project(scoring={"eligible": "in_stock"})
    items(tmp_path, price=["dear"] * 13)
    context = priced(tmp_path, [], log={"items": STOCK}, scoring={"eligible": "price"})
    with pytest.raises(ProjectError, match=r"'price' \(scoring.eligible\) is String; allowed: B"):
        prepared_candidates(context, NEXT)


@pytest.mark.parametrize(
    ("partition", "folder"),
    [
        ("dt=%Y%m%d", "dt=20260306/hour=01"),
        ("year=%Y/month=%m/day=%d", "year=2026/month=3/day=6"),
        ("dt=%Y%m%d", "date=2026-03-06"),
    ],
)
def test_candidates_lie_in_the_logs_layout(tmp_path, partition, folder):
    log = {"path": "x", "partition": partition}
    write_project(tmp_path, log=log, scoring={"candidates": "candidates"})
    place = tmp_path / "candidates" / folder
    place.mkdir(parents=True)
    pl.DataFrame({"u": [1], "i": [3]}).write_parquet(place / "a.parquet")
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    assert candidate_days(context) == [NEXT]
    assert load_candidates(context, NEXT).collect().rows() == [(1, 3)]


def test_a_night_refuses_candidates_that_break_the_contract_at_once(context):
    """Without published events; a set that is missing may arrive while the night trains."""
    check_candidates(context, NEXT)
    write_candidates(context, NEXT, pl.DataFrame({"u": [[1]], "i": [3]}))
    with pytest.raises(ProjectError, match=r"'user_id' is List\(Int64\), but it is an integer or"):
        check_candidates(context, NEXT)
    other = NEXT + timedelta(days=1)
    write_candidates(context, other, pl.DataFrame({"u": [1]}))
    with pytest.raises(ProjectError, match=r"column 'i' .* is missing; it has: u"):
        check_candidates(context, other)


def test_coverage_is_that_of_the_last_days_events(context):
    day = FIRST + timedelta(days=1)
    write_candidates(context, day, pl.DataFrame({"u": [1], "i": [3]}))
    frame = tiny_events(FIRST)
    users, found = (int((frame[c] == v).sum()) for c, v in (("u", 1), ("i", 3)))
    words = f"of {FIRST}'s events {users / 40:.0%} have a user and {found / 40:.0%} an item among"
    assert words in describe_candidates(context, day)
