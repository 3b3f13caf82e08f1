"""What is rebuilt when files are touched, tables refreshed, or a file arrives."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta

import polars as pl
import pytest

from mtl_ranker.commands.dry_run import plan_days
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from tests.conftest import FIRST, tiny_events, write_log
from tests.projects import write_project

LAST = FIRST + timedelta(days=5)
TABLE = {"path": "items.parquet", "key": "i", "columns": ["price"]}


def built(context) -> list[str]:
    """Steps that were not up to date."""
    done = []
    for day in context.source.days():
        if not ingest_day(context, day).skipped:
            done.append(f"events {day}")
    for day in context.source.days():
        if aggregate_day(context, day) is not None:
            done.append(f"aggregates {day}")
    if build_examples(context, LAST) is not None:
        done.append(f"examples {LAST}")
    return done


@pytest.fixture
def context(tmp_path):
    write_project(tmp_path, log={"items": TABLE}, features={"numerics": ["price"]})
    write_log(tmp_path)
    write_prices(tmp_path, [1.0] * 14)
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    assert len(built(context)) == 13
    return context


def write_prices(root, prices) -> None:
    """Item 13 occurs on no day."""
    frame = pl.DataFrame({"i": range(14), "price": prices})
    frame.write_parquet(root / "items.parquet")


def test_touched_and_copied_files_rebuild_nothing(context, tmp_path):
    for file in tmp_path.rglob("*.parquet"):
        if "ws" not in file.parts:
            os.utime(file)
    assert built(context) == []
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    shutil.rmtree(tmp_path / "log")
    shutil.copytree(tmp_path / "copy", tmp_path / "log", copy_function=shutil.copyfile)
    assert built(context) == []
    assert list(plan_days(context, [LAST])) == ["4 days up to date"]


def test_a_refreshed_table_rebuilds_the_days_of_the_rows_that_changed(context, tmp_path):
    write_prices(tmp_path, [1.0] * 13 + [2.0])
    assert built(context) == []
    write_prices(tmp_path, [1.0] * 12 + [5.0, 2.0])
    affected = [
        day
        for day in context.source.days()
        if 12 in context.workspace.scan("events", [day]).collect()["item_id"]
    ]
    planned = list(plan_days(context, [LAST]))
    assert any("rows of the user and item tables" in line for line in planned)
    done = built(context)
    assert done == [*(f"aggregates {day}" for day in affected), f"examples {LAST}"]


def test_a_new_file_in_an_undivided_log_affects_its_own_days(tmp_path):
    write_project(tmp_path)
    folder = tmp_path / "log"
    folder.mkdir()
    for number in range(6):
        frame = tiny_events(FIRST + timedelta(days=number), shift=number)
        frame.write_parquet(folder / f"{number}.parquet")
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    assert len(built(context)) == 13
    more = tiny_events(FIRST + timedelta(days=1), rows=3, shift=4)
    more.with_columns(pl.col("ts") + 1).write_parquet(folder / "later.parquet")
    assert [step for step in built(context) if step.startswith("events")] == [
        f"events {FIRST + timedelta(days=1)}"
    ]
