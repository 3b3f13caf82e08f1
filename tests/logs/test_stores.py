"""Logs in an S3 store, and in Delta and Iceberg tables: real ones, against the log of folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from deltalake import DeltaTable
from polars.testing import assert_frame_equal

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features import aggregates
from mtl_ranker.logs.actions import join_actions, with_actions
from mtl_ranker.logs.ingest import events_provenance, ingest_day
from mtl_ranker.logs.places import place_at, schema_of
from mtl_ranker.logs.sources import open_context, parquet_schema
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import TINY, WITHOUT, project, write_project
from tests.stores import (
    BUCKET,
    Request,
    daily_frames,
    iceberg_catalog,
    proxy,
    s3_server,
    upload,
    write_delta,
    write_iceberg,
)

LAST = FIRST + timedelta(days=5)
CLICKED = [{"name": "click", "group": "engagement", "label": "clicked"}]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Any]:
    with iceberg_catalog(tmp_path / "iceberg") as found:
        yield found


def opened(folder: Path, data: str | Path | None = None, **log: Any) -> Context:
    write_project(folder, TINY, log=log)
    return open_context(str(folder / "project.toml"), data or folder, folder / "ws")


def ingested(context: Context) -> pl.DataFrame:
    for day in context.source.days():
        ingest_day(context, day)
    return context.workspace.scan("events", context.workspace.days("events")).collect()


def of_folders(folder: Path) -> pl.DataFrame:
    """Events of the log of folders."""
    found = ingested(opened(folder))
    shutil.rmtree(folder / "ws")
    return found


def days(context: Context) -> list[int]:
    return [(day - FIRST).days for day in context.source.days()]


def refused(count: int) -> Callable[[Request], bool]:
    """The first requests are refused."""
    return lambda request: request.number < count


class TestObjects:
    def test_a_request_that_is_refused_for_a_while_is_repeated(self, tiny: Path, s3: str):
        address = upload(tiny / "log", "refused/log").removesuffix("/log")
        with proxy(s3, refused(2)) as answers:
            assert place_at(address).is_dir()
        assert [answer.status for answer in answers[:3]] == [503, 503, 200]
        with proxy(
            s3, refused(2)
        ) as answers:  # without a look-up by obstore: a file's footer by polars
            schema = schema_of(place_at(f"{address}/log/date={FIRST}/part-0.parquet"))
        assert [answer.status for answer in answers[:2]] == [503, 503]
        assert schema == tiny_events(FIRST).schema

    def test_ingests_what_the_local_log_holds(self, tiny: Path, s3: str):
        expected = of_folders(tiny)
        address = upload(tiny / "log", "same/log").removesuffix("/log")
        context = opened(tiny, address)
        assert days(context) == list(range(6))
        assert_frame_equal(ingested(context), expected)

    def test_an_address_that_pathlib_has_shortened_is_the_same(self, s3: str):
        assert place_at(Path("s3://feed/a/b")) == place_at("s3://feed/a/b/")

    def test_lists_files_and_folders_as_pathlib_does(self, tmp_path: Path, s3: str):
        names = ["log/date=a/x.parquet", "log/date=b/_SUCCESS", "log/date=b/c/y.parquet", "logs/z"]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
        address = place_at(upload(tmp_path, "listing"))
        for root in (address, address.listed()):  # type: ignore[attr-defined]
            for pattern in ("*", "log/*", "log/date=*", "log/*/*"):
                expected = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob(pattern))
                assert [str(p.relative_to(address)) for p in root.glob(pattern)] == expected
            assert [p.name for p in (root / "log").rglob("*.parquet")] == ["x.parquet", "y.parquet"]
            for name in ("log", "log/date=a", "log/date", "logs/z", "lo", "none"):
                theirs, ours = tmp_path / name, root / name
                found = (ours.exists(), ours.is_file(), ours.is_dir())
                assert found == (theirs.exists(), theirs.is_file(), theirs.is_dir()), name

    def test_only_a_changed_object_makes_its_day_stale(self, tiny: Path, s3: str):
        address = upload(tiny / "log", "changed/log").removesuffix("/log")
        context = opened(tiny, address)
        ingested(context)
        assert all(ingest_day(context, day).skipped for day in context.source.days())
        write_day(tiny, LAST, tiny_events(LAST, shift=1))
        upload(tiny / "log", "changed/log")
        stale = [day for day in context.source.days() if not ingest_day(context, day).skipped]
        assert stale == [LAST]

    def test_a_call_lists_a_folder_once(self, tiny: Path, s3: str):
        shutil.copytree(tiny / "log", tiny / "likes")
        for day in (FIRST, FIRST + timedelta(days=1)):
            items = tiny / f"items/date={day}/part-0.parquet"
            items.parent.mkdir(parents=True)
            pl.DataFrame({"i": range(20), "topic": range(20)}).write_parquet(items)
        address = upload(tiny, "once")
        items = {"path": "items", "key": "i", "columns": ["topic"], "partition": "date"}
        likes = [{"name": "like", "path": "likes"}]
        source = opened(tiny, address, items=items, actions=likes).source
        stream = source.actions("like")
        calls: list[Callable[[], Any]] = [
            lambda: source.undivided,
            *(lambda of=of: of.days() for of in (source, stream)),  # type: ignore[misc]
            *(lambda of=of: of.scan_day(LAST) for of in (source, stream)),  # type: ignore[misc]
            lambda: source.sizes(LAST),
            lambda: source.state(LAST),
            lambda: source.columns(LAST),
            lambda: source.tables_state(LAST),
            lambda: source.table("items", LAST),
            lambda: source.snapshots("items"),
        ]
        listings = []
        for call in calls:
            with proxy(s3) as answers:
                call()
            listings.append(sum("list-type" in answer.request.path for answer in answers))
        assert listings == [1] * len(calls)

    def test_the_footers_of_an_undivided_log_are_read_once(self, tiny: Path, s3: str):
        for number, file in enumerate(sorted((tiny / "log").rglob("*.parquet"))):
            file.rename(tiny / f"log/{number}.parquet")
        source = opened(tiny, upload(tiny / "log", "footers/log").removesuffix("/log")).source
        assert len(source.days()) == 6
        for number, day in enumerate(source.days()):
            with proxy(s3) as answers:
                source.scan_day(day).collect()
            read = {a.request.path for a in answers if "list-type" not in a.request.path}
            assert read == {f"/{BUCKET}/footers/log/{number}.parquet"}

    def test_an_object_that_is_written_again_has_its_new_columns(self, tiny: Path, s3: str):
        file = tiny / "log/a.parquet"
        for value in (1, 2.0, "x"):
            pl.DataFrame({"a": [value]}).write_parquet(file)
            place = place_at(upload(tiny / "log", "again/log")) / "a.parquet"
            assert parquet_schema(place) == parquet_schema(file) == pl.read_parquet_schema(file)

    def test_a_cut_off_object_is_named(self, tiny: Path, s3: str):
        file = tiny / f"log/date={LAST}/part-0.parquet"
        file.write_bytes(file.read_bytes()[:-20])
        address = upload(tiny / "log", "cut/log").removesuffix("/log")
        with pytest.raises(ProjectError, match=r"s3://feed/cut/log/date=.*part-0.parquet: not a"):
            ingest_day(opened(tiny, address), LAST)

    def test_a_bucket_that_is_not_there_is_one_sentence(self, tiny: Path, s3: str):
        with pytest.raises(ProjectError, match=r"s3://other/feed: the store cannot be read: .+"):
            opened(tiny, "s3://other/feed")

    def test_an_unknown_store_is_refused(self, tiny: Path):
        with pytest.raises(ProjectError, match=r"ftp://a/b: no known store; allowed: .* s3://"):
            opened(tiny, "ftp://a/b")

    def test_a_missing_package_is_named_with_its_extra(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("mtl_ranker.stores.objects.find_spec", lambda name: None)
        with pytest.raises(ProjectError, match=r"obstore, .* pip install 'mtl_ranker\[stores\]'"):
            opened(tiny, "s3://feed/a")


PARTITIONS = ["by date", "by text", "by timestamp", "one file"]


def table_frames(tiny: Path, partition: str) -> tuple[list[pl.DataFrame], list[str] | None]:
    """The log's frames, and the columns of a table's partitions.

    In the last two the table has no column of the day, so that the timestamp says it.
    """
    frames = daily_frames(tiny / "log")
    if partition == "by date":
        return frames, ["date"]
    if partition == "by text":
        return [f.with_columns(pl.col("date").cast(pl.String)) for f in frames], ["date"]
    frames = [f.drop("date") for f in frames]
    return (frames, None) if partition == "by timestamp" else ([pl.concat(frames)], None)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_delta_table_gives_the_events_of_the_folders(tiny: Path, partition: str):
    expected = of_folders(tiny)
    frames, by = table_frames(tiny, partition)
    write_delta(tiny / "table", frames, by)
    context = opened(tiny, format="delta", path="table")
    assert days(context) == list(range(6))
    assert_frame_equal(ingested(context), expected)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_an_iceberg_table_gives_the_events_of_the_folders(tiny: Path, catalog: Any, partition: str):
    expected = of_folders(tiny)
    frames, by = table_frames(tiny, partition)
    write_iceberg(catalog, "feed.log", frames, by and by[0])
    context = opened(tiny, format="iceberg", path="feed.log")
    assert days(context) == list(range(6))
    assert_frame_equal(ingested(context), expected)


def test_a_delta_table_in_a_store_gives_the_events_of_the_folders(tiny: Path, s3: str):
    expected = of_folders(tiny)
    frames, by = table_frames(tiny, "by date")
    write_delta("s3://feed/delta/table", frames, by)
    context = opened(tiny, "s3://feed/delta", format="delta", path="table")
    assert_frame_equal(ingested(context), expected)


@pytest.mark.parametrize("partition", ["by date", "by timestamp"])
def test_a_commit_to_one_day_leaves_the_others_up_to_date(tiny: Path, partition: str):
    frames, by = table_frames(tiny, partition)
    write_delta(tiny / "table", frames, by)
    context = opened(tiny, format="delta", path="table")
    ingested(context)
    write_delta(tiny / "table", [frames[-1].with_columns(pl.col("ts") + 1)], by)
    stale = {day: not ingest_day(context, day).skipped for day in context.source.days()}
    assert [day for day, built in stale.items() if built] == [LAST]
    made = {d: context.workspace.provenance("events", d) or {} for d in (FIRST, LAST)}
    place = (tiny / "table").resolve()
    assert made[FIRST]["version of log"] == f"5 of {place}"
    assert made[LAST]["version of log"] == f"6 of {place}"


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York"])
@pytest.mark.parametrize("kind", ["moments", "local times", "milliseconds"])
@pytest.mark.parametrize("format", ["delta", "iceberg"])
def test_times_of_any_type_are_filed_under_the_day_of_the_zone(
    tmp_path: Path, catalog: Any, format: str, kind: str, zone: str
):
    """Noon of each day in the zone, and one minute before its end."""
    noon = datetime(2026, 3, 2, 12, tzinfo=ZoneInfo(zone))
    times = [noon + timedelta(days=n, minutes=m) for n in range(3) for m in (0, 719)]
    rows = tiny_events(FIRST, rows=6)
    if kind == "milliseconds":
        stamps = pl.Series([int(time.timestamp()) * 1000 for time in times])
    elif kind == "local times":
        stamps = pl.Series([time.replace(tzinfo=None) for time in times], dtype=pl.Datetime("us"))
    else:
        stamps = pl.Series([time.astimezone(UTC) for time in times], dtype=pl.Datetime("us", "UTC"))
    frame = rows.with_columns(stamps.alias("ts"))
    if format == "delta":
        write_delta(tmp_path / "table", [frame.head(3), frame.tail(3)])
    else:
        write_iceberg(catalog, "feed.log", [frame.head(3), frame.tail(3)], None)
    path = {"delta": "table", "iceberg": "feed.log"}[format]
    unit = "ms" if kind == "milliseconds" else "datetime"
    context = opened(tmp_path, format=format, path=path, timezone=zone, timestamp_unit=unit)
    assert days(context) == [0, 1, 2]
    for n, day in enumerate(context.source.days()):
        found = context.source.scan_day(day).sort("timestamp").collect()
        assert found["user_id"].to_list() == rows["u"].to_list()[2 * n : 2 * n + 2]
        assert found["timestamp"].to_list() == times[2 * n : 2 * n + 2]


def test_deleted_rows_make_their_day_stale_and_are_not_read(tiny: Path):
    frames, by = table_frames(tiny, "by date")
    write_delta(tiny / "table", frames, by)
    context = opened(tiny, format="delta", path="table")
    before = ingested(context)
    DeltaTable(tiny / "table").delete("date = '2026-03-04' and u = 3")
    after = ingested(context)
    gone = (pl.col("user_id") == 3) & (pl.col("date") == FIRST + timedelta(days=2))
    assert before.filter(gone).height > 0
    assert_frame_equal(after, before.filter(~gone))


def test_an_earlier_version_is_read_again_exactly(tiny: Path):
    frames, by = table_frames(tiny, "by date")
    write_delta(tiny / "table", frames, by)
    before = ingested(opened(tiny, format="delta", path="table"))
    shutil.rmtree(tiny / "ws")
    write_delta(tiny / "table", [frames[-1].with_columns(pl.col("ts") + 1)], by)
    latest = ingested(opened(tiny, format="delta", path="table"))
    shutil.rmtree(tiny / "ws")
    assert latest.height > before.height
    context = opened(tiny, format="delta", path="table", version=5)
    assert_frame_equal(ingested(context), before)


def test_an_earlier_snapshot_is_read_again_exactly(tiny: Path, catalog: Any):
    frames, _ = table_frames(tiny, "by date")
    table = write_iceberg(catalog, "feed.log", frames[:-1], "date")
    snapshot = table.current_snapshot().snapshot_id
    table.append(frames[-1].to_arrow())
    assert days(opened(tiny, format="iceberg", path="feed.log")) == list(range(6))
    context = opened(tiny, format="iceberg", path="feed.log", version=snapshot)
    assert days(context) == list(range(5))
    ingest_day(context, FIRST)
    made = context.workspace.provenance("events", FIRST) or {}
    assert made["version of log"] == f"{snapshot} of feed.log"


def test_a_pinned_source_does_not_see_later_commits(tiny: Path):
    frames, by = table_frames(tiny, "by date")
    write_delta(tiny / "table", frames[:-1], by)
    context = opened(tiny, format="delta", path="table")
    pinned = context.source.pinned()
    write_delta(tiny / "table", frames[-1:], by)
    assert pinned.days() == context.source.days()[:-1]


def test_a_pinned_source_keeps_its_versions_under_other_settings(tiny: Path):
    items = pl.DataFrame({"i": range(13), "kind": "old", "size": 1})
    write_delta(tiny / "items", [items])
    table = {"format": "delta", "path": "items", "key": "i", "columns": ["kind"]}
    context = opened(tiny, items=table).pinned()
    write_delta(tiny / "items", [items.with_columns(pl.col("i") + 100)])
    other = context.project.log.model_copy(deep=True)
    assert other.items is not None
    other.items.columns.append("size")
    for source in (context.source, context.source.with_log(other), context.source.pinned()):
        rows = source.table("items", FIRST)
        assert rows is not None
        assert rows.select(pl.len()).collect().item() == 13


def test_a_commit_while_aggregates_are_built_makes_them_stale(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    items = pl.DataFrame({"i": range(13), "kind": "old"})
    write_delta(tiny / "items", [items])
    table = {"format": "delta", "path": "items", "key": "i", "columns": ["kind"]}
    write_project(tiny, log={"items": table}, features={"entities": [["user_id"], ["kind"]]})
    context = open_context(str(tiny / "project.toml"), tiny, tiny / "ws")
    ingest_day(context, FIRST)
    check = aggregates.check_names

    def late(*args: Any) -> None:  # after the table's scan, before its fingerprint
        if not (tiny / "committed").exists():
            (tiny / "committed").touch()
            DeltaTable(tiny / "items").update(new_values={"kind": "new"})
        check(*args)

    def kinds() -> set[str]:
        return set(context.workspace.scan("aggregates/kind", [FIRST]).collect()["kind"])

    monkeypatch.setattr(aggregates, "check_names", late)
    aggregates.aggregate_day(context, FIRST)
    assert kinds() == {"old"}
    why = "changed: rows of the user and item tables"
    assert aggregates.stale_aggregates(context, FIRST) == why
    assert aggregates.aggregate_day(context, FIRST) == why
    assert kinds() == {"new"}


def test_a_table_that_is_written_anew_is_another_one(tiny: Path):
    """Both have version 0."""
    items = {"format": "delta", "path": "items", "key": "i", "columns": ["kind"]}
    write_delta(tiny / "items", [pl.DataFrame({"i": [1], "kind": ["old"]})])
    first, second = (daily_frames(tiny / "log")[n].drop("date") for n in (0, 1))
    write_delta(tiny / "table", [pl.concat([first, second])])

    def seen() -> Any:
        context = opened(tiny, format="delta", path="table", items=items)
        rows = context.source.table("items", FIRST)
        assert rows is not None
        kinds = rows.collect()["kind"].to_list()
        return days(context), kinds, context.source.tables_state(FIRST)

    (before_days, before_kinds, before) = seen()
    assert (before_days, before_kinds) == ([0, 1], ["old"])
    for name in ("items", "table"):
        shutil.rmtree(tiny / name)
    write_delta(tiny / "items", [pl.DataFrame({"i": [1], "kind": ["new"]})])
    write_delta(tiny / "table", [pl.concat([first, daily_frames(tiny / "log")[2].drop("date")])])
    (after_days, after_kinds, after) = seen()
    assert (after_days, after_kinds) == ([0, 2], ["new"])
    assert before != after


def test_rows_without_a_time_are_quarantined_on_every_day(tiny: Path):
    frames, _ = table_frames(tiny, "by timestamp")
    lost = frames[2].head(1).with_columns(pl.lit(None, pl.Int64).alias("ts"))
    write_delta(tiny / "table", [*frames, lost])
    pl.concat([*frames, lost]).write_parquet(tiny / "undivided.parquet")
    context = opened(tiny, path="undivided.parquet")
    expected = [ingest_day(context, day).reasons for day in context.source.days()]
    assert len(expected) == 6
    assert all("timestamp missing" in reasons for reasons in expected)
    shutil.rmtree(tiny / "ws")
    context = opened(tiny, format="delta", path="table")
    assert [ingest_day(context, day).reasons for day in context.source.days()] == expected


def test_user_and_item_tables_have_formats_of_their_own(tiny: Path, catalog: Any):
    items = pl.DataFrame({"i": range(13), "topic": [f"t{n % 3}" for n in range(13)]})
    users = pl.DataFrame({"u": range(11), "age": range(20, 31)})
    write_delta(tiny / "items", [items])
    write_iceberg(catalog, "feed.users", [users], None)
    context = opened(
        tiny,
        items={"format": "delta", "path": "items", "key": "i", "columns": ["topic"]},
        users={"format": "iceberg", "path": "feed.users", "key": "u", "columns": ["age"]},
    )
    theirs = context.source.table("items", FIRST)
    assert theirs is not None
    assert_frame_equal(theirs.collect(), items.rename({"i": "item_id"}))
    assert set(context.source.versions()) == {"log.users", "log.items"}
    before = context.source.tables_state(FIRST)
    write_delta(tiny / "items", [items.with_columns(pl.col("i") + 100)])
    after = context.source.tables_state(FIRST)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


SPANS = {"key": "i", "columns": ["price"], "valid_from": "since", "valid_to": "until"}


def prices(day: int) -> list[tuple[int, int, int]]:
    """Rows of item, price and first day that are valid on a day; each is valid for two days."""
    return [(i, 10 * n + i, n) for i in range(3) if (n := day // 2 * 2) >= i]


@pytest.mark.parametrize("format", ["delta", "iceberg"])
def test_rows_of_a_table_with_valid_from_are_those_of_the_day(
    tiny: Path, catalog: Any, format: str
):
    rows = [
        {"i": i, "price": price, "since": FIRST + timedelta(n), "until": FIRST + timedelta(n + 2)}
        for day in (0, 2, 4)
        for i, price, n in prices(day)
    ]
    if format == "delta":
        write_delta(tiny / "items", [pl.DataFrame(rows)])
    else:
        write_iceberg(catalog, "feed.items", [pl.DataFrame(rows)], None)
    path = {"delta": "items", "iceberg": "feed.items"}[format]
    context = opened(tiny, items={"format": format, "path": path} | SPANS)
    for day in range(6):
        found = context.source.table("items", FIRST + timedelta(day))
        assert found is not None
        expected = [(i, price) for i, price, _ in prices(day)]
        assert found.sort("item_id").collect().rows() == expected


def test_two_rows_of_a_delta_table_that_are_valid_at_one_time_are_named(tiny: Path):
    rows = {"i": [7, 7], "price": [1, 2], "since": [FIRST] * 2, "until": [LAST, None]}
    write_delta(tiny / "items", [pl.DataFrame(rows)])
    context = opened(tiny, items={"format": "delta", "path": "items"} | SPANS)
    with pytest.raises(ProjectError, match=r"/items: key 'i' = 7 has two rows that are valid"):
        context.source.table("items", LAST)


def test_dated_snapshots_in_a_store_are_seen_from_the_next_day_on(tiny: Path, s3: str):
    for n, price in ((0, 5), (3, 8)):
        folder = tiny / f"snapshots/items/date={FIRST + timedelta(n)}"
        folder.mkdir(parents=True)
        pl.DataFrame({"i": [1], "price": [price]}).write_parquet(folder / "part-0.parquet")
    address = upload(tiny / "snapshots", "snapshots")
    items = {"path": "items", "key": "i", "columns": ["price"], "partition": "date"}
    context = opened(tiny, address, items=items)
    seen = [context.source.table("items", FIRST + timedelta(n)) for n in range(6)]
    values = [rows.collect()["price"].to_list() for rows in seen if rows is not None]
    assert values == [[], [5], [5], [5], [8], [8]]
    assert context.source.snapshots("items") == [FIRST, FIRST + timedelta(3)]
    states = [context.source.tables_state(FIRST + timedelta(n)) for n in (1, 3, 4)]
    assert states[0] == states[1] != states[2]


@pytest.mark.parametrize("partition", ["by date", "by timestamp"])
def test_requests_of_a_delta_table_are_those_of_the_folders(tiny: Path, partition: str):
    shutil.rmtree(tiny / "log")
    for n in range(3):
        day = FIRST + timedelta(n)
        rows = {
            "u": [1, 2],
            "ts": tiny_events(day)["ts"].head(2),
            "tab": ["home", "search"],
            "shown": [[4, 5, 6], [n]],
            "clicked": [[6], []],
        }
        write_day(tiny, day, pl.DataFrame(rows))
    frames, by = table_frames(tiny, partition)
    write_delta(tiny / "table", frames, by)
    requests = {"requests": {"items": "shown", "clicked": "clicked"}, "item": WITHOUT}
    changes: dict[str, Any] = {"objectives": CLICKED, "features": {"categoricals": []}}
    found = []
    for log in (requests, requests | {"format": "delta", "path": "table"}):
        write_project(tiny, TINY, log=log | {"ranges": WITHOUT}, **changes)
        context = open_context(str(tiny / "project.toml"), tiny, tiny / "ws")
        assert days(context) == [0, 1, 2]
        found.append(ingested(context).drop("request"))
        shutil.rmtree(tiny / "ws")
    assert found[0]["clicked"].to_list() == [0, 0, 1, 0] * 3
    assert_frame_equal(found[1], found[0])


@pytest.mark.parametrize("partition", ["by date", "by timestamp"])
def test_actions_of_a_delta_table_are_those_of_the_folders(tiny: Path, partition: str):
    for n in range(3):
        day = FIRST + timedelta(n)
        likes = tiny_events(day, shift=n).select("u", "i", "ts").gather([n, n + 5, n + 9])
        write_day(tiny / "likes", day, likes)
    frames, by = table_frames(tiny / "likes", partition)
    write_delta(tiny / "likes/table", frames, by)
    liked = [{"name": "like", "group": "satisfaction", "label": '"like"'}]
    values, reports = [], []
    for action in ({"path": "likes/log"}, {"path": "likes/table", "format": "delta"}):
        log = {"ranges": WITHOUT, "actions": [{"name": "like"} | action]}
        write_project(tiny, TINY, log=log, objectives=liked)
        context = open_context(str(tiny / "project.toml"), tiny, tiny / "ws")
        for day in context.source.days()[:3]:
            ingest_day(context, day)
            reports.append(join_actions(context, day))
            rows = context.workspace.scan("events", [day]).with_row_index("row of the day")
            values += with_actions(context, rows, day, pl.lit(True)).collect()["like"].to_list()
        made = context.workspace.provenance("actions/like", FIRST) or {}
        assert ("version of log" in made) == ("format" in action)
        shutil.rmtree(tiny / "ws")
    assert sum(values) == 2 * 9
    assert values[: len(values) // 2] == values[len(values) // 2 :]
    assert reports[:3] == reports[3:]


def test_a_column_that_a_later_commit_adds_is_missing_before(tiny: Path):
    from deltalake import write_deltalake

    frames, by = table_frames(tiny, "by date")
    write_delta(tiny / "table", frames[:-1], by)
    added = frames[-1].with_columns(pl.lit(3).alias("stars"))
    write_deltalake(
        str(tiny / "table"), added.to_arrow(), mode="append", partition_by=by, schema_mode="merge"
    )
    context = opened(tiny, format="delta", path="table", context=["tab", "stars"])
    events = ingested(context).group_by("date").agg(pl.col("stars").unique())
    assert events.sort("date")["stars"].to_list() == [[None]] * 5 + [[3]]


class TestMistakes:
    def test_a_folder_that_is_no_table_is_named(self, tiny: Path):
        with pytest.raises(ProjectError, match=r"/log: no Delta table"):
            opened(tiny, format="delta").source.days()

    def test_a_version_that_is_not_there_is_named(self, tiny: Path):
        write_delta(tiny / "table", daily_frames(tiny / "log")[:1], ["date"])
        context = opened(tiny, format="delta", path="table", version=7)
        with pytest.raises(ProjectError, match=r"table at version 7 cannot be read"):
            context.source.days()

    def test_a_table_that_no_catalog_has_is_named(self, tiny: Path, catalog: Any):
        context = opened(tiny, format="iceberg", path="feed.none")
        with pytest.raises(ProjectError, match=r"feed.none: no such Iceberg table in catalog"):
            context.source.days()

    def test_a_day_without_rows_names_the_days_there_are(self, tiny: Path):
        write_delta(tiny / "table", daily_frames(tiny / "log")[:2], ["date"])
        context = opened(tiny, format="delta", path="table")
        with pytest.raises(ProjectError, match=r"no rows of 2026-03-07; .* 2026-03-02 to 2026-03-"):
            ingest_day(context, LAST)

    @pytest.mark.parametrize(
        ("log", "message"),
        [
            ({"version": 3}, r"version: 3 with format = 'parquet'; allowed: with 'delta'"),
            ({"format": "delta", "ready": "_SUCCESS"}, r"ready: '_SUCCESS' with format = 'delta'"),
            ({"format": "iceberg", "partition": "dt=%Y%m%d"}, r"partition: 'dt=%Y%m%d' with"),
            (
                {"format": "delta", "items": {"path": "i", "key": "i", "partition": "date"}},
                r"items.partition: 'date' with format = 'delta'; .* by valid_from",
            ),
        ],
    )
    def test_settings_of_files_are_not_for_tables(self, log: dict[str, Any], message: str):
        with pytest.raises(ProjectError, match=message):
            project(TINY, log=log)


def test_the_settings_of_a_log_of_files_have_the_digest_they_had(tiny: Path):
    content = project(TINY).model_dump(mode="json")["log"]
    assert "version" not in content
    assert content["format"] == "parquet"
    items = {"path": "items.parquet", "key": "i", "columns": ["topic"]}
    table = project(TINY, log={"items": items}).model_dump(mode="json")["log"]["items"]
    assert {"version", "format"}.isdisjoint(table)
    context = opened(tiny)
    assert not [k for k in events_provenance(context, FIRST) if k.startswith("version")]
