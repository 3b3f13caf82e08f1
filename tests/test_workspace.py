"""A rebuild gives its reason, rebuilds only what depends on the change, and is atomic."""

from __future__ import annotations

import os
import socket
import time
from datetime import date, timedelta

import polars as pl
import pytest

from mtl_ranker.features import sql
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from mtl_ranker.workspace import Workspace, file_stamp
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import TINY, changed, edit_project

DAY = FIRST + timedelta(days=4)


def build(root) -> dict[str, str | None]:
    """Build the examples of DAY and their inputs: why each step ran, None where it did not."""
    context = open_context(str(root / "project.toml"), root, root / "ws")
    days = [d for d in context.source.days() if d <= DAY]
    ingested = [ingest_day(context, d).why for d in days]
    aggregated = [aggregate_day(context, d) for d in days]
    return {
        "ingest": next(filter(None, ingested), None),
        "ingested": len(list(filter(None, ingested))),
        "aggregate": next(filter(None, aggregated), None),
        "aggregated": len(list(filter(None, aggregated))),
        "examples": build_examples(context, DAY),
    }


@pytest.fixture
def built(tiny):
    first = build(tiny)
    assert (first["ingest"], first["aggregate"], first["examples"]) == ("not built yet",) * 3
    assert build(tiny) == dict.fromkeys(first, None) | {"ingested": 0, "aggregated": 0}
    return tiny


def test_a_window_rebuilds_examples_only(built):
    edit_project(built, features={"windows": [2, 3]})
    reasons = build(built)
    assert (reasons["ingest"], reasons["aggregate"]) == (None, None)
    assert reasons["examples"] == "changed: setting features.windows"


def test_a_label_rebuilds_everything_and_a_loss_weight_or_the_encoder_nothing(built):
    weighing = changed(TINY["objectives"], 0, weight=3.0)
    edit_project(built, objectives=weighing)
    edit_project(built, features={"bins": 16, "numeric_encoding": "standardise"})
    assert build(built)["examples"] is None
    longer = changed(weighing, 1, label="case when play > 12 then 1 else 0 end")
    edit_project(built, objectives=longer)
    reasons = build(built)
    assert reasons["ingest"] == "changed: setting objectives"
    assert reasons["ingested"] == reasons["aggregated"] == 5
    assert "events" in reasons["aggregate"]
    assert "aggregates of earlier days" in reasons["examples"]


def test_a_rewritten_day_rebuilds_itself_and_what_aggregates_it(built):
    day = FIRST + timedelta(days=2)
    write_day(built, day, tiny_events(day, rows=30, shift=9))
    reasons = build(built)
    assert reasons["ingest"] == "changed: source files"
    assert reasons["ingested"] == reasons["aggregated"] == 1
    assert reasons["examples"] == "changed: aggregates of earlier days"


def test_a_changed_sql_file_rebuilds_what_it_makes(built, monkeypatch):
    original = sql.sql_text

    def changed(name: str) -> str:
        return original(name) + ("\n-- changed" if name == "features/join.sql" else "")

    monkeypatch.setattr(sql, "sql_text", changed)
    reasons = build(built)
    assert (reasons["ingest"], reasons["aggregate"]) == (None, None)
    assert reasons["examples"] == "changed: sql/features/join.sql"


def test_a_day_is_stale_when_an_input_changed_came_or_vanished(tmp_path):
    workspace, made = Workspace(tmp_path), {"events": "1", "table of users": "2"}
    workspace.publish("examples", DAY, pl.DataFrame({"k": [1]}), made)
    assert workspace.stale("examples", DAY, made) is None
    assert workspace.stale("examples", DAY, made | {"events": "3"}) == "changed: events"
    assert workspace.stale("examples", DAY, made | {"actions": "4"}) == "changed: actions"
    assert workspace.stale("examples", DAY, {"events": "1"}) == "changed: table of users"
    assert workspace.stale("examples", FIRST, made) == "not built yet"


def test_days_with_other_columns_and_number_types_are_read_together(tmp_path):
    workspace = Workspace(tmp_path)
    frames = {
        1: pl.DataFrame({"k": [1], "a": ["x"], "n": [None]}),
        2: pl.DataFrame({"k": [2.5], "a": ["y"], "n": [3], "b": [True]}),
        3: pl.DataFrame({"b": [False], "k": [4.5]}),
    }
    for n, frame in frames.items():
        workspace.publish("events", date(2026, 3, n), frame, {})
    found = workspace.scan("events", [date(2026, 3, n) for n in frames]).collect()
    assert found.schema == {"k": pl.Float64, "a": pl.String, "n": pl.Int64, "b": pl.Boolean}
    assert found.rows() == [
        (1.0, "x", None, None),
        (2.5, "y", 3, True),
        (4.5, None, None, False),
    ]


def test_temporary_files_of_other_hosts_are_kept_for_a_week(tmp_path):
    """Hosts may share a workspace; whether another host's process is alive cannot be checked."""
    staging = tmp_path / ".staging"
    staging.mkdir()
    gone = 4_000_000  # no process has this id
    living = staging / f"{socket.gethostname()}-{os.getpid()}-a"
    dead = staging / f"{socket.gethostname()}-{gone}-b"
    other, abandoned = staging / f"far-away-host-{gone}-c", staging / f"far-away-host-{gone}-d"
    for file in (living, dead, other, abandoned):
        file.write_text("half")
    folder = staging / f"{socket.gethostname()}-{gone}-e"
    folder.mkdir()
    (folder / "part.parquet").write_text("half")
    os.utime(abandoned, (time.time() - 8 * 86_400,) * 2)
    Workspace(tmp_path).publish_file("reports/a.html", "new")
    assert sorted(staging.iterdir()) == sorted([living, other])


def test_a_temporary_folder_is_removed_also_after_an_error(tmp_path):
    def fail() -> None:
        with Workspace(tmp_path).temporary_folder() as folder:
            (folder / "part.parquet").write_text("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / ".staging").iterdir()) == []


def test_brackets_in_the_path_are_no_pattern(tmp_path):
    workspace = Workspace(tmp_path / "W [b]*")
    rows = pl.DataFrame({"k": [1, 2]})
    workspace.publish("events", DAY, rows, {"made": "so"})
    assert workspace.scan("events", [DAY]).collect().equals(rows)
    assert workspace.rows("events", DAY) == 2
    assert workspace.provenance("events", DAY) == {"made": "so"}


def test_the_stamp_of_a_file_changes_with_its_content_whatever_its_time(tmp_path):
    """Size, times of writing and of change, and number: each where the others stay."""
    file = tmp_path / "table.parquet"
    file.write_bytes(b"one")
    stamps, times = [file_stamp(file)], file.stat().st_mtime_ns
    time.sleep(0.05)  # the clock of files may tick every 10 ms
    file.write_bytes(b"two")
    os.utime(file, ns=(times, times))
    stamps.append(file_stamp(file))
    file.write_bytes(b"longer")
    os.utime(file, ns=(times, times))
    stamps.append(file_stamp(file))
    os.utime(file, ns=(times + 1, times + 1))
    stamps.append(file_stamp(file))
    other = tmp_path / "other"
    other.write_bytes(b"longer")
    os.utime(other, ns=(times + 1, times + 1))
    other.replace(file)
    stamps.append(file_stamp(file))
    assert len(set(stamps)) == len(stamps)
    assert file_stamp(file) == stamps[-1]


def test_a_failure_while_writing_keeps_the_old_file_and_removes_the_temporary_one(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.publish_file("reports/a.html", "old")

    def fail() -> None:
        with workspace.staged(tmp_path / "reports/a.html") as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "reports/a.html").read_text() == "old"
    assert list((tmp_path / ".staging").iterdir()) == []
