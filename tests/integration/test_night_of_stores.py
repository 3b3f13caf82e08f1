"""The same night on a log of folders, in an S3 store, in Delta and in Iceberg tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mtl_ranker.stores import objects
from mtl_ranker.stores.objects import Meta
from mtl_ranker.tracking.lineage import split_datasets
from tests.nights import Night, run_night
from tests.projects import SMALL, write_project
from tests.stores import (
    daily_frames,
    iceberg_catalog,
    s3_server,
    upload,
    write_delta,
    write_iceberg,
)


def rankings(night: Night) -> pl.DataFrame:
    workspace = night.context.workspace
    return workspace.scan("rankings", workspace.days("rankings")).collect()


def tags(address: str) -> dict[str, Meta]:
    """Key → what the store says of each object."""
    return objects.listing(address)


def night_of(folder: Path, data: str | Path, workspace: str | None = None, **log: Any) -> Night:
    folder.mkdir()
    write_project(folder, SMALL, log=log, models={"mmoe": {"preset": "mmoe", "experts": 2}})
    return run_night(folder, data, workspace)


@pytest.mark.slow
def test_the_same_night_in_every_place_and_format(feed: Path, tmp_path: Path):
    local = night_of(tmp_path / "local", feed)
    expected = rankings(local)
    assert expected.height > 0
    assert "versions" not in split_datasets(local.context, local.suite.days)["train"].profile
    frames, items = daily_frames(feed / "log"), pl.read_parquet(feed / "items.parquet")

    with s3_server():
        in_store = night_of(tmp_path / "s3", upload(feed, "night"))
        assert_frame_equal(rankings(in_store), expected, check_exact=True)

        tables = "s3://feed/tables"
        write_delta(f"{tables}/log", frames, ["date"])
        write_delta(f"{tables}/items", [items])
        delta = night_of(tmp_path / "delta", tables, format="delta", items={"path": "items"})
        assert_frame_equal(rankings(delta), expected, check_exact=True)
        profile = split_datasets(delta.context, delta.suite.days)["train"].profile
        assert profile["versions"] == {
            str(day): {"log": f"6 of {tables}/log", "log.items": f"0 of {tables}/items"}
            for day in delta.suite.days.train
        }

    with iceberg_catalog(tmp_path / "catalog") as catalog:
        write_iceberg(catalog, "feed.log", frames, "date")
        write_iceberg(catalog, "feed.items", [items], None)
        iceberg = night_of(
            tmp_path / "iceberg",
            tmp_path,
            format="iceberg",
            path="feed.log",
            items={"path": "feed.items"},
        )
        assert_frame_equal(rankings(iceberg), expected, check_exact=True)


@pytest.mark.slow
def test_the_same_night_with_the_workspace_in_a_store(
    feed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A second host, which has no file of the first one, builds nothing and ranks the same."""
    expected = rankings(night_of(tmp_path / "local", feed))
    with s3_server():
        address = "s3://feed/workspace"
        monkeypatch.setenv("MTL_RANKER_CACHE", str(tmp_path / "cache-a"))
        first = night_of(tmp_path / "a", feed, address)
        assert_frame_equal(rankings(first), expected, check_exact=True)
        made = tags(address)
        monkeypatch.setenv("MTL_RANKER_CACHE", str(tmp_path / "cache-b"))
        second = night_of(tmp_path / "b", feed, address)
        assert_frame_equal(rankings(second), expected, check_exact=True)
        changed = {key for key, meta in tags(address).items() if made.get(key) != meta}
        assert {key.split("/")[1] for key in changed} <= {"rankings", ".leases"}
        copies = [str(file) for file in (tmp_path / "cache-b").rglob("part-0.parquet")]
        assert not any("/quarantine/" in file for file in copies)  # read by no step
