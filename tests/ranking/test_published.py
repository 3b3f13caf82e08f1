"""Rankings in a Delta table: one commit a day, read back by other readers, and refused commits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mtl_ranker.context import Context, without_log
from mtl_ranker.errors import ProjectError
from mtl_ranker.ranking.published import awaits_publishing, publish_to_table
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST
from tests.projects import TINY, project
from tests.stores import s3_server

NEXT = FIRST + timedelta(days=1)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


def context_of(folder: Path, place: str | Path) -> Context:
    return without_log(project(TINY, scoring={"publish": str(place)}), Workspace(folder))


def rank(context: Context, day=FIRST, model: str = "1", users: int = 4) -> pl.DataFrame:
    """Publish a ranking of two items for each user in the workspace."""
    frame = pl.DataFrame(
        {
            "user_id": [n // 2 for n in range(2 * users)],
            "item_id": list(range(2 * users)),
            "rank": pl.Series([n % 2 + 1 for n in range(2 * users)], dtype=pl.UInt32),
            "score": [1 / (n + 3) for n in range(2 * users)],
            "model_version": [model] * (2 * users),
        }
    )
    context.workspace.publish("rankings", day, frame, {"model version": model})
    return frame


def rows_of(place: str | Path, day) -> pl.DataFrame:
    rows = pl.scan_delta(str(place)).filter(pl.col("date") == day).drop("date")
    return rows.sort("user_id", "rank").collect()


def signed(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.cast({"rank": pl.Int64})


def test_a_day_is_replaced_and_others_stay(tmp_path: Path):
    place = tmp_path / "table"
    context = context_of(tmp_path / "ws", place)
    first, second = rank(context, FIRST), rank(context, NEXT, users=3)
    assert [publish_to_table(context, day) for day in (FIRST, NEXT)] == [1, 2]
    again = rank(context, FIRST, model="2", users=5)
    assert publish_to_table(context, FIRST) == 3
    assert_frame_equal(rows_of(place, FIRST), signed(again))
    assert_frame_equal(rows_of(place, NEXT), signed(second))
    earlier = pl.scan_delta(str(place), version=2).filter(pl.col("date") == FIRST)
    assert_frame_equal(earlier.drop("date").sort("user_id", "rank").collect(), signed(first))


def test_files_of_a_day_are_plain_parquet_without_this_package(tmp_path: Path):
    place = tmp_path / "table"
    context = context_of(tmp_path / "ws", place)
    frame = rank(context)
    publish_to_table(context, FIRST)
    files = list((place / f"date={FIRST}").glob("*.parquet"))
    assert_frame_equal(pl.read_parquet(files, hive_partitioning=False), signed(frame))


def test_a_ranking_that_the_table_has_is_not_written_twice(tmp_path: Path):
    context = context_of(tmp_path / "ws", tmp_path / "table")
    rank(context, FIRST)
    rank(context, NEXT)
    assert awaits_publishing(context, FIRST)
    publish_to_table(context, FIRST)
    publish_to_table(context, NEXT)
    assert not awaits_publishing(context, FIRST)
    assert publish_to_table(context, FIRST) is None
    rank(context, FIRST, model="2")
    assert awaits_publishing(context, FIRST)


def test_a_new_objective_adds_a_column(tmp_path: Path):
    place = tmp_path / "table"
    context = context_of(tmp_path / "ws", place)
    rank(context, FIRST)
    publish_to_table(context, FIRST)
    more = rank(context, NEXT).with_columns(p_like=pl.lit(0.5))
    context.workspace.publish("rankings", NEXT, more, {"model version": "2"})
    publish_to_table(context, NEXT)
    assert rows_of(place, FIRST)["p_like"].null_count() == 8
    assert rows_of(place, NEXT)["p_like"].to_list() == [0.5] * 8


def test_two_runs_that_publish_a_day_leave_one_whole_ranking(tmp_path: Path, s3: str):
    place = "s3://feed/contested"
    contexts = [context_of(tmp_path / name, place) for name in "abc"]
    frames = [
        rank(c, FIRST, m, users=n) for c, m, n in zip(contexts, "123", (3, 4, 5), strict=True)
    ]

    def publish(context: Context) -> int | None:
        try:
            return publish_to_table(context, FIRST)
        except ProjectError:
            return None

    with ThreadPoolExecutor(3) as threads:
        versions = list(threads.map(publish, contexts))
    assert any(version is not None for version in versions)
    options = {"aws_endpoint_url": s3, "aws_allow_http": "true"}
    found = pl.scan_delta(place, storage_options=options).drop("date").sort("user_id", "rank")
    assert any(found.collect().equals(signed(frame)) for frame in frames)


def test_a_store_that_is_not_there_leaves_the_ranking_in_the_workspace(tmp_path: Path, s3: str):
    context = context_of(tmp_path / "ws", "s3://other/rankings")
    frame = rank(context)
    with pytest.raises(ProjectError, match=r"s3://other/rankings: .*scoring.publish"):
        publish_to_table(context, FIRST)
    assert_frame_equal(context.workspace.scan("rankings", [FIRST]).collect(), frame)


def test_where_rankings_are_published_does_not_change_their_digest():
    plain, published = project(TINY), project(TINY, scoring={"publish": "s3://feed/rankings"})
    assert plain.digest("scoring") == published.digest("scoring")
