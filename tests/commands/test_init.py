"""`mtl-ranker init`: folders of many kinds, whose first project file passes `check`."""

from __future__ import annotations

import tomllib
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_ranker.commands.check import check_project
from mtl_ranker.commands.init import DESCRIBE, TUNING, write_project_file
from mtl_ranker.config import Project, load_project, parse_project
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.discover import ITEM, USER, Hints, discover, names_id, unit_of, words
from mtl_ranker.logs.roles import OUTCOME
from tests.commands.test_check_actions import streams
from tests.conftest import FIRST, tiny_events, write_day, write_log


def started(folder: Path, out: Path | None = None, **hints: str) -> tuple[Project, str]:
    """The project of a folder's first project file, and what was printed."""
    out = out or folder / "first.toml"
    lines = "\n".join(write_project_file(folder, out, Hints(**hints)))
    return load_project(str(out)), lines


def checked(folder: Path, out: Path | None = None) -> str:
    return "\n".join(check_project(str(out or folder / "first.toml"), folder))


def features_of(project: Project) -> set[str]:
    """Every column that is, or makes, a feature of its own row."""
    features = project.features
    named = {c.column for c in features.categoricals} | {c.column for c in features.lists}
    return {*named, *features.numerics, *project.log.context}


def labels_of(project: Project) -> set[str]:
    return {o.label.strip('"') for o in project.objectives} | {
        text.strip('"') for text in project.features.signals.values()
    }


# One joined log


@pytest.mark.slow
def test_the_simulated_feed(feed, tmp_path):
    project, lines = started(feed, tmp_path / "feed.toml")
    log = project.log
    assert (log.path, log.user, log.item, log.timestamp) == ("log", "user", "item", "shown_at_ms")
    assert (log.timestamp_unit, log.timezone, log.partition) == ("ms", "UTC", "date")
    assert (log.position, log.context) == ("position", ["surface"])
    assert log.users is not None
    assert log.items is not None
    assert (log.users.path, log.items.key) == ("users.parquet", "item")
    assert (log.items.lists, log.items.published) == ({"tags": ","}, "published")
    assert [(o.label, o.group, o.kind) for o in project.objectives] == [
        ("click", "engagement", "binary"),
        ("watch_seconds", "engagement", "regression"),
        ("like", "satisfaction", "binary"),
    ]
    watched = pl.scan_parquet(feed / "log", hive_partitioning=True).filter(
        pl.col("watch_seconds") > 0
    )
    mean = watched.select(pl.col("watch_seconds").mean()).collect().item()
    assert project.scoring.weights.pop("watch_seconds") == pytest.approx(1 / mean, rel=0.1)
    assert project.scoring.weights == {"click": 1.0, "like": 1.0}
    assert project.features.embeddings == ["content"]
    assert "truth" not in (tmp_path / "feed.toml").read_text("utf-8")
    assert "unsure  columns of the log without a role: list_propensity, propensity" in lines
    assert "candidates of 10 users ranked" in checked(feed, tmp_path / "feed.toml")


def test_the_first_part_describes_the_log_and_is_a_project_without_the_second(feed, tmp_path):
    project, _ = started(feed, tmp_path / "feed.toml")
    text = (tmp_path / "feed.toml").read_text("utf-8")
    first, heading, second = text.partition(TUNING[0])
    assert heading
    assert first.index(DESCRIBE[0]) < first.index("[log]")
    assert set(tomllib.loads(second)) == {"split", "training"}
    alone, both = parse_project(first, "first part").model_dump(), project.model_dump()
    assert {key for key in both if alone[key] != both[key]} == {"split", "training"}


def test_kuairand_in_its_own_zone(shared_data, tmp_path):
    project, _ = started(shared_data / "kuairand-pure", tmp_path / "k.toml")
    log = project.log
    assert (log.user, log.item, log.timestamp) == ("user_id", "video_id", "time_ms")
    assert (log.timezone, log.random_exposure) == ("Etc/GMT-8", "is_rand")
    assert log.context == ["tab"]
    assert {"is_click", "long_view", "is_like"} < {o.label for o in project.objectives}
    assert {o.name for o in project.objectives if not o.good} == {"is_hate"}
    assert not features_of(project) & (labels_of(project) | {"hourmin", "duration_ms"})


@pytest.mark.slow
def test_kuairand_passes_the_check(shared_data, tmp_path):
    started(shared_data / "kuairand-pure", tmp_path / "k.toml")
    assert "ranked" in checked(shared_data / "kuairand-pure", tmp_path / "k.toml")


def test_an_undivided_log_of_one_file(tmp_path):
    days = [tiny_events(FIRST + timedelta(days=n), shift=n) for n in range(5)]
    pl.concat(days).write_parquet(tmp_path / "clicks_2026.parquet")
    project, _ = started(tmp_path)
    assert project.log.path == "clicks_2026.parquet"
    assert [(o.name, o.kind) for o in project.objectives] == [
        ("click", "binary"),
        ("play", "regression"),
    ]
    assert (project.split.warmup_days, project.split.train_days) == (1, 2)
    assert "5 days" in checked(tmp_path)


# Streams


def test_impressions_and_a_stream_of_clicks(tmp_path):
    streams(tmp_path)
    project, lines = started(tmp_path)
    (action,) = project.log.actions
    assert (action.name, action.path, action.window) == ("click", "clicks", "30m")
    assert action.impression is None
    assert "click" in {o.label for o in project.objectives}
    assert "found   actions click in clicks: 100% have an earlier impression" in lines
    assert "ok  click:" in checked(tmp_path)


def test_a_stream_with_ids_its_own_names_and_arrivals(tmp_path):
    """Likes come five hours later in seconds, by the id of the impression."""
    for n in range(5):
        day = FIRST + timedelta(days=n)
        frame = tiny_events(day, shift=n).with_columns(
            impression_id=pl.lit(n * 100) + pl.int_range(40)
        )
        write_day(tmp_path, day, frame)
        likes = frame.filter(pl.col("click") == 1).select(
            pl.col("u").alias("user_id"),
            pl.col("i").alias("item_id"),
            (pl.col("ts") // 1000 + 5 * 3600).alias("liked_at"),
            (pl.col("ts") // 1000 + 6 * 3600).alias("received_at"),
            "impression_id",
            pl.lit(4).alias("stars"),
        )
        (tmp_path / f"likes/date={day}").mkdir(parents=True)
        likes.write_parquet(tmp_path / f"likes/date={day}/0.parquet")
    project, _ = started(tmp_path)
    (action,) = project.log.actions
    assert (action.user, action.item, action.timestamp) == ("user_id", "item_id", "liked_at")
    assert (action.timestamp_unit, action.arrived) == ("s", "received_at")
    assert (project.log.impression, action.impression) == ("impression_id", "impression_id")
    assert action.window == "6h"
    assert [o.label for o in project.objectives if o.group == "satisfaction"] == ["like"]
    assert '# value = "stars"  # ?' in (tmp_path / "first.toml").read_text("utf-8")
    assert "ok  like:" in checked(tmp_path)


def recipes(folder: Path, by_arrival: bool) -> None:
    """Views and cookings with local times, texts as ids, and an id that both have.

    A third of the cookings arrives 30 hours later.
    """
    folders: dict[date, list[pl.DataFrame]] = {}
    for n in range(8):
        day = FIRST + timedelta(days=n)
        frame = tiny_events(day, shift=n).select(
            pl.format("r{}", "u").alias("reader"),
            pl.format("recipe-{}", "i").alias("recipe"),
            pl.from_epoch("ts", "ms").alias("seen_local"),
            pl.format("{}-{}", pl.lit(n), pl.int_range(40)).alias("impr"),
            "tab",
            "click",
        )
        write_day(folder, day, frame.drop("click"))
        done = pl.col("seen_local") + pl.duration(minutes=30)
        late = pl.duration(hours=pl.when(pl.int_range(pl.len()) % 3 == 0).then(30).otherwise(0))
        cooked = frame.filter(pl.col("click") == 1).select(
            "reader",
            "recipe",
            done.alias("cooked_local"),
            (done + late + pl.duration(minutes=1)).alias("in_lake_local"),
            "impr",
            pl.lit("app").alias("client"),
            pl.lit(4).alias("stars"),
        )
        for row in cooked.with_columns(day=pl.lit(day)).partition_by("in_lake_local"):
            at = row["in_lake_local"].dt.date()[0] if by_arrival else day
            folders.setdefault(at, []).append(row.drop("day"))
    for day in [FIRST + timedelta(days=n) for n in range(8)]:
        place = folder / f"cooked/date={day}"
        place.mkdir(parents=True)
        pl.concat(folders[day]).write_parquet(place / "0.parquet")


@pytest.mark.parametrize("by_arrival", [False, True])
def test_a_later_time_is_that_of_arrival_and_an_id_is_found_by_its_values(tmp_path, by_arrival):
    recipes(tmp_path, by_arrival)
    project, lines = started(tmp_path)
    (action,) = project.log.actions
    assert (action.timestamp, action.arrived) == ("cooked_local", "in_lake_local")
    assert action.window == "2d"
    assert (project.log.impression, action.impression) == ("impr", "impr")
    text = (tmp_path / "first.toml").read_text("utf-8")
    assert "# ? not used: client" in text
    assert '# value = "stars"  # ?' in text
    assert 'timezone = "UTC"  # ? times have no zone' in text
    assert "unsure  times of 'seen_local' have no zone, and are read in timezone = 'UTC'" in lines
    assert "unsure  actions cooked: 'in_lake_local' is taken for the time of arrival" in lines
    assert "without a role" not in lines
    assert "outside the day" not in checked(tmp_path)


def test_a_further_time_that_is_no_arrival_is_named(tmp_path):
    """The time of the impression, and the end of an offer."""
    recipes(tmp_path, False)
    for file in sorted(tmp_path.glob("cooked/*/*.parquet")):
        pl.read_parquet(file).with_columns(
            (pl.col("cooked_local") - pl.duration(minutes=30)).alias("shown_local"),
            (pl.col("cooked_local") + pl.duration(days=3)).alias("expires_local"),
        ).drop("in_lake_local").write_parquet(file)
    project, _ = started(tmp_path)
    (action,) = project.log.actions
    assert (action.timestamp, action.arrived) == ("cooked_local", None)
    text = (tmp_path / "first.toml").read_text("utf-8")
    assert "# ? a further time, not used: shown_local" in text
    assert "# ? a further time, not used: expires_local" in text


# Requests


def requests(folder: Path) -> None:
    """Requests as in EB-NeRD: ids of articles in view and clicked, and the article of the page."""
    for n in range(6):
        day = FIRST + timedelta(days=n)
        rows = tiny_events(day, shift=n).with_columns(request=pl.int_range(40) // 4)
        found = rows.group_by("request", maintain_order=True).agg(
            (n * 100 + pl.col("request").first()).alias("impression_id"),
            pl.from_epoch(pl.col("ts").first(), "ms").alias("impression_time"),
            pl.col("i").first().alias("article_id"),
            pl.col("tab").first().alias("device_type"),
            pl.col("i").unique(maintain_order=True).alias("article_ids_inview"),
            pl.col("i").filter(pl.col("click") == 1).alias("article_ids_clicked"),
            pl.col("u").first().alias("user_id"),
            pl.col("play").first().alias("read_time"),
        )
        write_day(folder, day, found.drop("request"))
    topics = ["a", "b", "c"] * 4 + ["a"]
    pl.DataFrame({"article_id": range(13), "topic": topics}).write_parquet(
        folder / "articles.parquet"
    )


def test_requests_with_lists(tmp_path):
    requests(tmp_path)
    project, _ = started(tmp_path)
    log = project.log
    assert log.requests is not None
    assert (log.requests.items, log.requests.clicked) == (
        "article_ids_inview",
        "article_ids_clicked",
    )
    assert (log.request, log.item, log.timestamp_unit) == ("impression_id", "item_id", "datetime")
    assert log.items is not None
    assert log.items.key == "article_id"
    assert [o.label for o in project.objectives] == ["clicked"]
    assert "read_time" not in features_of(project) | labels_of(project)
    assert "candidates of 10 users ranked" in checked(tmp_path)


def test_requests_of_marked_text(tmp_path):
    for n in range(5):
        day = FIRST + timedelta(days=n)
        rows = tiny_events(day, shift=n)
        text = pl.format("N{}-{} N{}-0", "i", "click", pl.col("i") + 20)
        kept = rows.select(pl.col("u").alias("user_id"), pl.col("ts").alias("time"), "tab")
        write_day(tmp_path, day, kept.with_columns(rows.select(impressions=text)))
    project, _ = started(tmp_path)
    assert project.log.requests is not None
    assert (project.log.requests.items, project.log.requests.mark) == ("impressions", "-")
    assert "80 rows, 0 quarantined" in checked(tmp_path)


# A shop, with names of its own


def shop(folder: Path, days: int = 6) -> None:
    rng, rows = np.random.default_rng(3), 200
    brands = [f"brand {n % 6}" for n in range(30)]
    pl.DataFrame(
        {
            "sku": [f"S{n:03}" for n in range(30)],
            "brand": brands,
            "list_price": [5.0 + n for n in range(30)],
            "title": [f"a long and unique title of product {n}" for n in range(30)],
            "avg_rating": [n % 5 + 0.5 for n in range(30)],
            "launched": [date(2025, 1, 1) + timedelta(days=n) for n in range(30)],
            "in_stock": [n % 7 > 0 for n in range(30)],
        }
    ).write_parquet(folder / "products.parquet")
    pl.DataFrame(
        {"id": range(50), "age": [20 + n for n in range(50)], "plan": ["free", "paid"] * 25}
    ).write_parquet(folder / "customers.parquet")
    for n in range(days):
        day = FIRST + timedelta(days=n)
        at = datetime(day.year, day.month, day.day, 6, tzinfo=UTC)
        item = rng.integers(0, 30, rows)
        frame = pl.DataFrame(
            {
                "customerId": rng.integers(0, 50, rows),
                "sku": [f"S{k:03}" for k in item],
                "shownAt": [(at + timedelta(minutes=4 * k)).isoformat() for k in range(rows)],
                "placement": rng.choice(["home", "cart"], rows),
                "price_shown": 5.0 + item,
                "addedToCart": rng.random(rows) < 0.3,
                "purchased": rng.random(rows) < 0.2,
                "order_value": np.where(rng.random(rows) < 0.2, 9.5, 0.0),
                "returned": rng.integers(0, 2, rows),
                "experiment": rng.choice(["x", "y"], rows),
            }
        )
        place = folder / "events" / "views" / day.strftime("dt=%Y%m%d")
        for part in range(2):
            (place / f"hour={part:02}").mkdir(parents=True)
            frame[part::2].write_parquet(place / f"hour={part:02}" / "part.parquet")
    (folder / "notes.csv").write_text("a,b\n1,2\n")


def test_a_shop_with_names_of_its_own(tmp_path):
    shop(tmp_path)
    project, lines = started(tmp_path)
    log = project.log
    assert (log.path, log.partition) == ("events/views", "dt=%Y%m%d")
    assert (log.user, log.item, log.timestamp) == ("customerId", "sku", "shownAt")
    assert log.timestamp_unit == "iso"
    assert log.context == ["placement", "price_shown"]
    assert log.list_by == ["user_id", "placement"]
    assert log.users is not None
    assert log.items is not None
    assert (log.users.path, log.users.key) == ("customers.parquet", "id")
    assert (log.items.key, log.items.published) == ("sku", "launched")
    assert log.items.columns == ["brand", "in_stock", "list_price"]
    assert [(o.name, o.group, o.good) for o in project.objectives] == [
        ("added_to_cart", "engagement", True),
        ("purchased", "satisfaction", True),
        ("order_value", "satisfaction", True),
        ("returned", "satisfaction", False),
    ]
    assert "good = false  # ? by its name it is bad" in (tmp_path / "first.toml").read_text()
    assert (
        "unsure  taken for undesired outcomes, used as objectives with good = false: returned"
        in lines
    )
    assert ["user_id", "brand"] in project.features.entities
    assert "unsure  columns of the log without a role: experiment" in lines
    assert "would contain later events: avg_rating" in lines
    assert "notes.csv: not Parquet, not read" in lines
    text = checked(tmp_path)
    assert "contract on 2026-03-07: 200 rows, 0 quarantined" in text
    assert "price_shown of the item's last impression" in text


def test_dated_tables_and_vectors_of_one_length(tmp_path):
    write_log(tmp_path, 5)
    for n in (-1, 2):
        folder = tmp_path / "items" / f"date={FIRST + timedelta(days=n)}"
        folder.mkdir(parents=True)
        count = 13 if n == 2 else 4  # ids of the newest snapshot count
        items = pl.DataFrame(
            {
                "i": range(count),
                "maker": ["x", "y", "x", "y", "z"][:4] + ["z"] * (count - 4),
                "content": [None, *([0.5, k / 7] for k in range(1, count))],
                "ragged": [[0.5] * (1 + k % 2) for k in range(count)],
            }
        )
        items.write_parquet(folder / "part-0.parquet")
    project, _ = started(tmp_path, item="i")
    items_table = project.log.items
    assert items_table is not None
    assert (items_table.path, items_table.key, items_table.partition) == ("items", "i", "date")
    assert items_table.columns == ["maker", "content"]
    assert project.features.embeddings == ["content"]
    assert "candidates of 10 users ranked" in checked(tmp_path)


@pytest.mark.parametrize(
    ("first", "end"), [("valid_from", "valid_to"), ("effective_since", "effective_until")]
)
def test_rows_with_times_in_which_they_are_valid(tmp_path, first, end):
    write_log(tmp_path, 5)
    changed = datetime(FIRST.year, FIRST.month, FIRST.day + 2)
    items = pl.DataFrame({"i": range(13), "maker": ["x", "y", "z"] * 4 + ["x"]})
    before = items.with_columns(pl.lit(None, pl.Datetime).alias(first), pl.lit(changed).alias(end))
    after = items.with_columns(pl.lit(changed).alias(first), pl.lit(None, pl.Datetime).alias(end))
    pl.concat([before, after]).write_parquet(tmp_path / "items.parquet")
    project, _ = started(tmp_path, item="i")
    table = project.log.items
    assert table is not None
    assert (table.key, table.valid_from, table.valid_to) == ("i", first, end)
    assert table.columns == ["maker"]
    assert "without dates" not in checked(tmp_path)


# What is refused


def test_a_file_is_not_replaced(tiny):
    (tiny / "first.toml").write_text("mine")
    with pytest.raises(ProjectError, match=r"--out .*first.toml: exists; allowed: a file that"):
        started(tiny)
    assert (tiny / "first.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"no Parquet files with a user, .*found: no Parquet file"),
        (
            lambda folder: (folder / "log.csv").write_text("user,item,ts\n"),
            r"found: no Parquet file; log.csv: not Parquet, not read",
        ),
        (
            lambda folder: (
                tiny_events(FIRST).rename({"u": "who"}).write_parquet(folder / "a.parquet")
            ),
            r"found: a.parquet \(who, i, ts, tab, click, play\).*--user and --item name columns",
        ),
        (
            lambda folder: (
                tiny_events(FIRST).drop("click", "play").write_parquet(folder / "a.parquet")
            ),
            r"a.parquet: no column or stream of actions looks like a label .*: u, i, ts, tab",
        ),
    ],
)
def test_a_folder_without_a_log_or_labels_is_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ProjectError, match=message):
        started(tmp_path)
    assert not (tmp_path / "first.toml").exists()


def test_columns_can_be_named(tmp_path):
    for n in range(5):
        day = FIRST + timedelta(days=n)
        write_day(tmp_path, day, tiny_events(day, shift=n).rename({"u": "who", "i": "what"}))
    project, _ = started(tmp_path, user="who", item="what")
    assert (project.log.user, project.log.item) == ("who", "what")


# Names, units, laws


@pytest.mark.parametrize(
    ("name", "user", "item"),
    [
        ("user_id", True, False),
        ("userId", True, False),
        ("memberid", True, False),
        ("CUSTOMER_KEY", True, False),
        ("uid", True, False),
        ("video", False, True),
        ("product_sku", False, True),
        ("user_age", False, False),
        ("item_price", False, False),
        ("impression_id", False, False),
        ("order_id", False, False),
    ],
)
def test_names_of_ids(name, user, item):
    assert (names_id(name, USER) > 0, names_id(name, ITEM) > 0) == (user, item)


moments = st.datetimes(datetime(1995, 1, 1), datetime(2090, 1, 1))


@given(moments, st.sampled_from(["s", "ms", "us", "ns"]), st.booleans())
def test_the_unit_of_whole_times_is_that_of_their_range(moment, unit, text):
    seconds = (moment - datetime(1970, 1, 1)).total_seconds()
    number = int(seconds * {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}[unit])
    assert unit_of(pl.Series([number, None])) == unit
    written = [moment.isoformat(" " if text else "T"), None]
    assert unit_of(pl.Series(written)) == "iso"
    assert unit_of(pl.Series([moment])) == "datetime"


names = st.fixed_dictionaries(
    {
        "u": st.sampled_from(["user_id", "uid", "memberId", "customer", "visitor_id"]),
        "i": st.sampled_from(["item_id", "videoId", "sku", "article", "news_id"]),
        "ts": st.sampled_from(["ts", "event_time", "timestamp", "shown_at"]),
        "click": st.sampled_from(["click", "isClicked", "clk", "opened", "purchased"]),
        "play": st.sampled_from(["play_time", "watch_ms", "dwell", "rating"]),
        "tab": st.sampled_from(["tab", "surface", "variant", "device"]),
    }
)
layouts = st.sampled_from(
    ["date=%Y-%m-%d", "dt=%Y%m%d", "year=%Y/month=%m/day=%d", "%Y-%m-%d", "%Y/%m/%d"]
)


@given(names, layouts, st.sampled_from(["ms", "s", "us", "datetime"]), st.randoms())
@settings(max_examples=25)
def test_labels_are_never_features_and_roles_are_found(
    tmp_path_factory, called, layout, unit, order
):
    root = tmp_path_factory.mktemp("named")
    columns: list[Any] = list(called)
    order.shuffle(columns)
    for n in range(4):
        day = FIRST + timedelta(days=n)
        rows = tiny_events(day, shift=n)
        time = pl.col("ts")
        times = {"ms": time, "s": time // 1000, "us": time * 1000}
        times["datetime"] = pl.from_epoch("ts", "ms")
        place = root / "data" / day.strftime(layout)
        place.mkdir(parents=True)
        frame = rows.with_columns(times[unit].alias("ts")).select(columns).rename(called)
        frame.write_parquet(place / "x.parquet")
    project, _ = started(root)
    log = project.log
    assert (log.user, log.item, log.timestamp) == (called["u"], called["i"], called["ts"])
    assert log.timestamp_unit == unit
    assert log.layout == layout
    assert labels_of(project) == {called["click"], called["play"]}
    assert not features_of(project) & labels_of(project)
    assert all(not set(words(name)) & OUTCOME for name in features_of(project))
    known = called["tab"] != "variant"
    assert log.context == ([called["tab"]] if known else [])


def test_a_log_is_found_beside_larger_files(tmp_path):
    """The table of users has more rows than a day of the log, and a time."""
    write_log(tmp_path, 4)
    table = pl.DataFrame({"user_id": range(5_000), "created_at": datetime(2026, 1, 1)})
    table.write_parquet(tmp_path / "users.parquet")
    found = discover(tmp_path)
    assert (found.log.data.path, found.streams) == ("log", [])
    assert found.users is not None
    assert found.users.key == "user_id"
