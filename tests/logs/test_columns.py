"""Types and values of the columns that settings name: read as they are meant, or refused."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pytest

from mtl_ranker.config import Log, Requests
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.tables import tables_as_of
from mtl_ranker.features.view import model_context
from mtl_ranker.logs.discover import Time, discover, moments_of
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.requests import shown_items
from mtl_ranker.logs.sources import open_context
from mtl_ranker.ranking.candidates import prepared_candidates
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import WITHOUT, edit_project, project, write_project

SHANGHAI = ZoneInfo("Asia/Shanghai")
EPOCH = date(1970, 1, 1)


def opened(folder: Path, **changes: Any) -> Context:
    write_project(folder, **changes)
    return open_context(str(folder / "project.toml"), folder, folder / "ws")


def undivided(folder: Path, column: pl.Series) -> Context:
    rows = tiny_events(FIRST, rows=len(column)).with_columns(column.alias("day"))
    rows.write_parquet(folder / "log.parquet")
    return opened(
        folder, log={"path": "log.parquet", "partition": "day", "timezone": "Asia/Shanghai"}
    )


@pytest.mark.parametrize(
    "column",
    [
        pl.Series([datetime(2026, 11, 2, 1, tzinfo=SHANGHAI)]),
        pl.Series([datetime(2026, 11, 1, 17, tzinfo=UTC)]),
        pl.Series([datetime(2026, 11, 2, 1)]),
        pl.Series([date(2026, 11, 2)]),
        pl.Series(["2026-11-02"]),
    ],
)
def test_the_column_of_the_day_is_read_in_the_zone_of_the_log(tmp_path, column):
    context = undivided(tmp_path, column)
    assert context.source.days() == [date(2026, 11, 2)]
    assert context.source.scan_day(date(2026, 11, 2)).collect().height == 1


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pl.Series(["20261101", "1 Nov"]), r"'day' \(log.partition\) holds \['1 Nov', '20261101'"),
        (
            pl.Series([20261101]),
            r"'day' \(log.partition\) is Int64; allowed: Date, Datetime",
        ),
    ],
)
def test_a_column_that_says_no_day_is_refused(tmp_path, column, message):
    with pytest.raises(ProjectError, match=message):
        undivided(tmp_path, column).source.days()


def items_table(folder: Path, column: pl.Series, **table: Any) -> pl.DataFrame:
    frame = pl.DataFrame({"i": range(len(column))}).with_columns(column.alias("p"))
    frame.write_parquet(folder / "items.parquet")
    items = {"path": "items.parquet", "key": "i", **table}
    context = opened(folder, log={"items": items, "timezone": "Asia/Shanghai"})
    return tables_as_of(context.source, FIRST)["item_id"].collect()


@pytest.mark.parametrize(
    ("column", "days"),
    [
        (pl.Series([datetime(2026, 3, 1, 1, tzinfo=SHANGHAI)]), [1]),
        (pl.Series([datetime(2026, 3, 1, 23)]), [1]),
        (pl.Series([date(2026, 3, 1), None]), [1, None]),
        (pl.Series(["2026-03-01", "2026-03-01 23:30:00", "2026-03-01T17:00:00Z", ""]), [1, 1, 2]),
    ],
)
def test_days_of_publication_are_those_of_the_zone(tmp_path, column, days):
    found = items_table(tmp_path, column, published="p")["item_id_published_day"].to_list()
    expected = [None if n is None else (date(2026, 3, n) - EPOCH).days for n in days]
    assert found == expected + [None] * (len(column) - len(days))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pl.Series([1772323200]), r"items.parquet: column 'p' \(log.items.published\) is Int64"),
        (pl.Series(["2026-03-01", "03/02/2026"]), r"'p' \(log.items.published\) holds \['03/02/2"),
    ],
)
def test_values_that_are_no_day_of_publication_are_refused(tmp_path, column, message):
    with pytest.raises(ProjectError, match=message):
        items_table(tmp_path, column, published="p")


def test_a_native_list_is_not_split_at_a_separator(tmp_path):
    with pytest.raises(ProjectError, match=r"'p' \(log.items.lists\) is List\(String\); allow"):
        items_table(tmp_path, pl.Series([["a"], ["b"]]), lists={"p": "|"})


@pytest.mark.parametrize(
    "table", [{"columns": ["p", "p"]}, {"columns": ["p"], "lists": {"p": "|"}}]
)
def test_a_column_of_a_table_is_named_once(table):
    with pytest.raises(ProjectError, match=r"columns and lists: p twice; allowed: each column"):
        project(log={"items": {"path": "items.parquet", "key": "i", **table}})


def test_rows_that_are_lists_are_not_grouped_into_lists():
    log = {"items": "shown", "clicked": "clk", "list": ["user_id"], "item": WITHOUT}
    with pytest.raises(ProjectError, match=r"list: not with items that name lists"):
        project(log=log)


def test_the_key_of_a_table_is_the_current_one_for_every_model(tmp_path):
    pl.DataFrame({"i": range(13), "p": 1}).write_parquet(tmp_path / "items.parquet")
    items = {"path": "items.parquet", "key": "i", "columns": ["p"]}
    old = opened(tmp_path, log={"items": items}).project
    pl.DataFrame({"id": range(13), "p": 1}).write_parquet(tmp_path / "items.parquet")
    edit_project(tmp_path, log={"items": {"key": "id"}})
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    own = model_context(context, old, None)
    assert tables_as_of(own.source, FIRST)["item_id"].collect().height == 13
    assert own.examples_in == ""


def test_a_complete_day_without_files_leaves_the_others_readable(tmp_path):
    for n in range(3):
        folder = tmp_path / "log" / f"date={FIRST + timedelta(days=n)}"
        folder.mkdir(parents=True)
        (folder / "_SUCCESS").touch()
        if n < 2:
            write_day(tmp_path, FIRST + timedelta(days=n), tiny_events(FIRST + timedelta(days=n)))
    context = opened(tmp_path, log={"ready": "_SUCCESS"})
    assert context.source.scan_day(FIRST).collect().height == 40
    with pytest.raises(ProjectError, match=r"holds no \*.parquet file"):
        context.source.scan_day(FIRST + timedelta(days=2))


def test_texts_with_an_offset_are_moments():
    texts = ["2026-03-02T08:00:00+08:00", "2026-03-02T00:00:00Z", "2026-03-02 00:00:00"]
    found = moments_of(pl.DataFrame({"ts": texts}), Time("ts", "iso"))
    assert found.to_list() == [datetime(2026, 3, 2)] * 3


def test_a_time_that_only_the_last_day_has_is_looked_at_where_it_is(tmp_path):
    for n in range(3):
        day = FIRST + timedelta(days=n)
        rows = tiny_events(day, shift=n).rename({"u": "user_id", "i": "item_id"})
        if n == 2:
            rows = rows.with_columns(received_at=pl.lit(datetime(2026, 3, 4, 10)))
        write_day(tmp_path, day, rows)
    assert discover(tmp_path).log.time.column == "ts"


def test_a_list_of_another_length_than_the_items_is_quarantined(tmp_path):
    log = Log(requests=Requests(items="shown", clicked="clk", per_item=["price"]))
    rows = {
        "user_id": [1, 2, 3, 4],
        "timestamp": 0,
        "shown": [[10, 11, 12], [20, 21], [30], [40]],
        "clk": [[11], [20], [30], [41]],
        "price": [[1.0], [5.0, 6.0, 7.0], [9.0], None],
    }
    found = shown_items(pl.LazyFrame(rows), log, "f").collect()
    wrong = found.filter("price is of another length")["user_id"].to_list()
    assert wrong == [1, 1, 1, 2, 2]
    for n in range(2):
        day = FIRST + timedelta(days=n)
        shown = [[1, 2], [3, 4]]
        frame = pl.DataFrame({"u": [1, 2], "ts": tiny_events(day)["ts"].head(2), "shown": shown})
        frame = frame.with_columns(clk=pl.Series([[1], [4]]), price=pl.Series([[1.0, 2.0], [3.0]]))
        write_day(tmp_path, day, frame)
    write_project(
        tmp_path,
        log={
            "requests": {"items": "shown", "clicked": "clk", "per_item": ["price"]},
            "item": WITHOUT,
            "context": ["price"],
            "ranges": WITHOUT,
            "max_bad_share": 1.0,
        },
        objectives=[{"name": "click", "group": "engagement", "label": "clicked"}],
        features={"entities": [["user_id"]], "categoricals": []},
    )
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    report = ingest_day(context, FIRST)
    assert (report.good, report.reasons) == (2, {"price has another length than the items": 2})


def test_floating_point_ids_are_the_texts_of_whole_numbers(tmp_path):
    text = pl.col("u").cast(pl.String)
    for n in range(3):
        write_day(
            tmp_path, FIRST + timedelta(n), tiny_events(FIRST + timedelta(n)).with_columns(text)
        )
    day = FIRST + timedelta(days=3)
    folder = tmp_path / "given" / f"date={day}"
    folder.mkdir(parents=True)
    given = pl.DataFrame({"u": [0.0, 10.0], "i": [0, 1], "tab": "home"})
    given.write_parquet(folder / "part-0.parquet")
    context = opened(tmp_path, scoring={"candidates": "given"})
    with pytest.raises(
        ProjectError, match=r"no events are published, which define the types of cand"
    ):
        prepared_candidates(context, day)
    ingest_day(context, FIRST)
    assert prepared_candidates(context, day).collect()["user_id"].to_list() == ["0", "10"]
    given.with_columns(u=pl.Series([0.5, 1.0])).write_parquet(folder / "part-0.parquet")
    with pytest.raises(ProjectError, match=r"'user_id' is Float64 and holds \[0.5\]"):
        prepared_candidates(context, day)


def test_the_most_frequent_context_of_a_user_is_not_a_missing_one(tmp_path):
    rows = tiny_events(FIRST, rows=44).with_columns(
        tab=pl.when(pl.int_range(pl.len()) < 33).then(None).otherwise(pl.lit("home"))
    )
    write_day(tmp_path, FIRST, rows)
    context = opened(tmp_path)
    ingest_day(context, FIRST)
    found = prepared_candidates(context, FIRST + timedelta(days=1)).collect()
    assert set(found["tab"]) == {"home"}


@pytest.mark.parametrize(
    ("derived", "message"),
    [
        ({"user_days_since": "price * 2"}, r"user_days_since: is the name of a generated column"),
        ({"x": "price + extract(year from current_date)"}, r"reads the clock \(current_date\)"),
        ({"x": "case when tab = 'now()' then price else 60 * 10 end"}, None),
    ],
)
def test_derived_features_have_names_and_values_of_their_own(tmp_path, derived, message):
    write_day(tmp_path, FIRST, tiny_events(FIRST).with_columns(price=pl.col("play")))
    context = opened(tmp_path, log={"context": ["tab", "price"]}, features={"derived": derived})
    ingest_day(context, FIRST)
    aggregate_day(context, FIRST)
    if message is None:
        assert build_examples(context, FIRST) == "not built yet"
        return
    with pytest.raises(ProjectError, match=message):
        build_examples(context, FIRST)
