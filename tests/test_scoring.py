"""Candidate sets: keys in other types, columns missing, files missing."""

from __future__ import annotations

from datetime import timedelta

import polars as pl
import pytest

from mtl_ranker.config import load_project
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_source
from mtl_ranker.scoring import _cast_keys, generate_candidates, load_candidates
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST, PROJECT, write_log


@pytest.fixture
def ingested(tmp_path):
    text = PROJECT + '\n[scoring]\ncandidates = "candidates"\n'
    (tmp_path / "project.toml").write_text(text)
    write_log(tmp_path)
    project = load_project(str(tmp_path / "project.toml"))
    source, workspace = open_source(project, tmp_path), Workspace(tmp_path / "ws")
    for day in source.days():
        ingest_day(project, source, workspace, day)
    return project, source, workspace


def give(source, day, frame: pl.DataFrame):
    folder = source.root / "candidates" / f"date={day}"
    folder.mkdir(parents=True)
    frame.write_parquet(folder / "a.parquet")


def test_given_candidates_take_the_logs_types(ingested):
    project, source, workspace = ingested
    give(source, FIRST, pl.DataFrame({"u": ["1", "2"], "i": [3.0, 4.0]}))
    rows = load_candidates(project, source, workspace, FIRST)
    cast = _cast_keys(rows, workspace, FIRST).collect()
    assert cast.rows() == [(1, 3), (2, 4)]
    assert cast.dtypes == [pl.Int64, pl.Int64]


def test_an_id_that_is_no_number_is_named(ingested):
    project, source, workspace = ingested
    give(source, FIRST, pl.DataFrame({"u": ["1", "anna"], "i": [3, 4]}))
    rows = load_candidates(project, source, workspace, FIRST)
    with pytest.raises(ProjectError, match=r"'user_id' is String and holds \['anna'\].*Int64"):
        _cast_keys(rows, workspace, FIRST)


def test_missing_set_missing_column_and_missing_user_are_named(ingested):
    project, source, workspace = ingested
    with pytest.raises(ProjectError, match="no candidate set for 2026-03-02"):
        load_candidates(project, source, workspace, FIRST)
    give(source, FIRST, pl.DataFrame({"u": [1], "item": [3]}))
    with pytest.raises(ProjectError, match=r"column 'i' \(the item\) is missing; it has: user_id"):
        load_candidates(project, source, workspace, FIRST)
    give(source, FIRST + timedelta(days=1), pl.DataFrame({"u": [1, None], "i": [3, 3]}))
    with pytest.raises(ProjectError, match="1 rows lack a user or an item"):
        load_candidates(project, source, workspace, FIRST + timedelta(days=1))


def test_generated_candidates_are_active_users_times_fresh_items_with_their_context(ingested):
    project, _, workspace = ingested
    day = FIRST + timedelta(days=6)
    made = generate_candidates(project, workspace, day).collect()
    last = workspace.scan("events", [day - timedelta(days=1)]).collect()
    assert set(made["user_id"]) == set(last["user_id"])
    assert made.group_by("user_id").len()["len"].unique().to_list() == [13]
    for user, own in last.group_by("user_id"):
        modes = own["tab"].mode().to_list()
        assert set(made.filter(pl.col("user_id") == user[0])["tab"]) <= set(modes)
