"""Actions: which impression each belongs to, or why to none, and errors that name places."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.actions import EPOCH, ActionReport, join_actions, with_actions
from mtl_ranker.logs.contract import may_fall
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from tests.conftest import FIRST, midnight, write_day
from tests.projects import WITHOUT, project, write_project

MINUTE = 60_000
LIKE: dict[str, Any] = {"name": "like", "path": "likes", "window": "1d"}
LABEL = [{"name": "like", "group": "satisfaction", "label": '"like"'}]
Row = tuple[Any, ...]


def world(root: Path, action: dict[str, Any] = LIKE, **log: Any) -> Context:
    changes: dict[str, Any] = {"ranges": WITHOUT, "actions": [action], "max_bad_share": 0.5} | log
    write_project(root, log=changes, objectives=LABEL)
    return open_context(str(root / "project.toml"), root, root / "ws")


def write(root: Path, path: str, day: int, columns: list[str], rows: list[Row]) -> None:
    """Rows of user, item, minutes after the start of the first day, and further columns."""
    at = FIRST + timedelta(days=day)
    keys = {"u": pl.Int64, "i": pl.Int64, "ts": pl.Int64}
    frame = pl.DataFrame(rows, schema=keys | dict.fromkeys(columns), orient="row")
    frame = frame.with_columns(pl.col("ts") * MINUTE + midnight(FIRST))
    if path == "log":
        write_day(root, at, frame.with_columns(tab=pl.lit("home")))
        return
    folder = root / path / f"date={at}"
    folder.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(folder / "part-0.parquet")


def joined(context: Context, days: int) -> list[ActionReport]:
    """Reports of the first days, ingested one after the other."""
    reports = []
    for n in range(days):
        ingest_day(context, FIRST + timedelta(days=n))
        reports += join_actions(context, FIRST + timedelta(days=n))
    return reports


def values(context: Context, day: int = 0, known_on: int = 99) -> list[float | None]:
    """The action's value of each impression of a day, by actions that are known on another."""
    at = FIRST + timedelta(days=day)
    rows = context.workspace.scan("events", [at]).with_row_index("row of the day")
    known = pl.col("known") <= (FIRST - EPOCH).days + known_on
    return with_actions(context, rows, at, known).collect()["like"].to_list()


def test_an_action_belongs_to_the_nearest_impression_that_is_not_after_it(tmp_path):
    write(tmp_path, "log", 0, [], [(1, 1, 10), (1, 1, 20), (1, 1, 40), (1, 2, 20), (2, 1, 20)])
    write(tmp_path, "likes", 0, [], [(1, 1, 20), (1, 1, 39), (2, 1, 19), (3, 3, 50)])
    context = world(tmp_path, LIKE | {"reduce": "sum"})
    (report,) = joined(context, 1)
    assert values(context) == [0.0, 2.0, 0.0, 0.0, 0.0]
    assert (report.rows, report.joined) == (4, 2)
    assert report.alone == {"no earlier impression of the user and item": 2}


def test_an_action_of_the_next_day_belongs_to_it_within_the_window(tmp_path):
    write(tmp_path, "log", 0, [], [(1, 1, 10), (2, 2, 10)])
    write(tmp_path, "log", 1, [], [(9, 9, 1440)])
    write(tmp_path, "likes", 0, [], [])
    write(tmp_path, "likes", 1, [], [(1, 1, 1450), (2, 2, 1451)])
    context = world(tmp_path)
    reports = joined(context, 2)
    assert values(context) == [1.0, 0.0]
    assert [r.alone for r in reports] == [{}, {"after the window": 1}]


def test_an_action_that_is_filed_a_day_later_is_known_a_day_later(tmp_path):
    """It happens before midnight and is in the partition of the next day, as is allowed."""
    write(tmp_path, "log", 0, [], [(1, 1, 1380), (2, 2, 1380)])
    write(tmp_path, "log", 1, [], [(9, 9, 1440)])
    write(tmp_path, "likes", 0, [], [(2, 2, 1430)])
    write(tmp_path, "likes", 1, [], [(1, 1, 1430)])
    context = world(tmp_path, day_tolerance_hours=2)
    joined(context, 2)
    assert values(context, known_on=0) == [0.0, 1.0]
    assert values(context, known_on=1) == [1.0, 1.0]


def test_the_window_ends_when_an_action_arrives_and_not_when_it_happens(tmp_path):
    """All happen ten minutes after their impression; the window is a day."""
    write(tmp_path, "log", 0, [], [(1, 1, 10), (2, 2, 10), (3, 3, 10)])
    write(tmp_path, "log", 1, [], [(9, 9, 1440)])
    arrived = [midnight(FIRST) + minutes * MINUTE for minutes in (1450, 1451, 15)]
    likes = [(user, user, 20, at) for user, at in enumerate(arrived, start=1)]
    write(tmp_path, "likes", 0, ["got"], likes)
    write(tmp_path, "likes", 1, ["got"], [(9, 9, 1445, arrived[0])])
    context = world(tmp_path, LIKE | {"arrived": "got"})
    reports = joined(context, 2)
    assert values(context) == [1.0, 0.0, 1.0]
    assert values(context, known_on=0) == [0.0, 0.0, 1.0]
    assert [r.alone for r in reports] == [{"after the window": 1}, {}]


def test_an_impression_id_decides_and_is_not_overruled_by_nearness(tmp_path):
    shown = [(1, 1, 10, "a"), (1, 1, 20, "b"), (1, 1, 30, None), (2, 2, 60, "c")]
    write(tmp_path, "log", 0, ["id"], shown)
    likes = [
        (1, 1, 50, "a"),  # exact, though b and the third are nearer
        (1, 1, 29, "x"),  # unknown id, and no earlier impression without one
        (1, 1, 35, "y"),  # unknown id: the one without an id
        (2, 2, 59, "c"),  # before its impression
        (1, 1, 70, "c"),  # of another pair
        (1, 1, 25, None),  # no id: the nearest
    ]
    write(tmp_path, "likes", 0, ["of"], likes)
    context = world(tmp_path, LIKE | {"impression": "of"}, impression="id")
    (report,) = joined(context, 1)
    assert values(context) == [1.0, 1.0, 1.0, 0.0]
    assert report.alone == {
        "no impression has its id": 1,
        "before its impression": 1,
        "its impression is of another user or item": 1,
    }


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("any", [1.0, 0.0, 0.0]),
        ("sum", [7.0, 0.0, 0.0]),
        ("max", [5.0, 0.0, None]),
        ("first", [3.0, 0.0, None]),
        ("last", [-1.0, 0.0, None]),
    ],
)
def test_several_actions_are_reduced_to_one_value(tmp_path, reduce, expected):
    write(tmp_path, "log", 0, [], [(1, 1, 10), (2, 2, 10), (3, 3, 10)])
    likes = [(1, 1, 13, -1.0), (1, 1, 12, 5.0), (1, 1, 11, 3.0), (2, 2, 11, 0.0)]
    write(tmp_path, "likes", 0, ["stars"], likes)
    context = world(tmp_path, LIKE | {"value": "stars", "reduce": reduce})
    joined(context, 1)
    assert values(context) == expected


def test_bad_actions_are_counted_by_reason_and_join_nothing(tmp_path):
    write(tmp_path, "log", 0, [], [(1, 1, 10), (2, 2, 10)])
    good = [(1, 1, 11 + n, 1.0) for n in range(6)]
    bad = [(None, 1, 20, 1.0), (2, None, 20, 1.0), (2, 2, None, 1.0), (2, 2, 1500, 1.0)]
    bad += [(2, 2, 30, float("nan")), (1, 1, 11, 1.0)]
    write(tmp_path, "likes", 0, ["v"], [*good, *bad])
    context = world(tmp_path, LIKE | {"value": "v", "reduce": "sum"})
    (report,) = joined(context, 1)
    assert values(context) == [6.0, 0.0]
    assert (report.rows, report.joined, report.alone) == (12, 6, {})
    assert report.bad == {
        "user_id missing": 1,
        "item_id missing": 1,
        "timestamp missing": 1,
        "timestamp outside the day": 1,
        "v missing or not finite": 1,
        "duplicate of an earlier action": 1,
    }
    with pytest.raises(ProjectError, match=r"(?s)likes.*5 of 12 actions \(like\).*max_bad_share"):
        joined(world(tmp_path, LIKE | {"value": "v"}, max_bad_share=0.4), 1)


def test_ids_of_actions_without_a_sign_are_refused_where_they_are_too_large(tmp_path):
    write(tmp_path, "log", 0, [], [(1, 1, 10), (2, 2, 10)])
    write(tmp_path, "likes", 0, [], [(1, 1, 11), (None, 1, 12), (1, 1, 13)])
    (file,) = (tmp_path / "likes").rglob("*.parquet")
    frame = pl.read_parquet(file)
    user = frame.columns[0]
    ids = pl.Series(user, [1, None, 2**64 - 1], pl.UInt64)
    frame.with_columns(ids).write_parquet(file)
    context = world(tmp_path, LIKE, max_bad_share=1.0)
    (report,) = joined(context, 1)
    assert values(context) == [1.0, 0.0]
    assert report.bad == {"user_id missing": 1, "user_id is 2**63 or more (allowed as text)": 1}


def test_folders_may_be_by_the_day_of_arrival(tmp_path):
    """A like of day 0 that arrives on day 1, and one whose time is after its arrival's day."""
    for n in range(2):
        write(tmp_path, "log", n, [], [(1, 1, 1440 * n + 10), (2, 2, 1440 * n + 10)])
    write(tmp_path, "likes", 0, ["got"], [(9, 9, 10, midnight(FIRST) + 20 * MINUTE)])
    for user, minutes in ((1, 1400), (2, 2900)):
        arrived = [(user, user, minutes, midnight(FIRST) + 1500 * MINUTE)]
        write(tmp_path, "likes", 1, ["got"], arrived)
        context = world(tmp_path, LIKE | {"arrived": "got", "window": "2d"}, max_bad_share=1.0)
        *_, report = joined(context, 2)
        expected = {} if user == 1 else {"timestamp outside the day": 1}
        assert (report.joined, report.bad) == (1 - len(expected), expected)
    write(tmp_path, "likes", 1, ["got"], [(1, 1, 1400, midnight(FIRST) + 1500 * MINUTE)])
    joined(context, 2)
    assert values(context) == [1.0, 0.0]
    known = context.workspace.scan("actions/like", [FIRST + timedelta(days=1)])
    assert known.select(pl.col("known").cast(pl.Date)).collect().item() == FIRST + timedelta(days=1)


def test_a_day_that_has_not_arrived_is_no_day_without_actions(tmp_path):
    for n in range(3):
        write(tmp_path, "log", n, [], [(1, 1, 1440 * n)])
    write(tmp_path, "likes", 1, [], [(1, 1, 1440)])
    context = world(tmp_path)
    with pytest.raises(ProjectError, match=rf"likes: no actions of {FIRST + timedelta(days=2)}"):
        joined(context, 3)
    assert (values(context, 0), values(context, 1)) == ([0.0], [1.0])


def test_a_late_delivery_changes_only_the_day_it_is_of(tmp_path):
    for n in range(2):
        write(tmp_path, "log", n, [], [(1, 1, 1440 * n), (2, 2, 1440 * n)])
        write(tmp_path, "likes", n, [], [(1, 1, 1440 * n + 1)])
    context = world(tmp_path)
    joined(context, 2)
    assert [r.why for r in joined(context, 2)] == [None, None]
    write(tmp_path, "likes", 0, [], [(1, 1, 1), (2, 2, 5)])
    assert [r.why for r in joined(context, 2)] == ["changed: source files", None]
    assert (values(context, 0), values(context, 1)) == ([1.0, 1.0], [1.0, 0.0])


@pytest.mark.parametrize(
    ("action", "columns", "row", "fragments"),
    [
        ({"user": "who"}, [], (1, 1, 11), ["'who'", "log.actions[0].user", "missing"]),
        ({"value": "v"}, [], (1, 1, 11), ["'v'", "log.actions[0].value", "missing", "u, i, ts"]),
        ({"value": "v"}, ["v"], (1, 1, 11, "5"), ["'v'", "actions[0].value", "String", "a number"]),
        ({"arrived": "a"}, ["a"], (1, 1, 11, "x"), ["'a'", "actions[0].arrived", "String"]),
        ({"path": "no"}, [], (1, 1, 11), ["no: not found", "log.actions[0].path"]),
    ],
)
def test_errors_name_file_setting_and_column(tmp_path, action, columns, row, fragments):
    write(tmp_path, "log", 0, [], [(1, 1, 10)])
    write(tmp_path, "likes", 0, columns, [row])
    context = world(tmp_path, LIKE | action)
    with pytest.raises(ProjectError) as error:
        joined(context, 1)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ({"actions": [LIKE | {"window": "3 days"}]}, r"actions\[0\].window: '3 days' is no durat"),
        ({"actions": [LIKE | {"window": "0d"}]}, r"'0d' is no duration; allowed: a number above 0"),
        ({"actions": [LIKE, LIKE]}, r"actions\[1\].name: 'like' is named twice"),
        ({"actions": [LIKE | {"name": "tab"}]}, r"'tab' is also a column of log.context"),
        ({"actions": [LIKE | {"reduce": "mean"}]}, r"actions\[0\].reduce: .*'mean'"),
        ({"actions": [LIKE | {"impression": "id"}]}, r"impression: 'id', but the log has none"),
        ({"actions": [LIKE | {"name": "a b"}]}, r"'a b' is not a plain name"),
    ],
)
def test_settings_of_actions_are_checked(log, message):
    with pytest.raises(ProjectError, match=message):
        project(log=log)


def test_an_action_may_not_have_the_name_of_a_column_of_the_log(tmp_path):
    write(tmp_path, "log", 0, ["like"], [(1, 1, 10, 0)])
    write(tmp_path, "likes", 0, [], [])
    with pytest.raises(ProjectError, match=r"actions\[0\].name: 'like' is also a column of .*log"):
        joined(world(tmp_path), 1)


STARS = {"name": "stars", "path": "stars", "value": "value"}


@pytest.mark.parametrize(
    ("action", "label", "falls"),
    [
        (LIKE, '"like"', False),
        (LIKE, '1 - "like"', True),
        (LIKE, "case when \"like\" = 1 and tab = 'home' then 1 else 0 end", False),
        (LIKE, "case when \"like\" = 0 and tab = 'home' then 1 else 0 end", True),
        (LIKE | {"reduce": "sum"}, 'case when "like" >= 2 then 1 else 0 end', False),
        (LIKE | {"reduce": "sum"}, 'case when "like" = 2 then 1 else 0 end', True),
        (STARS | {"reduce": "max"}, "case when stars >= 4 then 1 else 0 end", False),
        (STARS | {"reduce": "max"}, "case when stars <= 2 then 1 else 0 end", True),
        (STARS | {"reduce": "max"}, "case when stars > 30 and play > 3.5 then 1 end", False),
        (STARS | {"reduce": "max"}, "case when stars > play then 1 else 0 end", False),
        (STARS | {"reduce": "max"}, "case when stars < play then 1 else 0 end", True),
        (STARS | {"reduce": "max"}, "case when stars > 0 and stars < 60 * 10 then 1 end", True),
        (STARS | {"reduce": "max"}, "case when stars > 0 and stars < 1e3 then 1 end", True),
        (STARS | {"reduce": "max"}, "case when stars > 5 and stars < 500*(3-1) then 1 end", True),
        (STARS | {"reduce": "max"}, "case when stars/60 > 9 and stars/60 < 12 then 1 end", True),
        (STARS | {"reduce": "max"}, "case when stars >= 60 * 10 then 1 else 0 end", False),
        (STARS | {"reduce": "max"}, "case when stars / play >= 0.9 then 1 else 0 end", False),
        (LIKE | {"reduce": "sum"}, 'case when "like" >= 1 and "like" < 2*2 then 1 end', True),
        (STARS | {"reduce": "last"}, "case when stars >= 4 then 1 else 0 end", True),
        (STARS | {"reduce": "sum"}, "case when stars >= 4 then 1 else 0 end", True),
    ],
)
def test_whether_a_further_action_can_lower_a_label(action, label, falls):
    objective = {"name": "good", "group": "satisfaction", "label": label}
    made = project(log={"ranges": WITHOUT, "actions": [action]}, objectives=[objective])
    assert may_fall(made, made.objectives[0]) is falls


def test_a_condition_that_an_action_breaks_lowers_a_label():
    objective = {"name": "good", "group": "satisfaction", "label": "click", "where": '"like" = 0'}
    made = project(log={"ranges": WITHOUT, "actions": [LIKE]}, objectives=[objective])
    assert may_fall(made, made.objectives[0])
