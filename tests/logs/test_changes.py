"""A log that changes from one day to the next, and values that are no times."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest

from mtl_ranker.commands.check import check_project
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.logs.ingest import ingest_day, keep_columns
from mtl_ranker.logs.sources import open_context
from tests.conftest import FIRST, midnight, tiny_events, write_day
from tests.projects import write_project

SECOND = FIRST + timedelta(days=1)


def opened(folder, **changes):
    write_project(folder, **changes)
    return open_context(str(folder / "project.toml"), folder, folder / "ws")


def rewrite(folder, day, *columns):
    return write_day(folder, day, tiny_events(day, shift=1).with_columns(*columns))


def test_a_new_column_that_nothing_uses_changes_no_event(tiny):
    context = opened(tiny)
    ingest_day(context, FIRST)
    rewrite(tiny, SECOND, pl.lit("new").alias("experiment"))
    ingest_day(context, SECOND)
    events = context.workspace.scan("events", [FIRST, SECOND]).collect()
    assert events.columns == ["user_id", "item_id", "timestamp", "date", "tab", "click", "play"]
    assert events.height == 80


def test_a_column_that_a_registered_model_reads_stays_in_the_events(tiny):
    context = opened(tiny)
    ingest_day(context, FIRST)
    assert ingest_day(context, FIRST).skipped
    rewrite(tiny, SECOND, pl.lit(1).alias("stars"))
    keep_columns(context.workspace, ["stars"])
    assert ingest_day(context, FIRST).why == "changed: columns"
    ingest_day(context, SECOND)
    assert "stars" in context.workspace.scan("events", [SECOND]).collect_schema()
    assert ingest_day(context, FIRST).skipped
    assert ingest_day(context, SECOND).skipped


@pytest.mark.parametrize("dtype", [pl.Int8, pl.Int32, pl.UInt16, pl.UInt64])
def test_numbers_of_any_width_become_one_type(tiny, dtype):
    context = opened(tiny)
    rewrite(tiny, SECOND, pl.col("u").cast(dtype), pl.col("play").cast(pl.Float32))
    other = tiny_events(SECOND, shift=2).with_columns(ts=pl.col("ts") + 1)
    other.write_parquet(tiny / "log" / f"date={SECOND}" / "part-1.parquet")
    for day in (FIRST, SECOND):
        ingest_day(context, day)
        aggregate_day(context, day)
    events = context.workspace.scan("events", [FIRST, SECOND]).collect()
    assert events.schema["user_id"] == pl.Int64
    assert events.schema["play"] == pl.Float64
    users = context.workspace.scan("aggregates/user", [FIRST, SECOND]).collect()
    assert users.schema["user_id"] == pl.Int64


def test_ids_of_64_bits_without_a_sign_are_refused_where_they_are_too_large(tiny):
    """A day with two files, one of which has signed ids."""
    context = opened(tiny, log={"max_bad_share": 0.5})
    frame = tiny_events(SECOND, shift=1)
    users, items = frame["u"].to_list(), frame["i"].to_list()
    users[3], users[4], items[4], items[5] = 2**63, None, 2**64 - 1, None
    columns = [pl.Series("u", users, pl.UInt64), pl.Series("i", items, pl.UInt64)]
    write_day(tiny, SECOND, frame.with_columns(columns))
    other = tiny_events(SECOND, rows=5, shift=2).with_columns(ts=pl.col("ts") + 1)
    other.write_parquet(tiny / "log" / f"date={SECOND}" / "part-1.parquet")
    report = ingest_day(context, SECOND)
    assert report.reasons == {
        "user_id is 2**63 or more (allowed as text)": 1,
        "user_id missing": 1,
        "item_id is 2**63 or more (allowed as text)": 1,
        "item_id missing": 1,
    }
    events = context.workspace.scan("events", [SECOND]).collect()
    assert events.height == 42
    assert events.columns == ["user_id", "item_id", "timestamp", "date", "tab", "click", "play"]
    assert events.schema["user_id"] == events.schema["item_id"] == pl.Int64


def test_a_required_impression_id_is_missing_or_too_large(tiny):
    numbers = [None, 2**64 - 1, *range(38)]
    rewrite(tiny, SECOND, pl.Series("shown", numbers, pl.UInt64))
    log = {"impression": "shown", "required": ["shown"], "max_bad_share": 0.5}
    report = ingest_day(opened(tiny, log=log), SECOND)
    assert report.reasons == {"shown missing": 1, "shown is 2**63 or more (allowed as text)": 1}


def test_a_new_column_of_a_table_leaves_the_events_as_they_are(tiny):
    ages = pl.DataFrame({"u": [*range(11), None, None], "age": range(13), "height": range(13)})
    ages.write_parquet(tiny / "users.parquet")
    users = {"path": "users.parquet", "key": "u", "columns": ["age"]}
    ingest_day(opened(tiny, log={"users": users}, features={"numerics": ["age"]}), FIRST)
    users["columns"] = ["age", "height"]
    context = opened(tiny, log={"users": users}, features={"numerics": ["age", "height"]})
    assert ingest_day(context, FIRST).skipped
    aggregate_day(context, FIRST)
    assert context.source.table("users", FIRST).collect().height == 13  # two without a key


def test_a_type_of_another_kind_is_refused_with_the_first_day_that_has_the_other(tiny):
    context = opened(tiny)
    ingest_day(context, FIRST)
    rewrite(tiny, SECOND, pl.col("u").cast(pl.String))
    words = rf"column 'user_id' is String, but it is Int64 in the events of {FIRST}"
    with pytest.raises(ProjectError, match=words):
        ingest_day(context, SECOND)
    assert context.workspace.days("events") == [FIRST]


def test_two_kinds_within_a_day_are_refused_with_both_files(tiny):
    context = opened(tiny)
    frame = tiny_events(FIRST).with_columns(pl.col("click").cast(pl.String))
    frame.write_parquet(tiny / "log" / f"date={FIRST}" / "part-1.parquet")
    words = r"part-1.parquet: column 'click' is String, but Int64 in .*part-0.parquet"
    with pytest.raises(ProjectError, match=words):
        ingest_day(context, FIRST)


def test_a_column_without_values_in_one_file_takes_the_type_of_the_others(tiny):
    context = opened(tiny)
    frame = tiny_events(FIRST, shift=3).with_columns(play=pl.lit(None), ts=pl.col("ts") + 1)
    frame.write_parquet(tiny / "log" / f"date={FIRST}" / "part-1.parquet")
    assert ingest_day(context, FIRST).good == 80
    assert context.workspace.scan("events", [FIRST]).collect()["play"].null_count() == 40


def test_a_used_column_that_one_file_lacks_is_named_with_the_file(tiny):
    context = opened(tiny)
    frame = tiny_events(FIRST).drop("play")
    frame.write_parquet(tiny / "log" / f"date={FIRST}" / "part-1.parquet")
    with pytest.raises(ProjectError, match=r"part-1.parquet: column 'play' is missing, but .*-0"):
        ingest_day(context, FIRST)


STARS = pl.int_range(pl.len(), dtype=pl.Int16).alias("stars")
SURVEY = {
    "log": {"context": ["tab", "stars"], "ranges": {"stars": {"max": 99}}},
    "objectives": [{"name": "good", "group": "satisfaction", "label": "stars"}],
}


def grown(folder, begins):
    """The tiny log with a column `stars` from a day on."""
    for n in range(6):
        day = FIRST + timedelta(days=n)
        rewrite(folder, day, *([STARS % 2] if n >= begins else []))


def test_a_column_that_begins_later_is_null_before(tiny):
    grown(tiny, 2)
    context = opened(tiny, **SURVEY)
    for n in range(4):
        ingest_day(context, FIRST + timedelta(days=n))
    events = context.workspace.scan("events", context.workspace.days("events")).collect()
    assert events.schema["stars"] == pl.Int64
    counts = events.group_by("date").agg(pl.col("stars").count()).sort("date")
    assert counts["stars"].to_list() == [0, 0, 40, 40]


def test_check_names_a_column_that_begins_later(tiny):
    grown(tiny, 3)
    opened(tiny, objectives=SURVEY["objectives"])
    text = "\n".join(check_project(str(tiny / "project.toml"), tiny))
    assert "column 'stars' begins on 2026-03-05; it is missing in the rows of earlier" in text


def test_a_column_that_ends_or_that_one_day_lacks_is_missing(tiny):
    grown(tiny, 0)
    rewrite(tiny, SECOND)
    with pytest.raises(
        ProjectError, match=rf"date={SECOND}.*'stars' \(named by log.context\) is m"
    ):
        ingest_day(opened(tiny, **SURVEY), SECOND)
    last = FIRST + timedelta(days=5)
    rewrite(tiny, last)
    with pytest.raises(
        ProjectError, match=rf"date={last}.*'stars' \(named by log.context\) is mis"
    ):
        ingest_day(opened(tiny, **SURVEY), last)


def test_a_required_column_that_begins_later_is_missing(tiny):
    grown(tiny, 2)
    survey = {**SURVEY, "log": {"required": ["stars"]}}
    with pytest.raises(ProjectError, match=r"'stars' \(named by log.required\) is missing"):
        ingest_day(opened(tiny, **survey), FIRST)


def test_a_column_that_begins_in_a_later_file_of_an_undivided_log(tiny):
    (tiny / "whole").mkdir()
    for n in range(3):
        frame = tiny_events(FIRST + timedelta(days=n), shift=n)
        frame = frame.with_columns([STARS % 2] if n else [])
        frame.write_parquet(tiny / f"whole/{2 - n}.parquet")
    survey = {**SURVEY, "log": {"path": "whole", "context": ["tab", "stars"]}}
    context = opened(tiny, **survey)
    for day, known in ((FIRST, 0), (SECOND, 40)):
        ingest_day(context, day)
        assert context.workspace.scan("events", [day]).collect()["stars"].count() == known
    # A file of the same days that lacks the column is a mistake.
    late = tiny_events(SECOND, shift=9).with_columns(ts=pl.col("ts") + 1)
    late.write_parquet(tiny / "whole/9.parquet")
    with pytest.raises(ProjectError, match=r"9.parquet: column 'stars' is missing, but"):
        ingest_day(context, SECOND)


def test_what_other_engines_have_not_finished_is_not_read(tiny):
    folder = tiny / "log" / f"date={FIRST}"
    for place in ("_temporary/0", ".staging"):
        (folder / place).mkdir(parents=True)
        (folder / place / "part-9.parquet").write_bytes(b"half")
    (folder / "_SUCCESS").touch()
    assert ingest_day(opened(tiny), FIRST).good == 40


def test_a_day_without_a_file_or_without_its_marker_is_not_there_yet(tiny):
    (tiny / "log" / "date=2026-03-20").mkdir()
    assert opened(tiny).source.days()[-1] == FIRST + timedelta(days=5)
    marked = opened(tiny, log={"ready": "_SUCCESS"})
    assert marked.source.days() == []
    (tiny / "log" / f"date={FIRST}" / "_SUCCESS").touch()
    assert marked.source.days() == [FIRST]


def test_two_spellings_of_one_day_are_refused(tiny):
    (tiny / "log" / "date=20260302").mkdir()
    with pytest.raises(ProjectError, match="date=20260302: a second folder of 2026-03-02"):
        opened(tiny).source.days()


def test_times_that_are_none_are_quarantined(tiny):
    frame = tiny_events(FIRST).with_columns(pl.col("ts").cast(pl.UInt64))
    ts = frame["ts"].to_list()
    ts[3] = 2**63 + 5
    write_day(tiny, FIRST, frame.with_columns(pl.Series("ts", ts, pl.UInt64)))
    report = ingest_day(opened(tiny), FIRST)
    assert report.reasons == {"timestamp missing": 1}


def test_the_hour_that_daylight_saving_skips_is_quarantined(tiny):
    """In Berlin 2026-03-29 has no 02:30."""
    day = FIRST.replace(day=29)
    local = [datetime(2026, 3, 29, 1, 0) + timedelta(minutes=5 * k) for k in range(40)]
    write_day(tiny, day, tiny_events(day).with_columns(pl.Series("ts", local)))
    zone = {"timestamp_unit": "datetime", "timezone": "Europe/Berlin", "max_bad_share": 0.5}
    context = opened(tiny, log=zone)
    report = ingest_day(context, day)
    assert report.reasons == {"timestamp is no valid time": 12}
    events = context.workspace.scan("events", [day]).collect()
    assert events["timestamp"][0] == datetime(2026, 3, 29, 0, 0, tzinfo=UTC)


def test_naive_text_takes_the_logs_zone_as_naive_datetimes_do(tiny):
    texts = ["2026-03-02T09:00:00", "2026-03-02T09:00:01+08:00", "2026-03-02T01:00:02Z"]
    frame = tiny_events(FIRST, rows=3).with_columns(pl.Series("ts", texts))
    write_day(tiny, FIRST, frame)
    context = opened(tiny, log={"timestamp_unit": "iso", "timezone": "Asia/Shanghai"})
    ingest_day(context, FIRST)
    events = context.workspace.scan("events", [FIRST]).collect()
    start = midnight(FIRST) + 3_600_000
    assert events["timestamp"].dt.epoch("ms").to_list() == [start, start + 1000, start + 2000]


def test_a_column_of_nulls_takes_the_type_that_a_later_day_gives_it(tiny):
    context = opened(tiny, log={"context": ["tab", "page"]})
    write_day(tiny, FIRST, tiny_events(FIRST).with_columns(pl.lit(None).alias("page")))
    rewrite(tiny, SECOND, pl.lit("new").alias("page"))
    for day in (FIRST, SECOND):
        ingest_day(context, day)
    assert context.workspace.scan("events", [SECOND]).collect_schema()["page"] == pl.String


def test_days_that_were_published_with_narrow_numbers_are_no_conflict(tiny):
    """As by a version that did not widen numbers."""
    context = opened(tiny)
    ingest_day(context, FIRST)
    path = context.workspace.path("events", FIRST)
    narrow = pl.read_parquet(path).with_columns(pl.col("user_id", "item_id").cast(pl.Int32))
    context.workspace.publish("events", FIRST, narrow, {})
    rewrite(tiny, SECOND)
    ingest_day(context, SECOND)
    assert context.workspace.scan("events", [SECOND]).collect_schema()["user_id"] == pl.Int64


def test_a_column_with_the_name_of_the_quarantines_is_refused(tiny):
    context = opened(tiny, log={"context": ["tab", "reason"]})
    write_day(tiny, FIRST, tiny_events(FIRST).with_columns(pl.lit("x").alias("reason")))
    with pytest.raises(ProjectError, match="column 'reason' has the name of the quarantine's"):
        ingest_day(context, FIRST)


def late_copies(tiny, **changes):
    """The second day holds copies of two late rows of the first, one of them with a bad label."""
    frame = tiny_events(FIRST)
    late = frame.tail(2).with_columns(ts=midnight(SECOND) - pl.Series([60_000, 30_000]))
    in_first = late.with_columns(click=pl.Series([1, 7]))
    write_day(tiny, FIRST, pl.concat([frame.head(38), in_first]))
    write_day(tiny, SECOND, pl.concat([tiny_events(SECOND, shift=1), late]))
    return opened(tiny, log={"day_tolerance_hours": 2.0, **changes})


def test_a_row_of_two_partitions_counts_once(tiny):
    """Of the two copies, the one whose first copy breaks the contract is kept."""
    context = late_copies(tiny)
    reason = "duplicate of a row of the day before in user_id, item_id, timestamp"
    for order in ([FIRST, SECOND], [SECOND, FIRST]):
        for day in order:
            ingest_day(context, day)
        assert context.workspace.scan("events", [SECOND]).collect().height == 41
        bad = context.workspace.scan("quarantine", [SECOND]).collect()
        assert bad["reason"].to_list() == [reason]
        for dataset in ("events", "quarantine"):
            for day in order:
                context.workspace.path(dataset, day).unlink()


def test_the_same_key_away_from_midnight_is_no_duplicate(tiny):
    """Users see an item again on the next day; only rows that both partitions may hold count."""
    context = late_copies(tiny, unique=["user_id", "item_id"], max_bad_share=1.0)
    first = pl.read_parquet(tiny / "log" / f"date={FIRST}" / "part-0.parquet")
    again = first.with_columns(ts=midnight(SECOND) + 12 * 3_600_000)
    write_day(tiny, SECOND, again.unique(["u", "i"]))
    assert "duplicate of a row of the day before" not in str(ingest_day(context, SECOND).reasons)


def test_a_changed_day_rebuilds_the_next_one_only_with_a_tolerance(tiny):
    for tolerance, why in ((2.0, "changed: source files of the day before"), (0.0, None)):
        context = opened(tiny, log={"day_tolerance_hours": tolerance})
        rewrite(tiny, FIRST)
        for day in (FIRST, SECOND):
            ingest_day(context, day)
        rewrite(tiny, FIRST, pl.col("play") + 1)
        assert ingest_day(context, SECOND).why == why
