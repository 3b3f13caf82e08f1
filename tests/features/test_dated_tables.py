"""Tables that change: a row has the values that were known at the start of its day."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import polars.testing
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.audit import audit_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.point_in_time import join_features
from mtl_ranker.features.tables import tables_as_of
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from tests.conftest import FIRST, midnight, tiny_events, write_day
from tests.projects import WITHOUT, write_project

DAYS = 5
LAST = FIRST + timedelta(days=DAYS - 1)
FEATURES = {
    "entities": [["user_id"], ["item_id"], ["maker"]],
    "numerics": ["price"],
    "windows": [1, 3],
}
SNAPSHOTS = {
    "path": "items",
    "key": "i",
    "columns": ["price", "maker"],
    "partition": "date",
}
SPANS = {
    "path": "items.parquet",
    "key": "i",
    "columns": ["price", "maker"],
    "valid_from": "since",
    "valid_to": "until",
}
PHASES = [Phase.explicit, Phase.generate]
# Day of a snapshot, counted from the first one of the log -> item -> price and maker.
VALUES = st.dictionaries(st.integers(0, 12), st.tuples(st.integers(1, 9), st.sampled_from("xy")))
SNAPSHOT_DAYS = st.dictionaries(st.integers(-2, DAYS + 1), VALUES, min_size=1, max_size=5)


def day_of(n: int) -> date:
    return FIRST + timedelta(days=n)


def write_snapshot(root: Path, n: int, values: dict[int, tuple[int, str]]) -> None:
    folder = root / "items" / f"date={day_of(n)}"
    folder.mkdir(parents=True, exist_ok=True)
    frame = pl.DataFrame(
        {
            "i": list(values),
            "price": [float(price) for price, _ in values.values()],
            "maker": [maker for _, maker in values.values()],
        },
        schema={"i": pl.Int64, "price": pl.Float64, "maker": pl.String},
    )
    frame.write_parquet(folder / "part-0.parquet")


def write_spans(root: Path, snapshots: dict[int, dict[int, tuple[int, str]]]) -> None:
    """The same values as rows that are valid from the day after a snapshot to the next one's."""
    ordered, rows = sorted(snapshots), []
    for number, n in enumerate(ordered):
        until = day_of(ordered[number + 1] + 1) if number + 1 < len(ordered) else None
        rows += [
            {"i": i, "price": float(p), "maker": m, "since": day_of(n + 1), "until": until}
            for i, (p, m) in snapshots[n].items()
        ]
    schema = {"i": pl.Int64, "price": pl.Float64, "maker": pl.String}
    schema |= {"since": pl.Date, "until": pl.Date}
    pl.DataFrame(rows, schema=schema).write_parquet(root / "items.parquet")


def open_world(root: Path, table: dict[str, Any]) -> Context:
    write_project(root, log={"items": table}, features=FEATURES, split={"warmup_days": 0})
    for n in range(DAYS):
        write_day(root, day_of(n), tiny_events(day_of(n), rows=12, shift=n))
    return open_context(str(root / "project.toml"), root, root / "ws")


def built(context: Context) -> list[str]:
    """Steps that were not up to date."""
    done = []
    for day in context.source.days():
        ingest_day(context, day)
        if aggregate_day(context, day) is not None:
            done.append(f"aggregates {day}")
    for day in context.source.days():
        if build_examples(context, day) is not None:
            done.append(f"examples {day}")
    return done


def examples(context: Context, day: date = LAST) -> pl.DataFrame:
    return context.workspace.scan("examples", [day]).collect()


def known(snapshots: dict, n: int) -> dict[int, tuple[int, str]]:
    """The oracle: the latest snapshot of a day before day n."""
    earlier = [own for own in snapshots if own < n]
    return snapshots[max(earlier)] if earlier else {}


@settings(max_examples=6, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(snapshots=SNAPSHOT_DAYS, as_spans=st.booleans())
def test_columns_and_keys_equal_brute_force(tmp_path_factory, snapshots, as_spans):
    root = tmp_path_factory.mktemp("dated")
    if as_spans:
        write_spans(root, snapshots)
    else:
        for n, values in snapshots.items():
            write_snapshot(root, n, values)
    context = open_world(root, SPANS if as_spans else SNAPSHOTS)
    built(context)
    shown: dict[tuple[int, str], int] = {}  # impressions of a maker, by day
    for n in range(DAYS):
        for item in tiny_events(day_of(n), rows=12, shift=n)["i"]:
            maker = known(snapshots, n).get(item, (None, None))[1]
            if maker is not None:
                shown[n, maker] = shown.get((n, maker), 0) + 1
    for n in range(DAYS):
        for row in examples(context, day_of(n)).to_dicts():
            price, maker = known(snapshots, n).get(row["item_id"], (None, None))
            assert row["price"] == price
            past = [shown.get((d, maker), 0) for d in range(max(0, n - 3), n)]
            expected = sum(past) / len(past) if any(past) else None
            assert row["maker_daily_impressions_3d"] == pytest.approx(expected)
        if n:  # nothing is known before the first day
            assert audit_day(context, day_of(n), 12).differences == []


@pytest.mark.slow
@settings(max_examples=5, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(snapshots=SNAPSHOT_DAYS, later=st.integers(DAYS - 1, DAYS + 3), values=VALUES)
def test_a_snapshot_of_the_day_or_later_changes_no_feature(
    tmp_path_factory, snapshots, later, values
):
    root = tmp_path_factory.mktemp("later")
    for n, own in snapshots.items():
        write_snapshot(root, n, own)
    context = open_world(root, SNAPSHOTS)
    built(context)
    before = examples(context)
    write_snapshot(root, later, values)
    assert built(context) == []
    pl.testing.assert_frame_equal(examples(context), before)
    key = ["user_id", "item_id", "tab"]
    again = join_features(context, before.lazy().select(key), LAST).collect()
    pl.testing.assert_frame_equal(
        again.select(*key, "price").sort(key), before.select(*key, "price").sort(key)
    )


def test_a_new_snapshot_rebuilds_only_the_days_that_see_it(tmp_path):
    write_snapshot(tmp_path, -1, dict.fromkeys(range(13), (1, "x")))
    context = open_world(tmp_path, SNAPSHOTS)
    assert len(built(context)) == 2 * DAYS
    write_snapshot(tmp_path, 2, dict.fromkeys(range(13), (2, "x")))
    assert built(context) == [
        f"{what} {day_of(n)}" for what in ("aggregates", "examples") for n in (3, 4)
    ]
    assert set(examples(context)["price"]) == {2.0}
    write_snapshot(tmp_path, 0, dict.fromkeys(range(13), (3, "x")))  # seen by days 1 and 2
    assert [step for step in built(context) if step.startswith("aggregates")] == [
        f"aggregates {day_of(n)}" for n in (1, 2)
    ]
    # Days 3 and 4 have the same values, but aggregates of days 1 and 2 in their windows.
    assert set(examples(context)["price"]) == {2.0}
    assert set(examples(context, day_of(2))["price"]) == {3.0}


def test_a_late_action_counts_for_the_values_of_its_impressions_day(tmp_path):
    """Item 1 is of maker x on days 0 and 1, then of y; likes of day 1 arrive on day 2."""
    write_snapshot(tmp_path, -1, {1: (1, "x")})
    write_snapshot(tmp_path, 1, {1: (1, "y")})
    like = {"name": "like", "path": "likes", "window": "2d", "arrived": "got", "organic": True}
    write_project(
        tmp_path,
        log={"items": SNAPSHOTS, "ranges": WITHOUT, "actions": [like]},
        objectives=[{"name": "like", "group": "satisfaction", "label": '"like"'}],
        features=FEATURES,
        split={"warmup_days": 0},
    )
    for n in range(DAYS):
        shown = {"u": [1, 2], "i": [1, 1], "ts": midnight(day_of(n)), "tab": "home"}
        write_day(tmp_path, day_of(n), pl.DataFrame(shown))
        # User 9 was shown nothing.
        liked = {"u": [1, 9], "i": [1, 1], "ts": midnight(day_of(n)) + 1}
        liked = pl.DataFrame(liked).with_columns(got=pl.col("ts") + 24 * 3_600_000).filter(n == 1)
        folder = tmp_path / "likes" / f"date={day_of(n)}"
        folder.mkdir(parents=True)
        liked.write_parquet(folder / "part-0.parquet")
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")

    def by_maker() -> dict[str, tuple[float, int]]:
        daily = context.workspace.scan("aggregates/maker", [day_of(2)])
        sums = daily.group_by("maker").agg(pl.sum("like_sum"), pl.sum("impressions")).collect()
        return {maker: (likes, shown) for maker, likes, shown in sums.iter_rows()}

    built(context)
    assert by_maker() == {"x": (1.0, 0), "y": (1.0, 2)}
    assert audit_day(context, LAST, 2).differences == []
    write_snapshot(tmp_path, -1, {1: (1, "z")})
    built(context)
    assert by_maker() == {"z": (1.0, 0), "y": (1.0, 2)}
    assert audit_day(context, LAST, 2).differences == []


def snapshot_of(root: Path, n: int, **columns: Any) -> None:
    folder = root / "items" / f"date={day_of(n)}"
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"i": [1], "maker": ["x"], **columns}).write_parquet(folder / "part-0.parquet")


def test_columns_added_later_and_wider_types(tmp_path):
    """Prices begin with day 0, as whole numbers; from day 2 on they have fractions."""
    snapshot_of(tmp_path, -1)
    snapshot_of(tmp_path, 0, price=[2])
    snapshot_of(tmp_path, 2, price=[2.5])
    context = open_world(tmp_path, SNAPSHOTS)
    built(context)
    for n, price in ((0, None), (1, 2.0), (2, 2.0), (3, 2.5)):
        table = tables_as_of(context.source, day_of(n))["item_id"].collect()
        assert table.schema["price"] == pl.Float64
        assert table["price"].to_list() == [price]
    every = context.workspace.scan("examples", context.source.days()).collect()
    assert every.filter(pl.col("item_id") == 1)["price"].unique().sort().to_list() == [
        None, 2.0, 2.5,
    ]  # fmt: skip
    snapshot_of(tmp_path, 3)
    with pytest.raises(ProjectError, match=r"date=2026-03-05/.*: column 'price' .* is missing; "):
        tables_as_of(context.source, LAST)
    snapshot_of(tmp_path, 3, price=["dear"])
    with pytest.raises(ProjectError, match=r"column 'price' is String, but Int64 in"):
        tables_as_of(context.source, LAST)


def test_times_are_in_the_zone_of_the_log(tmp_path):
    """The days of New York begin at 5:00 UTC."""
    table = SPANS | {"columns": ["price"]}
    noon = datetime(2026, 3, 3, 5, 0, tzinfo=UTC)
    rows = {
        "i": [1, 1, 2, 2],
        "price": [1.0, 2.0, 3.0, 4.0],
        "since": [None, noon, None, noon + timedelta(seconds=1)],
        "until": [noon, None, noon + timedelta(seconds=1), None],
    }
    pl.DataFrame(rows).write_parquet(tmp_path / "items.parquet")
    write_project(tmp_path, log={"items": table, "timezone": "America/New_York"})
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    third = tables_as_of(context.source, date(2026, 3, 3))["item_id"].collect()
    assert dict(third.select("item_id", "price").iter_rows()) == {1: 2.0, 2: 3.0}
    fourth = tables_as_of(context.source, date(2026, 3, 4))["item_id"].collect()
    assert dict(fourth.select("item_id", "price").iter_rows()) == {1: 2.0, 2: 4.0}


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 2), (1, 3)], r"key 'i' = 7 has two rows that are valid at one time: 2026-03-02 to"),
        ([(0, None), (1, 3)], r"2026-03-02 to open, and 2026-03-03 to 2026-03-05; allowed: each"),
        ([(0, 5), (1, 2)], r"key 'i' = 7 has two rows"),
        ([(None, None), (2, None)], r"always to open, and 2026-03-04 to open"),
        ([(3, 1)], r"key 'i' = 7 is valid from 2026-03-05 to 2026-03-03"),
    ],
)
def test_overlaps_name_the_key(tmp_path, spans, message):
    def days(ends):
        return pl.Series([None if n is None else day_of(n) for n in ends], dtype=pl.Date)

    frame = pl.DataFrame(
        {
            "i": [7] * len(spans),
            "price": 1.0,
            "maker": "x",
            "since": days([first for first, _ in spans]),
            "until": days([last for _, last in spans]),
        }
    )
    other = frame.with_columns(pl.lit(8, pl.Int64).alias("i")).head(1)
    pl.concat([other, frame]).write_parquet(tmp_path / "items.parquet")
    context = open_world(tmp_path, SPANS)
    with pytest.raises(ProjectError, match=message):
        tables_as_of(context.source, LAST)


def test_spans_that_touch_or_are_empty_do_not_overlap(tmp_path):
    bounds = [(0, 2), (2, 2), (2, None)]
    frame = pl.DataFrame(
        {
            "i": [7] * 3,
            "price": [1.0, 2.0, 3.0],
            "maker": "x",
            "since": [day_of(first) for first, _ in bounds],
            "until": [day_of(2), day_of(2), None],
        }
    )
    frame.write_parquet(tmp_path / "items.parquet")
    context = open_world(tmp_path, SPANS)
    for n, price in ((0, 1.0), (1, 1.0), (2, 3.0), (4, 3.0)):
        table = tables_as_of(context.source, day_of(n))["item_id"].collect()
        assert table["price"].to_list() == [price]


def zoned(*times: datetime | None) -> pl.Series:
    """Moments given in UTC, in the zone of Berlin."""
    naive = pl.Series(times, dtype=pl.Datetime("us"))
    return naive.dt.replace_time_zone("UTC").dt.convert_time_zone("Europe/Berlin")


def in_berlin(tmp_path: Path, since: pl.Series, until: pl.Series) -> Context:
    """Rows of one item with prices 1, 2, …; Berlin is one hour ahead of UTC, in summer two."""
    frame = pl.DataFrame({"i": 7, "price": range(1, len(since) + 1), "maker": "x"})
    frame.with_columns(since.alias("since"), until.alias("until")).write_parquet(
        tmp_path / "items.parquet"
    )
    write_project(tmp_path, log={"items": SPANS, "timezone": "Europe/Berlin"}, features=FEATURES)
    return open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")


def priced(context: Context, day: date) -> list[float]:
    return tables_as_of(context.source, day)["item_id"].collect()["price"].to_list()


def test_an_end_that_is_a_time_overlaps_a_begin_that_is_a_date(tmp_path):
    noon = zoned(datetime(2026, 3, 4, 11), None)
    context = in_berlin(tmp_path, pl.Series([date(2026, 1, 1), date(2026, 3, 4)]), noon)
    with pytest.raises(ProjectError, match=r"'i' = 7 has two rows .* 2026-01-01 to 2026-03-04 12"):
        priced(context, LAST)


def test_an_end_that_is_a_date_touches_a_begin_that_is_its_first_moment(tmp_path):
    since = zoned(datetime(2025, 12, 31, 23), datetime(2026, 3, 3, 23))
    context = in_berlin(tmp_path, since, pl.Series([date(2026, 3, 4), None]))
    assert [priced(context, date(2026, 3, n)) for n in (3, 4)] == [[1], [2]]


def test_a_begin_in_the_hour_that_summer_time_skips_is_its_end(tmp_path):
    """On 2026-03-29, 02:00 is followed by 03:00."""
    since = pl.Series([datetime(2026, 3, 28), datetime(2026, 3, 29, 2, 30)])
    until = pl.Series([datetime(2026, 3, 29, 3), None])
    context = in_berlin(tmp_path, since, until)
    seen = [priced(context, date(2026, 3, n)) for n in (28, 29, 30)]
    assert seen == [[1], [1], [2]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"valid_to": "until"}, r"log.items: valid_to: 'until'; allowed: with valid_from"),
        ({"valid_from": "s", "partition": "date"}, r"partition: 'date', and valid_from = 's'"),
        ({"partition": "dt=%Y"}, r"log.items.partition: 'dt=%Y' does not tell days apart"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, table, message):
    write_project(tmp_path, log={"items": {"path": "items", "key": "i"} | table})
    with pytest.raises(ProjectError, match=message):
        open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")


def test_mistakes_in_the_data_are_named(tmp_path):
    context = open_world(tmp_path, SNAPSHOTS)
    with pytest.raises(ProjectError, match=r"items: not found; log.items.path = 'items' must be"):
        tables_as_of(context.source, LAST)
    (tmp_path / "items").mkdir()
    with pytest.raises(ProjectError, match=r"items: holds no snapshot; log.items.partition ="):
        tables_as_of(context.source, LAST)
    undated = {key: value for key, value in SNAPSHOTS.items() if key != "partition"}
    context = open_world(tmp_path, undated)
    with pytest.raises(ProjectError, match=r"dated snapshots needs log.items.partition"):
        tables_as_of(context.source, LAST)
    numbers = pl.DataFrame({"i": [1], "price": 1.0, "maker": "x", "since": 3, "until": 4})
    numbers.write_parquet(tmp_path / "items.parquet")
    context = open_world(tmp_path, SPANS)
    with pytest.raises(ProjectError, match=r"column 'since' \(log.items.valid_from\) is Int64"):
        tables_as_of(context.source, LAST)
