"""Rankings as DuckDB reads them: the documented columns and values, while days are replaced."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest
from deltalake import DeltaTable
from polars.testing import assert_frame_equal

from mtl_ranker.context import Context, without_log
from mtl_ranker.ranking.published import publish_to_table
from mtl_ranker.stores.objects import is_address, store_options
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST
from tests.projects import TINY, project
from tests.stores import BUCKET, s3_server

USERS = 50
COLUMNS = {
    "user_id": "BIGINT",
    "item_id": "VARCHAR",
    "surface": "VARCHAR",
    "click": "FLOAT",
    "score": "FLOAT",
    "rank": "BIGINT",
    "model_version": "VARCHAR",
    "date": "DATE",
}
IN_S3_SLOW = pytest.mark.parametrize(
    "place", ["in a folder", pytest.param("in S3", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(params=["in a folder", "in S3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "in a folder":
        return str(tmp_path / "rankings")
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def context(place: str, tmp_path: Path) -> Context:
    return without_log(project(TINY, scoring={"publish": place}), Workspace(tmp_path / "ws"))


def rank(context: Context, day: date, model: str, users: int = USERS) -> pl.DataFrame:
    """Publish a ranking of three items for each user in the workspace and in the table."""
    frame = pl.DataFrame(
        {
            "user_id": [n // 3 for n in range(3 * users)],
            "item_id": [f"i{n % 7}" for n in range(3 * users)],
            "surface": pl.Series([f"s{n % 2}" for n in range(3 * users)], dtype=pl.Categorical),
            "click": pl.Series([1 / (n + 2) for n in range(3 * users)], dtype=pl.Float32),
            "score": pl.Series([2 / (n + 3) for n in range(3 * users)], dtype=pl.Float32),
            "rank": pl.Series([n % 3 + 1 for n in range(3 * users)], dtype=pl.UInt32),
            "model_version": [model] * (3 * users),
        }
    )
    context.workspace.publish("rankings", day, frame, {"model version": model})
    publish_to_table(context, day)
    return frame.cast({"rank": pl.Int64, "surface": pl.String}).with_columns(date=day)


def options_of(place: str) -> dict[str, str]:
    return store_options(place) if is_address(place) else {}


def table_of(place: str) -> tuple[duckdb.DuckDBPyConnection, list[str]]:
    """A connection that reads the table's store, and the Parquet files of its latest version.

    DuckDB's own extensions for Delta tables and S3 are downloads; these files are what they read.
    """
    from obstore.fsspec import FsspecStore

    options = options_of(place)
    connection = duckdb.connect()
    if options:
        endpoint: Any = {"aws_endpoint_url": options["aws_endpoint_url"]}
        store = FsspecStore("s3", config=endpoint, client_options={"allow_http": True})
        connection.register_filesystem(store)
    return connection, DeltaTable(place, storage_options=options).file_uris()


def types_of(found: duckdb.DuckDBPyRelation) -> dict[str, str]:
    return dict(zip(found.columns, map(str, found.types), strict=True))


def rows_of(place: str) -> pl.DataFrame:
    connection, files = table_of(place)
    found = connection.read_parquet(files, hive_partitioning=True)
    return found.order("date, user_id, rank").pl()


def test_the_table_has_the_documented_columns_and_the_values_of_each_day(
    context: Context, place: str
):
    days = [FIRST, date(2026, 11, 27)]
    expected = [rank(context, day, "1") for day in days]
    connection, files = table_of(place)
    found = connection.read_parquet(files, hive_partitioning=True)
    assert types_of(found) == COLUMNS
    assert_frame_equal(rows_of(place), pl.concat(expected), check_exact=True)
    # version 1 of the protocol has neither deletion vectors nor column mapping
    assert DeltaTable(place, storage_options=options_of(place)).protocol().min_reader_version == 1


@IN_S3_SLOW
def test_a_reader_has_the_whole_of_one_version_while_a_day_is_replaced(
    context: Context, place: str
):
    """Each version has as many users as its number says."""
    rank(context, FIRST, "1", users=1)

    def replace() -> None:
        for version in range(2, 7):
            rank(context, FIRST, str(version), users=version)

    seen = []
    with ThreadPoolExecutor(1) as other:
        writer = other.submit(replace)
        while not writer.done() or not seen:
            found = rows_of(place)
            seen.append(int(found["model_version"].unique().item()))
            assert found["user_id"].to_list() == [n // 3 for n in range(3 * seen[-1])]
        writer.result()
    assert seen == sorted(seen)
    assert rows_of(place)["model_version"].unique().to_list() == ["6"]


@IN_S3_SLOW
def test_a_scan_that_began_before_a_day_is_replaced_ends_with_its_rows(
    context: Context, place: str
):
    first = rank(context, FIRST, "1")
    connection, files = table_of(place)
    rank(context, FIRST, "2", users=2)
    found = connection.read_parquet(files, hive_partitioning=True)
    assert_frame_equal(found.order("user_id, rank").pl(), first, check_exact=True)


def test_the_workspace_has_the_same_columns_and_the_latest_ranking_of_each_day(tmp_path: Path):
    context = without_log(project(TINY), Workspace(tmp_path))
    for model, users in (("1", 9), ("2", 4)):
        latest = rank(context, FIRST, model, users)
    other_day = rank(context, date(2026, 11, 27), "1")
    files = f"{tmp_path}/rankings/date=*/part-0.parquet"
    query = "select * from read_parquet($files) where date = $day order by user_id, rank"
    for day, expected in ((FIRST, latest), (date(2026, 11, 27), other_day)):
        found = duckdb.sql(query, params={"files": files, "day": day})
        assert types_of(found) == COLUMNS | {"rank": "UINTEGER"}
        assert_frame_equal(found.pl().cast({"rank": pl.Int64}), expected, check_exact=True)
