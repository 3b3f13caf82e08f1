"""Logs of one row a request: lists of items and of clicked items become impressions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_ranker.commands.check import check_project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.audit import audit_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.lists import list_ids
from mtl_ranker.logs.actions import join_actions
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.requests import shown_items
from mtl_ranker.logs.sources import open_context
from tests.conftest import FIRST, tiny_events, write_day
from tests.nights import run_night
from tests.projects import TINY, WITHOUT, merged, project, write_project

NEWS: dict[str, Any] = {
    "log": {
        "user": "user_id",
        "item": WITHOUT,
        "timestamp": "impression_time",
        "timestamp_unit": "datetime",
        "context": ["device_type"],
        "ranges": WITHOUT,
    },
    "objectives": [
        {"name": "click", "group": "engagement", "label": "clicked"},
        {"name": "again", "group": "satisfaction", "label": "clicked"},
    ],
    "features": {"entities": [["user_id"], ["item_id"]], "categoricals": []},
}
AT = datetime(2026, 3, 2, 7, 15)


def opened(folder: Path, rows: pl.DataFrame, objectives: Any = None, **log: Any) -> Context:
    write_day(folder, FIRST, rows)
    write_project(
        folder, merged(TINY, **NEWS), log=log, objectives=objectives or NEWS["objectives"]
    )
    return open_context(str(folder / "project.toml"), folder, folder / "ws")


def events(context: Context) -> pl.DataFrame:
    ingest_day(context, FIRST)
    return context.workspace.scan("events", [FIRST]).collect()


def behaviours(**columns: Any) -> pl.DataFrame:
    """Three requests as in EB-NeRD: article ids in the order shown, clicked ones beside them."""
    rows = {
        "impression_id": [48401, 152513, 155390],
        "article_id": [None, 9778, 9778],  # the page on which the list was shown
        "impression_time": [AT, AT + timedelta(minutes=1), AT + timedelta(minutes=1)],
        "device_type": [2, 1, 1],
        "article_ids_inview": [[9774, 9775, 9776], [9778], [9774, 9778]],
        "article_ids_clicked": [[9776], [], None],
        "user_id": [22779, 150224, 160892],
    }
    return pl.DataFrame(rows | columns).cast({"article_ids_inview": pl.List(pl.Int32)})


SHORT = {"items": "article_ids_inview", "clicked": "article_ids_clicked"}


def test_a_request_with_native_lists_becomes_impressions_with_positions(tmp_path):
    found = events(opened(tmp_path, behaviours(), **SHORT, request="impression_id"))
    columns = ["user_id", "item_id", "position", "impression_id", "device_type", "clicked"]
    assert found.select(columns).rows() == [
        (22779, 9774, 1, 48401, 2, 0),
        (22779, 9775, 2, 48401, 2, 0),
        (22779, 9776, 3, 48401, 2, 1),
        (150224, 9778, 1, 152513, 1, 0),
        (160892, 9774, 1, 155390, 1, None),  # the clicks are missing, so the labels are
        (160892, 9778, 2, 155390, 1, None),
    ]
    assert found["timestamp"].to_list()[2] == AT.replace(tzinfo=UTC)


def test_a_request_is_the_list_with_and_without_an_id(tmp_path):
    """Two requests of one user at one moment are two lists."""
    lists = {"article_ids_inview": [[1, 2, 3], [4], [5, 6]], "article_ids_clicked": [[1], [], []]}
    rows = behaviours(user_id=[7, 7, 7], **lists)
    for changes in ({"request": "impression_id"}, {}):
        context = opened(tmp_path, rows, **SHORT, **changes)
        found = list_ids(events(context), context.project.log.list_keys)
        _, first = np.unique(found, return_index=True)
        assert sorted(first) == [0, 3, 4]
        assert found[0] == found[1] == found[2]
        assert found[4] == found[5]


def test_a_request_of_text_with_labels_in_it(tmp_path):
    """MIND: `N55689-1 N35729-0`; an id may hold the mark."""
    rows = behaviours().select("user_id", "impression_time", "device_type")
    rows = rows.with_columns(impressions=pl.Series(["N55689-1 N35729-0", "N-4-0  N5-1 ", "N6"]))
    requests = {"items": "impressions", "mark": "-"}
    found = events(opened(tmp_path, rows, requests=requests))
    assert found.select("item_id", "position", "clicked").rows() == [
        ("N55689", 1, 1),
        ("N35729", 2, 0),
        ("N-4", 1, 0),
        ("N5", 2, 1),
        ("N6", 1, None),
    ]


def test_separated_text_beside_a_table_of_items(tmp_path):
    rows = behaviours(
        article_ids_inview=[[], [], []], article_ids_clicked=["b", "", None]
    ).with_columns(article_ids_inview=pl.Series(["a|b|c", "a", ""]))
    pl.DataFrame({"id": ["a"], "topic": ["x"]}).write_parquet(tmp_path / "items.parquet")
    requests = {**SHORT, "separator": "|", "label": "opened"}
    log = {"requests": requests, "items": {"path": "items.parquet", "key": "id"}}
    objectives = [{"name": "click", "group": "engagement", "label": "opened"}]
    found = events(opened(tmp_path, rows, objectives, **log))
    assert found.select("item_id", "opened").rows() == [("a", 0), ("b", 1), ("c", 0), ("a", 0)]


def test_a_click_on_no_item_of_its_request_is_quarantined_alone(tmp_path):
    rows = behaviours(article_ids_clicked=[[9776, 5], [9], []])
    context = opened(tmp_path, rows, **SHORT, max_bad_share=0.5)
    report = ingest_day(context, FIRST)
    assert (report.rows, report.good) == (8, 6)
    assert report.reasons == {"clicked, but no item of its request": 2}
    bad = context.workspace.scan("quarantine", [FIRST]).collect()
    assert sorted(bad["item_id"]) == [5, 9]
    assert context.workspace.scan("events", [FIRST]).collect()["clicked"].sum() == 1


def test_values_of_each_item_are_divided_with_it(tmp_path):
    rows = behaviours(prices=[[1.5, 2.5, 3.5], [4.0], []])
    context = opened(tmp_path, rows, requests={**SHORT, "per_item": ["prices"]}, context=["prices"])
    assert events(context)["prices"].to_list() == [1.5, 2.5, 3.5, 4.0, None, None]


@pytest.mark.parametrize(
    ("rows", "log", "message"),
    [
        (behaviours(), {"items": "shown"}, r"'shown' \(named by log.requests.items\) is missing"),
        (behaviours(), {"items": "user_id"}, r"user: 'user_id' is a list of requests"),
        (behaviours(), {"items": "device_type"}, r"log.requests.items\) is Int64; allowed: a list"),
        (
            behaviours(article_ids_clicked=[["a"], [], []]),
            SHORT,
            r"'article_ids_inview' holds Int64 and 'article_ids_clicked' holds String",
        ),
        (behaviours(), {**SHORT, "item": "article_id"}, r"has a column 'article_id' beside"),
        (behaviours(clicked=0), SHORT, r"log.requests.label makes one of that name"),
        (behaviours(position=0), SHORT, r"log.position makes one of that name"),
        (
            behaviours(),
            {**SHORT, "requests": {"items": "article_ids_inview"}},
            r"items: 'article_ids_inview' beside requests; allowed: requests.items",
        ),
        (behaviours(), {**SHORT, "list": ["user_id"]}, r"list: not with items that name lists"),
        (
            behaviours(),
            {"requests": {**SHORT, "mark": "-"}},
            r"mark: not with clicked; allowed: one of them",
        ),
    ],
)
def test_lists_that_cannot_be_divided_are_refused(tmp_path, rows, log, message):
    with pytest.raises(ProjectError, match=message):
        events(opened(tmp_path, rows, **log))


ids = st.integers(0, 6)
requests = st.lists(
    st.tuples(st.lists(ids, max_size=5), st.none() | st.lists(ids, max_size=3)), max_size=6
)


@given(requests)
def test_impressions_are_those_of_a_loop(rows):
    log = project(merged(TINY, **NEWS), log=SHORT).log
    frame = pl.DataFrame(
        {
            "user_id": range(len(rows)),
            "article_ids_inview": [shown for shown, _ in rows],
            "article_ids_clicked": [clicked for _, clicked in rows],
        },
        schema_overrides={
            "article_ids_inview": pl.List(pl.Int64),
            "article_ids_clicked": pl.List(pl.Int64),
        },
    )
    expected = []
    for user, (shown, clicked) in enumerate(rows):
        for place, item in enumerate(shown, 1):
            label = None if clicked is None else int(item in clicked)
            expected.append((user, item, place, label, False))
        expected += [(user, item, None, None, True) for item in {*(clicked or [])} - {*shown}]
    found = shown_items(frame.lazy(), log, "log").collect()
    made = found.select("user_id", "item_id", "position", "clicked", "clicked and not shown")
    key = str
    assert sorted(made.rows(), key=key) == sorted(expected, key=key)


def daily(root: Path, days: int = 6) -> None:
    """The tiny log as requests of four items."""
    for n in range(days):
        day = FIRST + timedelta(days=n)
        frame = tiny_events(day, shift=n).with_columns(r=pl.int_range(40) // 4)
        requests = frame.group_by("r", maintain_order=True).agg(
            pl.col("u", "ts", "tab").first(),
            pl.col("i").alias("inview"),
            pl.col("i").filter(pl.col("click") == 1).alias("hits"),
        )
        write_day(root, day, requests)


@pytest.mark.slow
def test_a_night_on_requests(tmp_path):
    daily(tmp_path)
    log = {"items": "inview", "clicked": "hits", "item": "i", "ranges": WITHOUT}
    objectives = [{"name": "click", "group": "engagement", "label": "clicked"}]
    write_project(tmp_path, log=log, objectives=objectives)
    night = run_night(tmp_path)
    assert night.ranked.rows > 0
    assert night.suite.held_out.frame["position"].max() == 4


def test_check_tries_a_night_on_requests(tmp_path):
    daily(tmp_path)
    log = {"items": "inview", "clicked": "hits", "item": "i", "ranges": WITHOUT}
    objectives = [{"name": "click", "group": "engagement", "label": "clicked"}]
    write_project(tmp_path, log=log, objectives=objectives)
    text = "\n".join(check_project(str(tmp_path / "project.toml"), tmp_path))
    assert "contract on 2026-03-07: 40 rows, 0 quarantined" in text
    assert "candidates of" in text


def test_actions_find_the_item_of_their_request(tmp_path):
    """A stream that names the request, whose id many impressions have, and the item."""
    rows = behaviours().drop("article_ids_clicked")
    likes = pl.DataFrame(
        {
            "impression_id": [48401, 48401, 48401],
            "user_id": [22779] * 3,
            "item_id": [9776, 9775, 1],
            "impression_time": [AT + timedelta(seconds=n) for n in range(3)],
        }
    )
    (tmp_path / f"likes/date={FIRST}").mkdir(parents=True)
    likes.write_parquet(tmp_path / f"likes/date={FIRST}/0.parquet")
    action = {"name": "like", "path": "likes", "impression": "impression_id"}
    log = {"items": "article_ids_inview", "request": "impression_id"}
    log |= {"impression": "impression_id", "actions": [action]}
    objectives = [{"name": "liked", "group": "satisfaction", "label": '"like"'}]
    context = opened(tmp_path, rows, objectives, **log)
    ingest_day(context, FIRST)
    (report,) = join_actions(context, FIRST)
    assert (report.joined, report.alone) == (2, {"its impression is of another user or item": 1})
    joined = context.workspace.scan("actions/like", [FIRST]).collect()
    assert joined.filter(pl.col("reason").is_null()).sort("item_id")["row"].to_list() == [1, 2]


def test_the_audit_finds_the_item_of_a_request(tmp_path):
    """Aggregates of likes by the id of their request, against the audit's own join."""
    daily(tmp_path)
    for n in range(6):
        day = FIRST + timedelta(days=n)
        folder = tmp_path / "log" / f"date={day}"
        rows = pl.read_parquet(folder / "part-0.parquet", hive_partitioning=False)
        rows = rows.with_columns(pl.col("r") + 100 * n)
        write_day(tmp_path, day, rows.drop("hits"))
        likes = rows.select("r", "u", pl.col("ts") + 60_000, pl.col("inview").list.last())
        (tmp_path / f"likes/date={day}").mkdir(parents=True)
        likes.rename({"inview": "i"}).write_parquet(tmp_path / f"likes/date={day}/0.parquet")
    action = {"name": "like", "path": "likes", "impression": "r", "window": "1h"}
    log = {"items": "inview", "item": "i", "request": "r", "impression": "r", "actions": [action]}
    objectives = [{"name": "liked", "group": "satisfaction", "label": '"like"'}]
    write_project(tmp_path, log={**log, "ranges": WITHOUT}, objectives=objectives)
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    last = context.last_day()
    for day in context.source.days():
        ingest_day(context, day)
        (report,) = join_actions(context, day)
        assert (report.rows, report.joined) == (10, 10)
    for day in context.source.days():
        aggregate_day(context, day)
    build_examples(context, last)
    assert audit_day(context, last, 40).differences == []
