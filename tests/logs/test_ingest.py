"""Ingest: bad rows are quarantined with reasons, bad files named, nothing half-written."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from mtl_ranker.config import load_project
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.contract import check_events
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context, open_source
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST, midnight, tiny_events, write_day
from tests.projects import edit_project, write_project


def ingest(root: Path, day=FIRST):
    context = open_context(str(root / "project.toml"), root, root / "ws")
    return ingest_day(context, day), context.workspace


def test_good_day_keeps_every_row(tiny):
    report, workspace = ingest(tiny)
    assert (report.rows, report.good, report.reasons) == (40, 40, {})
    events = workspace.scan("events", [FIRST]).collect()
    assert events.columns == ["user_id", "item_id", "timestamp", "date", "tab", "click", "play"]
    assert events["user_id"].to_list() == tiny_events(FIRST)["u"].to_list()


def test_every_bad_row_is_quarantined_with_its_reason(tiny):
    frame = tiny_events(FIRST, rows=400)
    frame = frame.with_columns(ts=pl.lit(midnight(FIRST)) + pl.int_range(400) * 1000)
    bad = pl.DataFrame(
        {
            "u": [None, 1, 2, 3, 4, 5, frame["u"][0]],
            "i": [1, 2, 3, 4, 5, 6, frame["i"][0]],
            "ts": [midnight(FIRST) + n for n in range(1, 4)]
            + [midnight(FIRST + timedelta(days=1)), midnight(FIRST) - 1]
            + [midnight(FIRST) + 5, frame["ts"][0]],
            "tab": ["home"] * 7,
            "click": [0, 0, 0, 0, 0, 2, 0],
            "play": [1.0, float("nan"), -1.0, 1.0, 1.0, 1.0, float("inf")],
        },
        schema=frame.schema,
    )
    write_day(tiny, FIRST, pl.concat([frame, bad]))
    report, workspace = ingest(tiny)
    assert report.good == 400
    assert report.reasons == {
        "user_id missing": 1,
        "play NaN": 1,
        "play outside [0, inf]": 1,
        "timestamp outside the day": 2,
        "label of click neither 0 nor 1": 1,
        "duplicate of an earlier row in user_id, item_id, timestamp": 1,
        "play infinite": 1,
    }
    quarantined = workspace.scan("quarantine", [FIRST]).collect()
    assert quarantined.height == 7
    assert quarantined.filter(pl.col("user_id").is_null())["reason"].item() == "user_id missing"


def test_too_many_bad_rows_fail_the_day_and_keep_the_published_one(tiny):
    _, workspace = ingest(tiny)
    before = workspace.path("events", FIRST).read_bytes()
    write_day(tiny, FIRST, tiny_events(FIRST).with_columns(play=pl.lit(-1.0)))
    with pytest.raises(ProjectError, match=r"(?s)40 of 40 rows.*max_bad_share.*40  play outside"):
        ingest(tiny)
    assert workspace.path("events", FIRST).read_bytes() == before
    assert workspace.scan("quarantine", [FIRST]).collect().height == 40


def test_ingest_is_idempotent_and_skips_what_is_published(tiny):
    _, workspace = ingest(tiny)
    first = workspace.path("events", FIRST).read_bytes()
    second, _ = ingest(tiny)
    assert second.skipped
    workspace.path("events", FIRST).unlink()
    rebuilt, _ = ingest(tiny)
    assert not rebuilt.skipped
    assert workspace.path("events", FIRST).read_bytes() == first


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (lambda f: f.write_bytes(b""), ["part-0.parquet", "empty file"]),
        (lambda f: f.write_bytes(f.read_bytes()[:200]), ["part-0.parquet", "not a whole Parquet"]),
        (
            lambda f: pl.read_parquet(f).drop("u").write_parquet(f),
            ["part-0.parquet", "'u'", "log.user", "missing", "i, ts, tab"],
        ),
        (
            lambda f: (
                pl.read_parquet(f).with_columns(pl.col("ts").cast(pl.String)).write_parquet(f)
            ),
            ["'ts'", "String", "log.timestamp_unit"],
        ),
        (
            lambda f: pl.read_parquet(f).with_columns(pl.col("u") * 0.5).write_parquet(f),
            ["'u'", "Float64", "integer or String"],
        ),
        (lambda f: pl.read_parquet(f).clear().write_parquet(f), ["2026-03-03", "no rows"]),
        (
            lambda f: pl.read_parquet(f).drop("play").write_parquet(f),
            ["'play'", "log.ranges", "missing"],
        ),
        (
            lambda f: pl.read_parquet(f).rename({"click": "clicked"}).write_parquet(f),
            ["'click'", "is missing", "clicked"],
        ),
    ],
)
def test_bad_input_is_named_and_nothing_is_published(tiny, spoil, fragments):
    day = FIRST + timedelta(days=1)
    spoil(tiny / "log" / f"date={day}" / "part-0.parquet")
    with pytest.raises(ProjectError) as error:
        ingest(tiny, day)
    for fragment in fragments:
        assert fragment in str(error.value)
    assert Workspace(tiny / "ws").days("events") == []


def test_a_single_file_log_is_divided_into_days_by_its_timestamps(tiny):
    days = [FIRST, FIRST + timedelta(days=1)]
    whole = pl.concat([tiny_events(day, shift=n) for n, day in enumerate(days)])
    (tiny / "one").mkdir()
    whole.write_parquet(tiny / "one" / "log.parquet")
    write_project(tiny, log={"path": "one/log.parquet"})
    project = load_project(str(tiny / "project.toml"))
    assert open_source(project, tiny).days() == days
    report, _ = ingest(tiny, days[1])
    assert report.good == 40


def test_missing_day_names_the_days_that_exist(tiny):
    with pytest.raises(
        ProjectError, match=r"date=2026-01-01.*6 days from 2026-03-02 to 2026-03-07"
    ):
        ingest(tiny, FIRST.replace(month=1, day=1))


def test_real_kuairand_day(shared_data):
    project = load_project("kuairand")
    source = open_source(project, shared_data / "kuairand-pure")
    day = source.days()[0]
    checked = check_events(project, source.scan_day(day), day, "kuairand")
    raw = pl.read_parquet(
        shared_data / "kuairand-pure" / "log" / f"date={day}", hive_partitioning=False
    )
    unique = raw.unique(["user_id", "video_id", "time_ms"]).height
    assert checked.good.collect().height == unique
    assert checked.bad.height == raw.height - unique


@pytest.mark.parametrize(
    ("partition", "folders"),
    [
        ("dt=%Y%m%d", ["dt=20260302", "dt=20260303/hour=07"]),
        ("year=%Y/month=%m/day=%d", ["year=2026/month=3/day=2", "year=2026/month=03/day=03"]),
        ("date=%Y-%m-%d", ["date=2026-03-02", "date=2026-03-03"]),
        ("%Y/%m-%d", ["2026/03-02", "2026/03-03"]),
        ("day", ["day=2026-03-02", "day=2026-03-03/hour=1/part=2"]),
    ],
)
def test_days_lie_in_folders_of_many_layouts(tiny, partition, folders):
    days = [FIRST, FIRST + timedelta(days=1)]
    for n, folder in enumerate(folders):
        (tiny / "other" / folder).mkdir(parents=True)
        tiny_events(days[n], shift=n).write_parquet(tiny / "other" / folder / "a.parquet")
    write_project(tiny, log={"path": "other", "partition": partition})
    assert open_source(load_project(str(tiny / "project.toml")), tiny).days() == days
    report, workspace = ingest(tiny, days[1])
    assert report.good == 40
    users = workspace.scan("events", [days[1]]).collect()["user_id"].to_list()
    assert users == tiny_events(days[1], shift=1)["u"].to_list()


def test_hours_are_no_part_of_a_layout(tiny):
    write_project(tiny, log={"partition": "dt=%Y%m%d/hour=%H"})
    with pytest.raises(ProjectError, match=r"log.partition: .*has %H; allowed: %Y, %m and %d"):
        load_project(str(tiny / "project.toml"))


@pytest.mark.parametrize("partition", ["dt=%Y%m", "%d", "dt=%Q"])
def test_a_layout_must_tell_days_apart(tiny, partition):
    write_project(tiny, log={"partition": partition})
    with pytest.raises(ProjectError, match=r"log.partition: .*does not tell days apart; allowed"):
        load_project(str(tiny / "project.toml"))
    write_project(tiny, log={"partition": "dt=%Y%m%d"})
    (tiny / "log" / "dt=20261301").mkdir()
    with pytest.raises(ProjectError, match=r"'20261301' is not a day; expected dt=YYYYMMDD"):
        ingest(tiny)


def test_markers_beside_days_are_no_days(tiny):
    edit_project(tiny, log={"partition": "%Y-%m-%d"})
    for folder in sorted((tiny / "log").iterdir()):
        folder.rename(tiny / "log" / folder.name.removeprefix("date="))
    (tiny / "log/_SUCCESS").touch()
    (tiny / "log/_temporary").mkdir()
    days = open_context(str(tiny / "project.toml"), tiny, tiny / "ws").source.days()
    assert days == [FIRST + timedelta(days=n) for n in range(6)]
