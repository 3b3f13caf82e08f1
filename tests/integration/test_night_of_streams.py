"""A night on a feed whose likes are a stream of their own and arrive up to a day later."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from mtl_ranker.features.audit import audit_day
from tests.nights import run_night
from tests.projects import SMALL, edit_project, write_project

DELAYED = 9 * 3_600_000  # milliseconds


def split_likes(feed: Path, target: Path) -> Path:
    """The simulated feed with its likes as a stream, nine hours after their impressions."""
    likes: list[pl.DataFrame] = []
    folders = sorted((feed / "log").glob("date=*"))
    for folder in folders:
        frame = pl.read_parquet(folder / "*.parquet", hive_partitioning=False)
        frame = frame.with_columns(id=pl.lit(folder.name) + pl.int_range(pl.len()).cast(pl.String))
        liked = frame.filter(pl.col("like") == 1)
        likes.append(liked.select("user", "item", "shown_at_ms", "id"))
        shown = target / "log" / folder.name
        shown.mkdir(parents=True)
        frame.drop("like").write_parquet(shown / "part-0.parquet")
    stream = pl.concat(likes).with_columns(pl.col("shown_at_ms") + DELAYED)
    at = pl.from_epoch("shown_at_ms", "ms").dt.date().cast(pl.String)
    for folder in folders:
        own = target / "likes" / folder.name
        own.mkdir(parents=True)
        rows = stream.filter(at == folder.name.removeprefix("date="))
        rows.write_parquet(own / "part-0.parquet")
    for table in ("items.parquet", "users.parquet"):
        (target / table).symlink_to(feed / table)
    like = {"name": "like", "path": "likes", "window": "12h", "impression": "id"}
    write_project(target, SMALL, log={"impression": "id", "actions": [like]})
    return target


@pytest.mark.slow
def test_a_night_on_streams_waits_for_labels_and_is_free_of_leakage(feed, tmp_path):
    root = split_likes(feed, tmp_path)
    night = run_night(root)
    context, last = night.context, night.context.last_day()
    assert night.suite.days.test == [last - timedelta(days=1)]
    assert audit_day(context, last - timedelta(days=1), 50).differences == []
    day = last - timedelta(days=1)
    examples = context.workspace.scan("examples", [day]).collect()
    log = pl.read_parquet(feed / "log" / f"date={day}" / "*.parquet", hive_partitioning=False)
    assert examples["label_like"].sum() == log["like"].sum() > 0
    assert night.ranked.rows > 0


@pytest.mark.slow
def test_without_waiting_the_last_day_has_positives_only(feed, tmp_path):
    root = split_likes(feed, tmp_path)
    edit_project(root, training={"immature": "positives"})
    night = run_night(root)
    assert night.suite.days.test == [night.context.last_day()]
    labels = night.suite.held_out.frame.filter(pl.col("timestamp").dt.hour() >= 12)["label_like"]
    assert set(labels.drop_nulls()) <= {1.0}
    assert night.suite.held_out.frame["label_click"].null_count() == 0
